"""`doctor`: what works here and for a target, what does not, why, and the remedy."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import rich_click as click

from .common import json_option, print_json, print_table, run_async, say

if TYPE_CHECKING:
    from ..probes import ProbeInfo, Verdict
    from ..qmp import Guest
    from ..qmp.leftovers import Leftover


@dataclass(frozen=True, slots=True)
class Probe:
    """One way of seeing something; the JSON contract names the keys."""

    name: str
    measures: list[str]
    usable: bool
    reason: str | None
    remedy: str | None
    resolution_ns: int
    cost: str


@dataclass(frozen=True, slots=True)
class Check:
    """Something this host has or has not."""

    name: str
    usable: bool
    reason: str | None
    remedy: str | None


_TRY = "upgrade us; else see on a guest that may be lost whether it lives"
_TRACE_LOG = "its trace log in a file of limited size"
_LIMITED = "run as root, or allow user namespaces to this user (sysctl user.max_user_namespaces)"
_LIMITED_OF_QEMU = "start QEMU without -D and with a stderr that is no file: it then logs to ours"


@click.command("doctor")
@click.argument("target", required=False)
@click.option("--clean", is_flag=True, help="Take away what crashed agents of yours left in "
              "running guests, and nothing else.")  # fmt: skip
@json_option
def command(target: str | None, clean: bool, as_json: bool) -> None:
    """Say what works on this host and, with a TARGET, for that guest.

    For everything that does not work: why, and what to do about it. Also lists what agents that
    were killed have left behind: trace events and the log, which the next attach puts back as well,
    objects that were made for an update, and guests that were left paused.

    Example: qmp-memlistener doctor /run/vm.qmp
    """
    from ..reports.lengths import duration_text
    from ..updates.guard_notes import all_notes

    notes = all_notes()  # to examine a target takes those about it
    leftovers = [*_find(), *run_async(_find_behind())]
    cleaned: list[str] = []
    if clean and leftovers:
        cleaned = run_async(_clean(leftovers))
        leftovers = [*_find(), *run_async(_find_behind())]
    probes, checks = run_async(_probes(target))
    checks += _checks()
    if as_json:
        print_json(
            {
                "schema": 1,
                "probes": probes,
                "checks": checks,
                "leftovers": [{"what": left.what, "where": left.where} for left in leftovers],
                "cleaned": cleaned,
                "notes": [note.text for note in notes],
            }
        )
        return
    title = f"for {target}" if target else "on this host (name a TARGET to see it for a guest)"
    say(f"probes {title}")
    print_table(
        ("probe", "measures", "usable", "resolution", "cost"),
        (
            [
                p.name,
                ", ".join(p.measures) or "counters",
                "yes" if p.usable else "no",
                duration_text(p.resolution_ns),
                p.cost,
            ]
            for p in probes
        ),
    )
    for probe in probes:
        _explain(probe.name, probe.reason, probe.remedy)
    say("", "this host")
    print_table(("what", "usable"), ([c.name, "yes" if c.usable else "no"] for c in checks))
    for check in checks:
        _explain(check.name, check.reason, check.remedy)
    say()
    for text in cleaned:
        say(f"cleaned: {text}")
    for left in leftovers:
        say(f"left over: {left.what} (noted in {left.where})")
        say(f"  remedy: {left.remedy}")
    if not leftovers:
        say("nothing of ours is left over in a running guest")
    for note in notes:
        say(note.text)
        if note.remedy:
            say(f"  remedy: {note.remedy}")


def _explain(name: str, reason: str | None, remedy: str | None) -> None:
    if reason:
        say(f"{name}: {reason}")
        if remedy:
            say(f"  remedy: {remedy}")


_CLEAN = "`qmp-memlistener doctor --clean`"
_ATTACH = f"{_CLEAN}, or attach to that guest again"


@dataclass(frozen=True, slots=True)
class Left:
    """Something of ours in a running guest: `what` in words, `where` the note about it lies."""

    what: str
    where: str
    guest: Guest | None
    take_away: Callable[[], Awaitable[bool]]
    remedy: str = _CLEAN


def _find() -> list[Left]:
    from ..probes import leftover_notes
    from ..qmp import Monitor, PidTarget, find_guest
    from ..qmp.identity import GuestIdentity
    from ..qmp.leftovers import clean_leftovers, find_leftovers

    async def traced(left: Leftover) -> bool:
        return await clean_leftovers(left) is not None

    async def switched(left: leftover_notes.LeftoverNote) -> bool:
        meant = GuestIdentity(left.pid, left.start_ticks, True)
        async with await Monitor.connect(PidTarget(left.pid), meant=meant) as monitor:
            return await leftover_notes.restore(monitor, left)

    return [
        *(Left(x.what, x.where, x.guest, partial(traced, x), _ATTACH) for x in find_leftovers()),
        *(
            Left(x.text, x.path, find_guest(x.pid), partial(switched, x), _ATTACH)
            for x in leftover_notes.find()
        ),
    ]


async def _find_behind() -> list[Left]:
    """What updates left that did not come to their end: the guests are asked whether it is so."""
    from ..errors import MemListenerError, OperationFailed
    from ..qmp import Monitor, PidTarget, find_guest
    from ..updates.left_behind import LeftBehind, confirmed, left_behind, take_away

    async def away(left: LeftBehind, pid: int) -> bool:
        async with await Monitor.connect(PidTarget(pid), meant=left.guest) as monitor:
            return await take_away(monitor, left)

    async def unknown() -> bool:
        raise OperationFailed(
            "the QEMU that was paused is not visible here",
            remedy="send `cont` to one of its monitors if it is to run",
        )

    found = []
    for left in left_behind():
        pid = left.pid
        if pid is None:
            found.append(Left(left.text, left.path, None, unknown))
            continue
        try:
            async with await Monitor.connect(PidTarget(pid), meant=left.guest) as monitor:
                text = await confirmed(monitor, left)
        except MemListenerError as exc:
            text = f"{left.text} (whether that is so still is not known: {exc.message})"
        if text is not None:
            found.append(Left(text, left.path, find_guest(pid), partial(away, left, pid)))
    return found


async def _clean(leftovers: list[Left]) -> list[str]:
    from ..errors import OperationFailed, TargetError
    from ..qmp.freeze import check_not_frozen, process_key

    done = []
    for left in leftovers:
        try:
            if left.guest is not None:
                check_not_frozen(process_key(left.guest.process))
            if await left.take_away():
                done.append(left.what)
        except (OperationFailed, TargetError) as exc:
            say(f"not cleaned: {exc.message}", err=True)
            if exc.remedy:
                say(f"  remedy: {exc.remedy}", err=True)
    return done


async def _probes(target: str | None) -> tuple[list[Probe], list[Check]]:
    """All probes for the target, or as far as the host alone decides."""
    from ..probes.registry import on_host

    if target is not None:
        return await _examine(target)
    return [_probe(info, verdict) for info, verdict in on_host()], []


async def _examine(target: str) -> tuple[list[Probe], list[Check]]:
    """Really switch tracing on and off again, ask every probe, and see what a snapshot costs."""
    from ..agent.monitors import connect_monitors
    from ..probes import Context
    from ..probes.registry import PROBES, choose
    from ..qmp import (
        TraceUnavailable,
        allowed,
        measure_idle,
        read_facts,
        start_tracing,
        take_snapshot,
    )

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
        context = Context(
            guest=owner,
            pid=monitors.pid,
            facts=await read_facts(monitor),
            monitor=monitor,
            companions=monitors.companions,
            traced=untraced is None,
            why_not_traced=untraced.message if untraced is not None else None,
            trace_remedy=untraced.remedy if untraced is not None else None,
        )
        choices = await choose(context, tuple(PROBES))
    cost_ms = (shot.bql_cost_ns or 0) / 1e6
    snapshots = Check(f"snapshots of its map ({cost_ms:.1f} ms of BQL each)", True, None, None)
    found = [snapshots]
    if untraced is None:
        remedy = _LIMITED_OF_QEMU if in_place else _LIMITED
        found.append(Check(_TRACE_LOG, unlimited is None, unlimited, unlimited and remedy))
    untried = allowed.untried(monitor.version.release)
    found.append(Check("our commands on its QEMU", not untried, untried, untried and _TRY))
    return [_probe(c.info, c.verdict) for c in choices], found


def _probe(info: ProbeInfo, verdict: Verdict) -> Probe:
    return Probe(
        name=info.name,
        measures=[str(kind) for kind in info.measures],
        usable=verdict.usable,
        reason=verdict.reason,
        remedy=verdict.remedy,
        resolution_ns=info.resolution_ns,
        cost=info.cost,
    )


def _checks() -> list[Check]:
    from ..guests import find_qemus, kvm_usable

    checks = []
    builds = find_qemus()
    if builds:
        versions = ", ".join(b.version for b in builds)
        checks.append(Check(f"QEMU for the demo and tests ({versions})", True, None, None))
        probe = kvm_usable(builds[0])
        checks.append(
            Check(
                "KVM",
                bool(probe),
                None if probe else probe.reason,
                None
                if probe
                else "use a host with /dev/kvm and the right to open it; without, "
                "guests run under TCG",
            )
        )
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
    assembler = shutil.which("as") is not None
    checks.append(
        Check(
            "assembler, to build the pulse guest again",
            assembler,
            None if assembler else "`as` is not installed",
            None if assembler else "install the Debian package binutils",
        )
    )
    return checks


def _lab() -> list[Check]:
    """Whether the lab can run, and each strategy that some kernel has and this one has not."""
    from ..errors import MissingPrerequisite
    from ..kvmlab import STRATEGIES, Kvm, why_not

    try:
        with Kvm() as kvm:
            lacking = {s.name: why_not(s, kvm) for s in STRATEGIES if s.only_model is None}
    except MissingPrerequisite as exc:
        return [Check("lab", False, exc.message, exc.remedy)]
    usable = sum(why is None for why in lacking.values())
    checks = [Check(f"lab ({usable} strategies on /dev/kvm)", True, None, None)]
    checks += [
        Check(f"lab strategy {name}", False, why, "use a kernel that has it, or the others")
        for name, why in lacking.items()
        if why is not None
    ]
    return checks
