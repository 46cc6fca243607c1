"""What is left when agent and guard are killed at once: told by every verb, and put right."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.host.state import directories
from qmp_memlistener.qmp import Monitor
from tests.support.live import QEMUS, builds, qmp
from tests.support.verbs import run_verb
from tools.soak_guard import Watcher, gone, watched

pytestmark = [pytest.mark.qemu, pytest.mark.alone, pytest.mark.asyncio]

T = TypeVar("T")
ONE = builds(QEMUS[:1])
HOLDING = """
import asyncio, sys
from qmp_memlistener.qmp import Monitor, UnixTarget
from qmp_memlistener.updates.pause.guard import ResumeGuard
from qmp_memlistener.updates.pause import paused_guest

async def main(monitor, guarded):
    async with (
        await Monitor.connect(UnixTarget(monitor)) as monitor,
        await ResumeGuard.start([UnixTarget(guarded)], max_pause_s=60) as guard,
    ):
        async with paused_guest(monitor, guard, deadline=10):
            print(guard.pid, flush=True)
            await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""
PAUSED = "was paused by an agent of ours"


async def noted_as_stopped(agent: int) -> None:
    """The guard has seen that the vCPUs sleep: its note says so, and stays as it is."""
    before: list[bytes] = []
    async with asyncio.timeout(10):
        while True:
            notes = [place.read(name) for place in directories() for name in place.names()]
            now = [n for n in notes if n and b'"stopped"' in n and b"%d" % agent in n]
            if now and now == before:
                return
            before = now
            await asyncio.sleep(0.05)


@asynccontextmanager
async def killed_in_a_pause(build: QemuBuild) -> AsyncIterator[Watcher]:
    """A guest that an agent has paused; agent and guard have been killed."""
    async with watched(build, "tcg") as watcher:
        agent = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", HOLDING, *map(str, watcher.guest.monitors[:2])),
            stdout=asyncio.subprocess.PIPE,
        )
        assert agent.stdout is not None
        guard = int(await asyncio.wait_for(agent.stdout.readline(), 20))
        assert await watcher.status() == "paused"
        await noted_as_stopped(agent.pid)
        for pid in (agent.pid, guard):
            os.kill(pid, signal.SIGSTOP)  # neither sees the other's end
        for pid in (agent.pid, guard):
            os.kill(pid, signal.SIGKILL)
        await agent.wait()
        assert await gone(guard)
        assert await watcher.status() == "paused"
        yield watcher


async def doctor(*args: str) -> tuple[list[str], list[str], str]:
    """What is left over, what was cleaned, and what was said beside."""
    ran = await run_verb("doctor", "--json", *args)
    (document,) = ran.documents
    left, cleaned = document["leftovers"], document["cleaned"]
    assert isinstance(left, list)
    assert isinstance(cleaned, list)
    return [str(each["what"]) for each in left], cleaned, ran.err


@ONE
async def test_a_guest_left_paused_is_told_and_resumed(build: QemuBuild) -> None:
    async with killed_in_a_pause(build) as watcher:
        assert PAUSED in (await run_verb("list")).out
        shown = await run_verb("show", f"unix:{watcher.guest.monitors[0]}")
        assert PAUSED in shown.err
        assert "doctor --clean" in shown.err
        left, cleaned, _ = await doctor()
        assert [PAUSED in text for text in left] == [True]
        assert cleaned == []
        assert await watcher.status() == "paused"
        left, cleaned, said = await doctor("--clean")
        assert (len(cleaned), left) == (1, []), said
        assert await watcher.status() == "running"
        assert PAUSED not in (await run_verb("list")).out


@ONE
async def test_who_paused_it_on_purpose_afterwards_is_respected(build: QemuBuild) -> None:
    async with killed_in_a_pause(build) as watcher:
        await watcher.monitor.execute("cont")
        await watcher.monitor.execute("stop")
        left, cleaned, said = await doctor("--clean")
        assert (len(left), cleaned) == (1, [])
        assert "another client may have resumed it" in said
        assert await watcher.status() == "paused"
        await watcher.monitor.execute("cont")
        assert (await doctor())[0] == [], "it runs: the pause is over"


@ONE
async def test_a_guest_in_another_state_is_left_alone(build: QemuBuild, tmp_path: Path) -> None:
    async with killed_in_a_pause(build) as watcher:
        await watcher.monitor.close()
        async with qmp(watcher.guest.monitors[2]) as monitor:
            await monitor.execute("migrate", {"uri": f"exec:cat > {tmp_path}/state"})
        await watcher.monitor.reconnect()
        await until(lambda: watcher.status(), "postmigrate")
        left, cleaned, said = await doctor("--clean")
        assert (len(left), cleaned) == (1, [])
        assert "postmigrate" in said
        assert await watcher.status() == "postmigrate"


async def until(ask: Callable[[], Awaitable[T]], wanted: T) -> None:
    """Nothing tells it: ask again and again."""
    async with asyncio.timeout(20):
        while True:
            if await ask() == wanted:
                return
            await asyncio.sleep(0.005)


async def is_making() -> bool:
    """A backend is on its way to QEMU."""
    names = [name for place in directories() for name in place.names()]
    if not any(".made-" in name for name in names):
        return False
    await asyncio.sleep(0.05)
    return True


async def objects(monitor: Monitor) -> set[str]:
    found = await monitor.execute("qom-list", {"path": "/objects"})
    assert isinstance(found, list)
    return {str(child["name"]) for child in found} - {"type"}


@ONE
async def test_a_backend_that_was_being_made_is_told_and_removed(build: QemuBuild) -> None:
    async with watched(build, "tcg", "-m", "slots=4,maxmem=4G") as watcher:
        before = await objects(watcher.monitor)
        slow = "memory-backend-ram,id=m0,size=512M,prealloc=on"
        verb = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "qmp_memlistener", "hotplug"),
            *(f"unix:{watcher.guest.monitors[0]}", "--device", "pc-dimm,id=d0,memdev=m0"),
            *("--object", slow, "--probes", "none"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        await until(is_making, True)
        verb.kill()
        await verb.wait()
        # what QEMU has begun it carries out
        await until(lambda: objects(watcher.monitor), {*before, "m0"})
        assert "object m0 (memory-backend-ram)" in (await run_verb("list")).out
        shown = await run_verb("show", f"unix:{watcher.guest.monitors[0]}")
        assert "object m0 (memory-backend-ram) is left over" in shown.err
        told = (await run_verb("doctor")).out
        assert "remedy: `qmp-memlistener doctor --clean`\n" in told, "an attach leaves it there"
        left, cleaned, _ = await doctor("--clean")
        assert left == []
        assert any("object m0 (memory-backend-ram)" in text for text in cleaned)
        assert await objects(watcher.monitor) == before


@ONE
async def test_a_backend_in_use_is_not_removed(build: QemuBuild) -> None:
    async with watched(build, "tcg", "-m", "slots=4,maxmem=4G") as watcher:
        target = f"unix:{watcher.guest.monitors[0]}"
        plug = ("--device", "pc-dimm,id=d0,memdev=m0")
        memory = ("--object", "memory-backend-ram,id=m0,size=128M")
        ran = await run_verb("hotplug", target, *plug, *memory, "--probes", "none", "--wait", "0.1")
        assert "done" in ran.out, ran.err
        assert "m0" in await objects(watcher.monitor)
        assert (await doctor("--clean"))[:2] == ([], [])
        assert "m0" in await objects(watcher.monitor)
