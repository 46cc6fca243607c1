"""What works on this host and for a guest, what does not, why, and the remedy: for `doctor`."""

from __future__ import annotations

import shutil
from contextlib import AsyncExitStack
from dataclasses import dataclass

from ..errors import MissingPrerequisite, OperationFailed, TargetLost, TraceUnavailable
from ..guests import find_qemus, kvm_usable
from ..host.bounded import in_thread
from ..kvmlab import STRATEGIES, Kvm, why_not
from ..probes import ProbeInfo, Verdict
from ..probes.registry import PROBES, choose, on_host
from ..qmp import (
    GuestFacts,
    Monitor,
    allowed,
    measure_idle,
    read_facts,
    start_tracing,
    take_snapshot,
)
from ..steer import Mode, judge, state_of
from ..updates.steered import process_of_monitor
from .monitors import connect_monitors, context_of
from .steered import strategy_text

__all__ = ["Check", "ProbeCheck", "check_host", "examine_guest", "probes_of_host"]

_TRY = "upgrade qmp-memlistener, or try it on a guest that may be lost first"
_TRACE_LOG = "its trace log in a file of limited size"
_LIMITED = "run as root, or allow user namespaces to this user (sysctl user.max_user_namespaces)"
_LIMITED_OF_QEMU = "start QEMU without -D and with a stderr that is no file: it then logs to ours"


@dataclass(frozen=True, slots=True)
class ProbeCheck:
    """One way of seeing something, as in `doctor --json`."""

    name: str
    measures: list[str]
    usable: bool
    reason: str | None
    remedy: str | None
    resolution_ns: int
    cost: str

    @classmethod
    def of(cls, info: ProbeInfo, verdict: Verdict) -> ProbeCheck:
        return cls(
            name=info.name,
            measures=[str(kind) for kind in info.measures],
            usable=verdict.usable,
            reason=verdict.reason,
            remedy=verdict.remedy,
            resolution_ns=info.resolution_ns,
            cost=info.cost,
        )


@dataclass(frozen=True, slots=True)
class Check:
    """Something this host has or has not, as in `doctor --json`."""

    name: str
    usable: bool
    reason: str | None = None
    remedy: str | None = None


def probes_of_host() -> list[ProbeCheck]:
    """All probes, as far as the host alone decides."""
    return [ProbeCheck.of(info, verdict) for info, verdict in on_host()]


async def examine_guest(target: str) -> tuple[list[ProbeCheck], list[Check]]:
    """All probes, and what else there is to know, for a guest.

    Really switches tracing on and off again, asks every probe, and sees what a snapshot costs.
    Raises as entering the block of `attach` does.
    """
    async with AsyncExitStack() as stack:
        monitors = await connect_monitors(stack, target, ping_first=True)
        monitor, owner = monitors.observer, monitors.owner
        shot = await take_snapshot(monitor, await measure_idle(monitor))
        untraced = None
        unlimited = None
        try:
            async with await start_tracing(monitor, guest=owner) as session:
                unlimited = session.unlimited
                in_place = session.in_place
        except TraceUnavailable as exc:
            untraced = exc
        facts = await read_facts(monitor)
        context = context_of(monitors, facts, untraced)
        choices = await choose(context, tuple(PROBES))
    cost_ms = (shot.bql_cost_ns or 0) / 1e6
    found = [Check(f"snapshots of its map ({cost_ms:.1f} ms of BQL each)", True)]
    if untraced is None:
        remedy = _LIMITED_OF_QEMU if in_place else _LIMITED
        found.append(Check(_TRACE_LOG, unlimited is None, unlimited, unlimited and remedy))
    untried = allowed.untried(monitor.version.release)
    found.append(Check("our commands on its QEMU", not untried, untried, untried and _TRY))
    found.append(await in_thread(_steering, monitor, facts))
    return [ProbeCheck.of(c.info, c.verdict) for c in choices], found


def _steering(monitor: Monitor, facts: GuestFacts) -> Check:
    """Whether `steer` would do anything there; nothing is touched."""
    process = process_of_monitor(monitor)
    if process is None:
        return Check("steer", False, "QEMU's process is not visible here")
    works, refused = [], []
    for mode in (Mode.OBSERVE, Mode.PAUSE, Mode.INHIBIT, Mode.HOLE):
        try:
            judge(process, monitor.version, kvm=facts.kvm, wanted=mode)
        except MissingPrerequisite as exc:
            refused.append(exc)
        else:
            works.append(str(mode))
    if not works:
        return Check("steer", False, refused[0].message, refused[0].remedy)
    try:
        applied = strategy_text(state_of(process))
    except (MissingPrerequisite, OperationFailed, TargetLost) as exc:
        return Check("steer", False, exc.message, exc.remedy)
    now = f"; {applied} is applied" if applied is not None else ""
    return Check(f"steer ({', '.join(works)}{now})", True)


def check_host() -> list[Check]:
    """What this host has for the demo, the tests and the lab."""
    checks = []
    builds = find_qemus()
    if builds:
        versions = ", ".join(b.version for b in builds)
        checks.append(Check(f"QEMU for the demo and tests ({versions})", True))
        kvm = kvm_usable(builds[0])
        remedy = "use a host with /dev/kvm and the right to open it; without, guests run under TCG"
        checks.append(Check("KVM", True) if kvm else Check("KVM", False, kvm.reason, remedy))
    else:
        checks.append(
            Check(
                "QEMU for the demo and tests",
                False,
                "no qemu-system-x86_64 is installed",
                "install the Debian package qemu-system-x86",
            )
        )
    checks += _lab()
    what = "assembler, to build the pulse guest again"
    if shutil.which("as") is not None:
        checks.append(Check(what, True))
    else:
        remedy = "install the Debian package binutils"
        checks.append(Check(what, False, "`as` is not installed", remedy))
    return checks


def _lab() -> list[Check]:
    """Whether the lab can run, and each strategy that some kernel has and this one has not."""
    try:
        with Kvm() as kvm:
            lacking = {s.name: why_not(s, kvm) for s in STRATEGIES if s.only_model is None}
    except MissingPrerequisite as exc:
        return [Check("lab", False, exc.message, exc.remedy)]
    usable = sum(why is None for why in lacking.values())
    checks = [Check(f"lab ({usable} strategies on /dev/kvm)", True)]
    checks += [
        Check(f"lab strategy {name}", False, why, "use a kernel that has it, or another strategy")
        for name, why in lacking.items()
        if why is not None
    ]
    return checks
