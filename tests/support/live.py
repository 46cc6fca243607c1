"""What the live tests share: QEMUs and accelerators, booted pulse guests, what the agent said.

Everything that waits does so for an event and with a deadline.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import pytest

from qmp_memlistener import MemoryListener, attach
from qmp_memlistener.guests import (
    HOST_BRIDGE,
    I440FX,
    PAM_RAM,
    Q35,
    GuestSpec,
    HostBridge,
    LaunchedGuest,
    Pulse,
    QemuBuild,
    boot_args,
    find_qemus,
    kvm_usable,
    launch,
)
from qmp_memlistener.memslots import Op, Rules, SlotTable, plan
from qmp_memlistener.qmp import Monitor, UnixTarget
from qmp_memlistener.records import (
    Header,
    Lost,
    Note,
    Reconciled,
    Record,
    SlotOp,
    TransitionRecord,
)
from qmp_memlistener.topology import Transition
from tests.support.any_monitor import AnyMonitor
from tests.support.host import patience

__all__ = [
    "Commits",
    "NO_QEMU",
    "QEMUS",
    "Seen",
    "Shape",
    "Vm",
    "attach_bare",
    "best_accel",
    "booted",
    "builds",
    "cases",
    "op_shapes",
    "planned",
    "planned_shapes",
    "qmp",
    "silenced",
    "skip_without_kvm",
    "why_no_kvm",
]

QEMUS = find_qemus()
NO_QEMU = "qemu-system-x86_64 is not installed"
BRIDGES = {"pc": I440FX, "q35": Q35}


def builds(of: Sequence[QemuBuild] = QEMUS) -> pytest.MarkDecorator:
    """One run on every QEMU `of` those here; in the quick tier on the newest one alone."""
    params = [
        pytest.param(build, id=build.version, marks=_full_unless(build is of[-1])) for build in of
    ]
    none = pytest.param(None, marks=pytest.mark.skip(reason=NO_QEMU), id="none")
    return pytest.mark.parametrize("build", params or [none])


def cases(*accels: str, of: Sequence[QemuBuild] = QEMUS) -> pytest.MarkDecorator:
    """One run on every QEMU `of` those here under each of `accels` (default: KVM and TCG).

    In the quick tier on the newest one alone, under the first of `accels` that works.
    """
    accels = accels or ("kvm", "tcg")
    quick = next((a for a in accels if of and (a != "kvm" or not why_no_kvm(of[-1].binary))), "")
    params = [
        pytest.param(
            build,
            accel,
            id=f"{build.version}-{accel}",
            marks=(*_marks(accel), *_full_unless(build is of[-1] and accel == quick)),
        )
        for build in of
        for accel in accels
    ]
    none = pytest.param(None, "", marks=pytest.mark.skip(reason=NO_QEMU), id="none")
    return pytest.mark.parametrize(("build", "accel"), params or [none])


def _full_unless(quick: bool) -> Sequence[pytest.MarkDecorator]:
    return () if quick else (pytest.mark.full,)


def _marks(accel: str) -> Sequence[pytest.MarkDecorator]:
    return (pytest.mark.kvm,) if accel == "kvm" else ()


def best_accel(build: QemuBuild) -> str:
    """KVM where it works."""
    return "tcg" if why_no_kvm(build.binary) else "kvm"


@functools.cache
def why_no_kvm(binary: str) -> str:
    """Why KVM does not work with this QEMU; empty when it does."""
    return kvm_usable(next(b for b in QEMUS if b.binary == binary)).reason


def skip_without_kvm(build: QemuBuild, accel: str) -> None:
    if accel == "kvm" and (reason := why_no_kvm(build.binary)):
        pytest.skip(f"KVM is not usable with QEMU {build.version}: {reason}")


def silenced(build: QemuBuild, directory: Path) -> QemuBuild:
    """The same QEMU with /dev/null as its standard error, so that its log must be redirected."""
    script = directory / "silent-qemu"
    script.write_text(f'#!/bin/sh\nexec "{build.binary}" "$@" 2>/dev/null\n')
    script.chmod(0o755)
    return replace(build, binary=str(script))


@dataclass(frozen=True, slots=True)
class Vm:
    """A pulse guest that is up, its monitors free."""

    guest: LaunchedGuest
    pulse: Pulse
    bridge: HostBridge

    @property
    def target(self) -> str:
        return f"unix:{self.guest.monitors[0]}"

    async def write(self, register: int, value: int, width: int = 1) -> None:
        """The guest writes a register of its host bridge."""
        await self.pulse.write_config(HOST_BRIDGE, register, value, width)

    async def open_pam(self) -> None:
        """RAM in place of the BIOS area 0xf0000-0xfffff."""
        await self.write(self.bridge.pam, PAM_RAM << 4)

    async def close_pam(self) -> None:
        await self.write(self.bridge.pam, 0)

    async def toggle(self, count: int, period_ms: int = 0) -> None:
        """`count` such transitions, the first one opens; returns when they are done.

        The period is a rough one: it takes the TSC to run at 3 GHz.
        """
        toggle = await self.pulse.toggle(
            HOST_BRIDGE,
            self.bridge.pam,
            (PAM_RAM << 4, 0),
            count,
            period=period_ms * 3_000_000,
            unit="ticks",
        )
        assert await toggle.wait() == count


@asynccontextmanager
async def booted(
    build: QemuBuild,
    accel: str,
    machine: str = "pc",
    *args: str,
    memory: int = 64 << 20,
    smp: int = 1,
    monitors: int = 3,
    binary: QemuBuild | None = None,
) -> AsyncIterator[Vm]:
    """A pulse guest without firmware; `binary` is what to start in place of `build`."""
    skip_without_kvm(build, accel)
    spec = GuestSpec(
        machine=machine,
        accel=accel,
        memory=memory,
        smp=smp,
        monitors=monitors,
        args=(*boot_args(), *args),
    )
    async with launch(spec.on(binary or build)) as guest:
        assert guest.ram is not None
        with Pulse(guest.ram) as pulse:
            await pulse.wait_ready()
            yield Vm(guest, pulse, BRIDGES[machine.split(",")[0]])


@asynccontextmanager
async def qmp(path: Path) -> AsyncIterator[Monitor]:
    """A connection of the test's own."""
    async with await AnyMonitor.connect(UnixTarget(str(path)), deadline=patience(1.0)) as monitor:
        yield monitor


