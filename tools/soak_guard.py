"""The resume guard at random moments: does the guest run again, every time, and how soon?

    python -m tools.soak_guard [--count 200] [--ways kill,hang,cut,guard] [--qemu 7.2] [--accel tcg]

Each round starts an agent that pauses a throw-away guest over and over (one write, one command
after the other, a block of code), and at a random moment

    kill    kills the agent (SIGKILL)
    hang    stops it (SIGSTOP)
    cut     cuts its connection to QEMU
    guard   kills its guard (SIGKILL)

Afterwards the guest must run within max-pause + 0.5 s, and the guard's process must be gone.
For each way: how often the moment hit a pause, how often the guard acted, and how long the guest
stood still after the moment.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from qmp_memlistener.errors import MemListenerError
from qmp_memlistener.guests import GuestSpec, LaunchedGuest, QemuBuild, find_qemus, launch
from qmp_memlistener.host.processes import Process
from qmp_memlistener.qmp import Command, Monitor, MonitorEvent, UnixTarget
from qmp_memlistener.qmp.freeze import process_key
from qmp_memlistener.updates.pause import paused_guest, run_paused
from qmp_memlistener.updates.pause.guard import ResumeGuard
from qmp_memlistener.updates.pause.guard_notes import take_notes

__all__ = ["MODES", "WAYS", "Round", "Watcher", "gone", "one_round", "watched"]

WAYS = ("kill", "hang", "cut", "guard")
MODES = ("write", "steps", "block")
SLACK_S = 0.5
_MOMENT_S = 0.12
_BLOCK_S = 0.03
_DEADLINE_S = 10.0
_MEMORY = {"qom-type": "memory-backend-ram", "id": "soak", "size": 24 << 20, "prealloc": True}
_UPDATE = (
    Command("object-del", {"id": "soak"}),  # a killed agent may have left it
    Command("object-add", _MEMORY),
    Command("object-del", {"id": "soak"}),
)


@dataclass(frozen=True, slots=True)
class Round:
    """`paused`: the guest stood still at the moment.  `stood_s`: how long it took until it ran for
    good.  `said` is what the agent said at its end.  `wrong` is empty when all was well."""

    way: str
    mode: str
    paused: bool
    acted: bool
    stood_s: float
    said: str
    wrong: str


# -- the agent, a process of its own --------------------------------------------------------------


async def _agent(target: str, guard_target: str, max_pause_s: float, mode: str) -> None:
    async with (
        await Monitor.connect(UnixTarget(target)) as monitor,
        await ResumeGuard.start([UnixTarget(guard_target)], max_pause_s=max_pause_s) as guard,
    ):
        threading.Thread(target=_cut_when_told, args=(target,), daemon=True).start()
        print(guard.pid, flush=True)
        try:
            while True:
                if mode == "block":
                    async with paused_guest(monitor, guard, deadline=_DEADLINE_S):
                        await asyncio.sleep(_BLOCK_S)
                    continue
                run = await run_paused(
                    monitor, guard, _UPDATE, deadline=_DEADLINE_S, pipelined=mode == "write"
                )
                if run.note is not None:
                    print(run.note, flush=True)
        except MemListenerError as error:
            print(error.message, flush=True)


def _cut_when_told(path: str) -> None:
    """Shut the connection to `path` down as soon as standard input has a line."""
    if not sys.stdin.readline():
        return
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            sock = socket.socket(fileno=os.dup(number))
        except OSError:
            continue
        try:
            if sock.getpeername() == path:
                sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        finally:
            sock.close()


# -- what is seen of the guest --------------------------------------------------------------------


class Watcher:
    """A guest, and a monitor connection that sees when it stops and resumes."""

    def __init__(self, guest: LaunchedGuest, monitor: Monitor) -> None:
        self.guest = guest
        self.monitor = monitor
        self.stopped_ns = 0
        self.resumed_ns = 0
        monitor.subscribe(self._on_event)

    @property
    def is_paused(self) -> bool:
        return self.stopped_ns > self.resumed_ns

    async def status(self) -> str:
        value = await self.monitor.execute("query-status", deadline=_DEADLINE_S)
        assert isinstance(value, dict)
        return str(value["status"])

    def _on_event(self, event: MonitorEvent) -> None:
        if event.name == "STOP":
            self.stopped_ns = event.t_ns
        elif event.name == "RESUME":
            self.resumed_ns = event.t_ns


@asynccontextmanager
async def watched(build: QemuBuild, accel: str, *args: str) -> AsyncIterator[Watcher]:
    """A guest with three monitors: for agents, for their guards, for us."""
    spec = GuestSpec(accel=accel, memory=32 << 20, shared_memory=False, monitors=3, args=args)
    async with (
        launch(spec.on(build)) as guest,
        await Monitor.connect(UnixTarget(str(guest.monitors[2]))) as monitor,
    ):
        yield Watcher(guest, monitor)


async def one_round(watcher: Watcher, way: str, max_pause_s: float, mode: str) -> Round:
    """Start an agent, do to it what `way` says at a random moment, and see what becomes of the
    guest, of the guard and of the agent."""
    guest = watcher.guest
    agent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tools.soak_guard", "--agent"),
        *(str(guest.monitors[0]), str(guest.monitors[1]), str(max_pause_s), mode),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    assert agent.stdin is not None
    assert agent.stdout is not None
    try:
        guard = int(await asyncio.wait_for(agent.stdout.readline(), 20))
        await asyncio.sleep(random.uniform(0, _MOMENT_S))
        paused, moment = watcher.is_paused, time.monotonic_ns()
        if way == "cut":
            agent.stdin.write(b"cut\n")
        else:
            number = signal.SIGSTOP if way == "hang" else signal.SIGKILL
            os.kill(guard if way == "guard" else agent.pid, number)
        wrong = await _until_it_runs(watcher, moment, max_pause_s)
        ran_ns = max(watcher.resumed_ns, moment)
        if way == "hang":
            # whatever it was about to do when it was stopped, it must not do any more
            agent.kill()
        said = (await asyncio.wait_for(agent.stdout.read(), _DEADLINE_S)).decode()
        await agent.wait()
        if not await gone(guard):
            wrong = wrong or "the guard did not end"
    finally:
        if agent.returncode is None:
            agent.kill()
            await agent.wait()
    if not wrong and (status := await watcher.status()) != "running":
        wrong = f"the guest was {status} after all had ended"
    owner = Process.read(guest.pid)
    assert owner is not None
    notes = take_notes(process_key(owner))
    acted = bool(notes) or "the resume guard resumed" in said
    return Round(way, mode, paused, acted, (ran_ns - moment) / 1e9, said, wrong)


async def _until_it_runs(watcher: Watcher, moment: int, max_pause_s: float) -> str:
    """Until the guest has run for a tenth of a second, and what went wrong."""
    limit = moment + int((max_pause_s + SLACK_S) * 1e9)
    ran = 0
    while True:
        status = await watcher.status()
        now = time.monotonic_ns()
        if status == "running" and not watcher.is_paused:
            ran = ran or now
            if now - ran > 100_000_000:
                return ""
        else:
            ran = 0
            if now > limit:
                return f"the guest is {status} after {(now - moment) / 1e9:.2f} s"
        await asyncio.sleep(0.01)


async def gone(pid: int) -> bool:
    """The process ends within a few seconds."""
    until = time.monotonic() + 5
    while Process.read(pid) is not None:
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.01)
    return True


# -- for people -----------------------------------------------------------------------------------


async def _soak(
    build: QemuBuild, accel: str, ways: Sequence[str], count: int, max_pause_s: float
) -> int:
    wrong = 0
    async with watched(build, accel) as watcher:
        for way in ways:
            rounds = []
            for n in range(count):
                rounds.append(await one_round(watcher, way, max_pause_s, MODES[n % len(MODES)]))
                if rounds[-1].wrong:
                    print(f"  {way}, round {n}: {rounds[-1]}", flush=True)
            wrong += sum(bool(r.wrong) for r in rounds)
            stood = sorted(r.stood_s for r in rounds)
            paused, acted = sum(r.paused for r in rounds), sum(r.acted for r in rounds)
            print(
                f"{build.version} {accel} {way:6} {count} moments: "
                f"{paused} in a pause, guard acted {acted}, "
                f"stood still p50 {stood[len(stood) // 2]:.3f} s, max {stood[-1]:.3f} s "
                f"(allowed {max_pause_s + SLACK_S:g}), wrong {sum(bool(r.wrong) for r in rounds)}",
                flush=True,
            )
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Run it.  Returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--agent", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--qemu", default="", help="a version, or its beginning")
    parser.add_argument("--accel", default="tcg")
    parser.add_argument("--max-pause", type=float, default=2.0)
    options = parser.parse_args(argv)
    if options.agent:
        target, guard_target, max_pause, mode = options.agent
        asyncio.run(_agent(target, guard_target, float(max_pause), mode))
        return 0
    builds = [b for b in find_qemus() if b.version.startswith(options.qemu)]
    if not builds:
        parser.error("no such QEMU here")
    ways = options.ways.split(",")
    wrong = 0
    for build in builds:
        wrong += asyncio.run(_soak(build, options.accel, ways, options.count, options.max_pause))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
