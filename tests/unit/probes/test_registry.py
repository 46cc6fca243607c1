"""Which probes are taken by default."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import cast

import pytest

from qmp_memlistener.probes import Context, Probe, ProbeInfo, StallKind, Verdict, registry
from qmp_memlistener.qmp import Monitor
from tests.support.probes import context_of

CONTEXT = context_of(cast("Monitor", None))
LOOP = frozenset({StallKind.MAIN_LOOP})


class Fake:
    """A probe of which the verdict is known."""

    def __init__(self, name: str, verdict: Verdict) -> None:
        self.info = ProbeInfo(name, (StallKind.MAIN_LOOP,), "", 0, "", 0.0)
        self._verdict = verdict

    async def check(self) -> Verdict:
        return self._verdict


def chosen(
    monkeypatch: pytest.MonkeyPatch,
    threads: Verdict,
    context: Context = CONTEXT,
    names: tuple[str, ...] | None = None,
) -> dict[str, bool]:
    verdicts = {"threads": threads}

    def make(name: str, _: Context) -> Probe:
        return cast("Probe", Fake(name, verdicts.get(name, Verdict(True))))

    monkeypatch.setattr(registry, "make", make)
    return {c.info.name: c.verdict.usable for c in asyncio.run(registry.choose(context, names))}


def test_threads_are_sampled_in_place_of_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = chosen(monkeypatch, Verdict(True))
    assert found["threads"]
    assert not found["ping"]


def test_pings_go_on_where_threads_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for verdict in (Verdict.no("it is hidden"), Verdict(True, "Yama", "be root", LOOP)):
        assert chosen(monkeypatch, verdict)["ping"], verdict


def test_who_names_pings_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, Verdict(True), replace(CONTEXT, must_ping=True))["ping"]
    assert chosen(monkeypatch, Verdict(True), names=("ping", "threads"))["ping"]
