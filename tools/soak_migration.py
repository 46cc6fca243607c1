"""Migrations at random moments of our pauses: do source and destination end as without us?

    python -m tools.soak_migration [--count 200] [--kinds held,mirror,hotplug,…] [--qemu 7.2]
                                   [--accel tcg] [--jobs 1]

Each round starts a pulse guest and a QEMU that waits for it, lets an agent pause the guest over and
over, and migrates it at a random moment:

    held     a block of code in which the guest is paused, 2 to 150 ms
    mirror   a mirror that pauses the guest for each transition, of which there are many
    hotplug  a plug with a slow backend under the strategy pause; QEMU refuses the device in the end
    unplug   a device comes again and again, and is unplugged under the strategy pause
    resize   memory is plugged under the strategy pause
    compare  a device is plugged and unplugged under direct and pause in turn
    none     nothing: how it ends without us

A migration that completed must leave the source in `postmigrate` and the destination running, its
pulse beating; one that failed (the destination lacks what was plugged) a source that runs.  "Told":
it was migrated between two looks at QEMU, is paused at the destination, the agent said so, and it
ran after the `cont` that the agent said to send there.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from qmp_memlistener.agent import attach
from qmp_memlistener.errors import CommandFailed, MemListenerError, TargetLost
from qmp_memlistener.guests import (
    HOST_BRIDGE,
    I440FX,
    PAM_RAM,
    GuestSpec,
    LaunchedGuest,
    Pulse,
    QemuBuild,
    boot_args,
    find_qemus,
    launch,
)
from qmp_memlistener.mirror.backend import ModelBackend
from qmp_memlistener.mirror.mirror import Mirror
from qmp_memlistener.mirror.mirroring import mirroring
from qmp_memlistener.qmp import Monitor, UnixTarget
from qmp_memlistener.updates.compare import CompareOptions, compare
from qmp_memlistener.updates.model import Intent, Plug, Role, Strategy, Unplug
from qmp_memlistener.updates.options import parse_addition, parse_resize
from qmp_memlistener.updates.pause import Pause, paused_guest
from qmp_memlistener.updates.pause.guard import ResumeGuard
from qmp_memlistener.updates.settings import UpdateOptions
from tests.support.any_monitor import AnyMonitor

__all__ = ["KINDS", "Pair", "Round", "migrated_pair", "one_round", "status_of", "wrong_of"]

_DEADLINE_S = 20.0
_MOMENT_S = 0.4
_AFTER_S = 0.1
_OVER = ("completed", "failed", "cancelled")
_BACKEND = "memory-backend-ram,id=soak,size=48M,prealloc=on"
_REFUSED = "pc-dimm,id=soak-dimm,memdev=soak,addr=0x1234"
"""QEMU wants another alignment: so the destination need not have it."""
_DEVICE = "usb-tablet,port=1,id=soak-usb"
"""The destination has it: it comes with the guest, or the guest does without."""
_OPTIONS = UpdateOptions(wait_s=0.2)


@dataclass(frozen=True, slots=True)
class Pair:
    """A guest, the QEMU it is to be migrated to, and a monitor of each for us."""

    source: LaunchedGuest
    destination: LaunchedGuest
    pulse: Pulse
    uri: str
    at_source: Monitor
    at_destination: Monitor

    @property
    def target(self) -> str:
        """A monitor for agents."""
        return f"unix:{self.source.monitors[0]}"


@dataclass(frozen=True, slots=True)
class Round:
    """`ended` is the migration's status, `said` what the agent said; `wrong` is empty when all was
    well.

    `told`: what was wrong, the agent said so, and what it said to do about it did help.
    """

    kind: str
    ended: str
    said: tuple[str, ...]
    wrong: str
    told: str = ""


# -- what pauses ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Work:
    """What is done to a pair; `begun` once the guest is being paused."""

    pair: Pair
    said: list[str] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    pause: Pause | None = None

    def say(self, *texts: str | None) -> None:
        self.said.extend(text for text in texts if text)


async def _held(work: Work) -> None:
    target, guarded = (UnixTarget(str(path)) for path in work.pair.source.monitors[:2])
    async with (
        await Monitor.connect(target) as monitor,
        await ResumeGuard.start([guarded]) as guard,
    ):
        while True:
            try:
                async with paused_guest(monitor, guard, deadline=_DEADLINE_S) as pause:
                    work.pause = pause
                    work.begun.set()
                    await asyncio.sleep(random.uniform(0.002, 0.15))
                work.say(pause.note)
            except MemListenerError as error:
                work.say(error.message)
            await asyncio.sleep(random.uniform(0, 0.03))


async def _mirror(work: Work) -> None:
    mirror: Mirror | None = None
    try:
        async with (
            attach(work.pair.target, probes=(), guarded=True) as agent,
            mirroring(agent, ModelBackend(), Strategy.PAUSE) as mirror,
        ):
            period = 3_000_000 * random.choice((1, 3, 10))
            states = (PAM_RAM << 4, 0)
            await work.pair.pulse.toggle(
                HOST_BRIDGE, I440FX.pam, states, 1 << 20, period=period, unit="ticks"
            )
            work.begun.set()
            await agent.wait_lost()
    finally:
        if mirror is not None:  # with what came of a pause in which it was left
            work.say(*mirror.report().notes)


async def _updating(work: Work, intent: Intent) -> None:
    async with attach(work.pair.target, probes=(), guarded=True) as agent:
        work.begun.set()
        while True:
            outcome = await agent.update(intent, "pause", _OPTIONS)
            work.say(outcome.reason, *outcome.notes)
            await asyncio.sleep(random.uniform(0, 0.02))


async def _hotplug(work: Work) -> None:
    backend = parse_addition(Role.OBJECT, _BACKEND)
    await _updating(work, Plug(parse_addition(Role.DEVICE, _REFUSED), (backend,)))


async def _resize(work: Work) -> None:
    await _updating(work, parse_resize("+128M"))


async def _unplug(work: Work) -> None:
    device = parse_addition(Role.DEVICE, _DEVICE)
    async with attach(work.pair.target, probes=(), guarded=True) as agent:
        while True:
            # refused in a migration, and while it is there
            with suppress(CommandFailed):
                await work.pair.at_source.execute("device_add", dict(device.arguments))
            work.begun.set()
            outcome = await agent.update(Unplug(device.id), "pause", _OPTIONS)
            work.say(outcome.reason, *outcome.notes)
            await asyncio.sleep(random.uniform(0, 0.02))


async def _compare(work: Work) -> None:
    intent = Plug(parse_addition(Role.DEVICE, _DEVICE), ())
    options = CompareOptions(repeat=1000, window_s=0.02, update=_OPTIONS)
    strategies = (Strategy.DIRECT, Strategy.PAUSE)
    async with attach(work.pair.target, probes=(), guarded=True) as agent:
        work.begun.set()
        found = await compare(agent, intent, strategies, options)
        work.say(found.ended_early)


async def _none(work: Work) -> None:
    work.begun.set()
    await asyncio.Event().wait()


KINDS: dict[str, Callable[[Work], Awaitable[None]]] = {
    "held": _held,
    "mirror": _mirror,
    "hotplug": _hotplug,
    "unplug": _unplug,
    "resize": _resize,
    "compare": _compare,
    "none": _none,
}


# -- one round ------------------------------------------------------------------------------------


@asynccontextmanager
async def migrated_pair(
    build: QemuBuild, accel: str, memory: int = 16 << 20
) -> AsyncIterator[Pair]:
    """Two QEMUs alike, the second one waiting for the guest of the first."""
    args = (*boot_args(), "-m", "slots=16,maxmem=2G", "-device", "qemu-xhci")
    spec = GuestSpec(accel=accel, memory=memory, monitors=4, args=args).on(build)
    async with AsyncExitStack() as stack:
        uri = f"unix:{Path(stack.enter_context(TemporaryDirectory())) / 'migration'}"
        waiting = replace(spec, monitors=2, args=(*spec.args, "-device", _DEVICE, "-incoming", uri))
        async with asyncio.TaskGroup() as group:
            up = [group.create_task(_launched(stack, each)) for each in (spec, waiting)]
        source, destination = (task.result() for task in up)
        monitors = [
            await stack.enter_async_context(await AnyMonitor.connect(UnixTarget(str(path))))
            for path in (source.monitors[-1], destination.monitors[0])
        ]
        assert source.ram is not None
        with Pulse(source.ram) as pulse:
            await pulse.wait_ready()
            yield Pair(source, destination, pulse, uri, *monitors)


async def _launched(stack: AsyncExitStack, spec: GuestSpec) -> LaunchedGuest:
    return await stack.enter_async_context(launch(spec))


async def one_round(build: QemuBuild, accel: str, kind: str) -> Round:
    """Migrate a guest that is being paused, and see what becomes of it on both sides."""
    async with migrated_pair(build, accel) as pair:
        work = Work(pair)
        task = asyncio.ensure_future(KINDS[kind](work))
        try:
            async with asyncio.timeout(_DEADLINE_S):
                await work.begun.wait()
            await asyncio.sleep(random.uniform(0, _MOMENT_S * (5 if kind == "compare" else 1)))
            await pair.at_source.execute("migrate", {"uri": pair.uri}, deadline=_DEADLINE_S)
            ended = await _over(pair.at_source)
            await asyncio.sleep(random.uniform(0, _AFTER_S))
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, MemListenerError):
                await task
        if work.pause is not None:
            work.say(work.pause.note)
        told = ""
        try:
            wrong = await wrong_of(pair)
            if wrong and any("until `cont` is sent there" in text for text in work.said):
                await pair.at_destination.execute("cont", deadline=_DEADLINE_S)
                told, wrong = wrong, await _pulse_of(pair)
        except TargetLost as error:
            wrong = "; ".join((error.message, *_complaints(pair.source, pair.destination)))
    return Round(kind, ended, tuple(work.said), wrong, told)


def _complaints(*guests: LaunchedGuest) -> list[str]:
    """What QEMU says beside the trace that was switched on."""
    return [line for g in guests for line in g.stderr().splitlines() if line.startswith("qemu")]


async def status_of(monitor: Monitor) -> str:
    value = await monitor.execute("query-status", deadline=_DEADLINE_S)
    assert isinstance(value, dict)
    return str(value["status"])


async def _over(monitor: Monitor) -> str:
    until = time.monotonic() + _DEADLINE_S
    while True:
        value = await monitor.execute("query-migrate", deadline=_DEADLINE_S)
        assert isinstance(value, dict)
        if value.get("status") in _OVER or time.monotonic() > until:
            return str(value.get("status"))
        await asyncio.sleep(0.005)


async def wrong_of(pair: Pair) -> str:
    """What is not as it ought to be when the migration is over; waits for that."""
    ended = await _over(pair.at_source)
    at_source = await status_of(pair.at_source)
    if ended == "failed":
        return "" if at_source == "running" else f"it failed, and the source is {at_source}"
    if ended != "completed":
        return f"the migration is {ended} after {_DEADLINE_S:g} s"
    until = time.monotonic() + 5
    while (there := await status_of(pair.at_destination)) == "inmigrate":
        if time.monotonic() > until:
            break
        await asyncio.sleep(0.005)
    if (at_source, there) != ("postmigrate", "running"):
        return f"source {at_source}, destination {there}"
    return await _pulse_of(pair)


async def _pulse_of(pair: Pair) -> str:
    """What is wrong with it at the destination."""
    assert pair.destination.ram is not None
    with Pulse(pair.destination.ram) as pulse:
        try:
            await pulse.wait_beats(2)
        except MemListenerError as error:
            return f"the destination's pulse: {error.message}"
    return ""


# -- for people -----------------------------------------------------------------------------------


async def _soak(build: QemuBuild, accel: str, kind: str, count: int, jobs: int) -> int:
    ended: Counter[str] = Counter()
    said: Counter[str] = Counter()
    wrong = told = 0
    began = time.monotonic()
    rounds = iter(range(count))

    async def job() -> None:
        nonlocal wrong, told
        for n in rounds:
            try:
                made = await one_round(build, accel, kind)
            except Exception as error:
                made = Round(kind, "?", (), f"{type(error).__name__}: {error}")
            ended[made.ended] += 1
            said.update(set(made.said))
            wrong += bool(made.wrong)
            told += bool(made.told)
            if made.wrong or made.told:
                how = made.wrong or f"told: {made.told}"
                print(f"  {kind}, round {n}: {how}; said {made.said[-3:]}", flush=True)

    async with asyncio.TaskGroup() as group:
        for _ in range(jobs):
            group.create_task(job())
    print(
        f"{build.version} {accel} {kind:8} {count} migrations: {dict(ended)}, "
        f"wrong {wrong}, told {told} ({time.monotonic() - began:.0f} s)",
        flush=True,
    )
    for text, times in said.most_common(8):
        print(f"    {times} rounds: {text}", flush=True)
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Run it.  Returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--qemu", default="", help="a version, or its beginning")
    parser.add_argument("--accel", default="tcg")
    parser.add_argument("--jobs", type=int, default=1, help="pairs at a time")
    options = parser.parse_args(argv)
    builds = [b for b in find_qemus() if b.version.startswith(options.qemu)]
    if not builds:
        parser.error("no such QEMU here")
    wrong = 0
    for build in builds:
        for kind in options.kinds.split(","):
            wrong += asyncio.run(_soak(build, options.accel, kind, options.count, options.jobs))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