attach_bare = functools.partial(attach, probes=())
"""Attach without probes: for what concerns the map alone."""
R = TypeVar("R", bound=Record)
Shape = tuple[str, int, int, int, int, int]
"""op, address space, slot, gpa, size, flags."""


class Seen:
    """The records of an attachment in order: `attach(..., on_record=seen)`."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._news = asyncio.Event()

    def __call__(self, record: Record) -> None:
        self.records.append(record)
        self._news.set()

    def of(self, kind: type[R]) -> list[R]:
        return [r for r in self.records if isinstance(r, kind)]

    @property
    def header(self) -> Header:
        first = self.records[0]
        assert isinstance(first, Header)
        return first

    @property
    def transitions(self) -> list[TransitionRecord]:
        return self.of(TransitionRecord)

    @property
    def notes(self) -> list[str]:
        return [n.text for n in self.of(Note)]

    def ops(self, seq: int | None) -> list[SlotOp]:
        """The operations of one transition."""
        return [op for op in self.of(SlotOp) if op.transition == seq]

    def ops_by_transition(self) -> dict[int | None, list[SlotOp]]:
        found: dict[int | None, list[SlotOp]] = {}
        for op in self.of(SlotOp):
            found.setdefault(op.transition, []).append(op)
        return found

    @property
    def differences(self) -> list[str]:
        """What was said of slots that are not as QEMU's rules predict."""
        return [d for r in self.of(Reconciled) if not r.equal for d in r.differences]

    def check_nothing_wrong(self) -> None:
        """Nothing lost, nothing unpredicted, transitions numbered and stamped in order.

        Gaps that the guest overwrote on a busy machine are none of the map's.
        """
        assert [lost for lost in self.of(Lost) if not lost.what.startswith("pulse: ")] == []
        assert self.differences == []
        assert [t.seq for t in self.transitions] == list(range(1, len(self.transitions) + 1))
        stamps = [t.t_ns for t in self.transitions]
        assert stamps == sorted(stamps)
        ops = self.ops_by_transition()
        assert all(op.ret == 0 for op in self.of(SlotOp))
        for t in self.transitions:
            mine = ops.get(t.seq, [])
            assert len(mine) == t.slot_ops
            assert all(op.t_ns >= t.t_ns for op in mine)

    async def wait_for(self, true: Callable[[], bool], seconds: float = 10.0) -> None:
        """Until `true`, which is asked anew at every record."""
        async with asyncio.timeout(patience(seconds)):
            while not true():
                self._news.clear()
                await self._news.wait()


class Commits(MemoryListener):
    """Keeps the transitions that a listener is told, the first one (the present map) left out."""

    def __init__(self) -> None:
        self.transitions: list[Transition] = []
        self._begun = False

    def commit(self, transition: Transition) -> None:
        if self._begun:
            self.transitions.append(transition)
        self._begun = True


def op_shapes(ops: Iterable[SlotOp]) -> list[Shape]:
    return [(op.op, op.as_id, op.slot, op.gpa, op.size, op.flags) for op in ops]


def planned_shapes(ops: Iterable[Op]) -> list[Shape]:
    return [(str(op.op), op.as_id, op.slot, op.gpa, op.size, op.flags) for op in ops]


def planned(
    transition: Transition, table: SlotTable, rules: Rules
) -> tuple[list[Shape], SlotTable]:
    """What `plan` says QEMU does for a transition, and the slots after it."""
    p = plan(transition.before, transition.after, table=table, rules=rules)
    return planned_shapes(p.ops), p.after
