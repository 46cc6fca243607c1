"""The end of an attachment whose stalls are too many to be decided."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest

from qmp_memlistener.agent import probe_runner
from qmp_memlistener.agent.probe_runner import Measuring
from qmp_memlistener.records import Record


class Endless:
    """A timeline that never comes to its end."""

    more = True
    waiting = 7

    def finish(self) -> list[Record]:
        return []


@pytest.mark.asyncio
async def test_the_end_does_not_wait_for_stalls_and_counts_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = Measuring.__new__(Measuring)
    lost: list[tuple[str, int]] = []
    published: list[object] = []

    def publish(records: Iterable[Record]) -> None:
        published.extend(records)

    for name, stub in {
        "_timeline": Endless(),
        "_tell_loss": lambda what, count: lost.append((what, count)),
        "_publish": publish,
        "_compare_witnesses": lambda: None,
        "summary": lambda: "the summary",
    }.items():
        monkeypatch.setattr(runner, name, stub, raising=False)
    monkeypatch.setattr(probe_runner, "FINISH_S", 0.05)
    start = time.monotonic()
    await runner.finish()
    assert time.monotonic() - start < 30
    assert lost == [("stalls that were not decided in time at the end", 7)]
    assert published == ["the summary"]
