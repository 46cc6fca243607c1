"""What tests of the uprobes probe share: the probe at work on a guest, and what it reports."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from qmp_memlistener.probes import Observation, ProbeUnavailable, StallKind
from qmp_memlistener.probes.uprobes import UprobesProbe
from qmp_memlistener.probes.uprobes.program import Program, examine
from qmp_memlistener.qmp import Monitor
from qmp_memlistener.records import CommandRecord
from tests.support.live import QEMUS, Vm
from tests.support.probes import Recorder, guest_context

__all__ = ["ENDS", "Seen", "probed", "probing"]

ENDS = QEMUS[:1] + QEMUS[1:][-1:]
"""The oldest and the newest: the kernel takes uprobes out slowly."""


class Seen(Recorder):
    """A sink that takes commands too."""

    def __init__(self) -> None:
        super().__init__()
        self.commands: list[CommandRecord] = []

    def command(self, span: CommandRecord) -> None:
        self.commands.append(span)

    def of(self, kind: StallKind, since_ns: int = 0) -> list[Observation]:
        found = [o for o in self.observations if o.kind is kind and o.start_ns >= since_ns]
        return sorted(found, key=lambda o: o.start_ns)

    def named(self, name: str) -> list[CommandRecord]:
        return [c for c in self.commands if c.name == name]


def probed(vm: Vm) -> Program:
    """Where the guest can be probed; skips the test when it cannot."""
    try:
        return examine(vm.guest.process.pid)
    except ProbeUnavailable as why:
        pytest.skip(f"uprobes: {why.message}")


@asynccontextmanager
async def probing(
    vm: Vm, *, named: bool = False, must_see: dict[StallKind, int] | None = None
) -> AsyncIterator[tuple[UprobesProbe, Seen, Monitor]]:
    """The probe at work on a guest; nothing was lost when the block is left."""
    probed(vm)
    async with guest_context(vm.guest) as context:
        probe = UprobesProbe(replace(context, named=named, must_see=must_see or {}))
        assert (await probe.check()).usable
        seen = Seen()
        await probe.start(seen)
        try:
            yield probe, seen, context.monitor
        finally:
            await probe.stop()
    seen.check_nothing_wrong()
