"""Ends of `hotplug`, `unplug` and `resize`: killed and interrupted at any moment, long pauses, and
what the next verb says of it.

What they print when all goes well is in `test_verbs_updates`.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from pathlib import Path

import pytest

from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.qmp import Monitor
from qmp_memlistener.updates.pause.guard_notes import all_notes
from tests.live.verbs_support import one_build
from tests.support.leftovers import left_behind
from tests.support.live import best_accel, booted, builds, qmp
from tests.support.verbs import Ran, run_verb, started_verb
from tools.soak_interrupt import bench, one_round

pytestmark = pytest.mark.qemu

BARE = ("--no-trace", "--probes", "none")
TARDY_S = 0.6
"""A block device reads its first sector while it is plugged (hd_geometry_guess, hw/block), and
holds up QEMU's main thread meanwhile."""
TARDY = (
    *("--blockdev", f"null-co,node-name=b0,size=1M,read-zeroes=on,latency-ns={TARDY_S * 1e9:.0f}"),
    *("--device", "virtio-blk-pci,id=d0,drive=b0", "--strategy", "pause"),
)


async def status(monitor: Monitor) -> str:
    answer = await monitor.execute("query-status", deadline=10.0)
    assert isinstance(answer, dict)
    return str(answer["status"])


async def runs(monitor: Monitor) -> None:
    async with asyncio.timeout(TARDY_S + 5):
        while await status(monitor) != "running":  # noqa: ASYNC110 - an event may be past
            await asyncio.sleep(0.02)


async def made(monitor: Monitor) -> set[str]:
    """What an update of these tests makes, as far as it is there."""
    found = set()
    for path in ("/objects", "/machine/peripheral"):
        answer = await monitor.execute("qom-list", {"path": path})
        assert isinstance(answer, list)
        found |= {str(child["name"]) for child in answer}
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    assert isinstance(nodes, list)
    found |= {str(node["node-name"]) for node in nodes}
    return found & {"b0", "d0", "qml-dimm0", "qml-mem0"}


async def stopped_by(monitor: Monitor, *verb: str, number: int) -> Ran:
    """Run a verb, send the signal as soon as it has stopped the guest."""
    with monitor.events() as events:
        async with started_verb(*verb) as process:
            async with asyncio.timeout(20):
                async for event in events:
                    if event.name == "STOP":
                        break
            return await process.signalled(number)
    raise AssertionError


# -- killed --------------------------------------------------------------------------------------


@builds()
@pytest.mark.asyncio
async def test_the_next_verbs_tell_what_the_guard_did_for_a_killed_one(build: QemuBuild) -> None:
    async with (
        booted(build, best_accel(build), monitors=4) as vm,
        qmp(vm.guest.monitors[3]) as monitor,
    ):
        verb = ("hotplug", vm.target, *TARDY, *BARE)
        ran = await stopped_by(monitor, *verb, number=signal.SIGKILL)
        assert ran.code == -signal.SIGKILL
        await runs(monitor)
        told = f"the resume guard resumed QEMU (pid {vm.guest.pid})"
        async with asyncio.timeout(10):
            # the note is there from before the pause, and says so a moment after the resumption
            while not any(told in note.text for note in all_notes()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        as_json, in_words = await asyncio.gather(run_verb("doctor", "--json"), run_verb("doctor"))
        (document,) = as_json.documents
        assert told in str(document["notes"])
        assert told in in_words.out
        # which is not to take it
        shown = await run_verb("show", vm.target, "--json")
        assert shown.code == 0
        assert told in shown.err
        assert len(shown.documents) == 1, "stdout has the document alone"
        again = await run_verb("show", vm.target)
        assert again.err == "", "it is told once"
        assert left_behind(vm.guest.pid) == []
        assert await made(monitor) in ({"b0"}, {"b0", "d0"})


# -- interrupted ---------------------------------------------------------------------------------


@builds()
@pytest.mark.asyncio
async def test_interrupted_in_its_pause(build: QemuBuild) -> None:
    """What QEMU has already been sent is carried out: the device stands, with what it stands on."""
    async with (
        booted(build, best_accel(build), monitors=4) as vm,
        qmp(vm.guest.monitors[3]) as monitor,
    ):
        verb = ("hotplug", vm.target, *TARDY, *BARE, "--json")
        ran = await stopped_by(monitor, *verb, number=signal.SIGINT)
        assert ran.code == 130
        assert ran.err.endswith("interrupted\n")
        (told,) = ran.documents
        assert (told["outcome"], told["interrupted"]) == ("partial", True)
        assert "the guest's part was not waited for" in str(told["reason"])
        assert "'id': 'd0'" in str(told["placed"])
        assert await status(monitor) == "running"
        assert await made(monitor) == {"b0", "d0"}
        assert left_behind(vm.guest.pid) == []


@one_build
@pytest.mark.asyncio
async def test_interrupted_at_any_moment(build: QemuBuild) -> None:
    """What is left in the guest was told; it runs.  `tools/soak_interrupt.py` does it often."""
    async with bench(build, "q35", random.randrange(1 << 32)) as guest:
        for verb in ("hotplug", "resize", "unplug") * 2:
            found = await one_round(guest, verb)
            assert found.wrong == []


# -- long pauses ---------------------------------------------------------------------------------


@builds()
@pytest.mark.asyncio
async def test_a_pause_that_is_too_long_is_ended_and_told(build: QemuBuild) -> None:
    async with (
        booted(build, best_accel(build), monitors=4) as vm,
        qmp(vm.guest.monitors[3]) as monitor,
    ):
        ran = await run_verb(
            *("hotplug", vm.target, *TARDY, "--max-pause", "100ms", "--wait", "100ms"),
            *("--probes", "runstate", "--no-trace", "--json"),
        )
        (document,) = ran.documents
        assert (document["outcome"], ran.code) == ("done", 0), document
        (pause,) = (s for s in document["stalls"] if s["kind"] == "vcpu_pause")  # type: ignore[attr-defined]  # JSON
        assert pause["at_most_ns"] > TARDY_S * 0.9e9
        assert await status(monitor) == "running"
        assert left_behind(vm.guest.pid) == [], "who was there needs no note"


# -- QEMU goes -----------------------------------------------------------------------------------


@builds()
@pytest.mark.asyncio
async def test_qemu_is_killed_in_the_pause(build: QemuBuild, tmp_path: Path) -> None:
    file = tmp_path / "recording"
    async with (
        booted(build, best_accel(build), monitors=4) as vm,
        qmp(vm.guest.monitors[3]) as monitor,
    ):
        with monitor.events() as events:
            async with started_verb("hotplug", vm.target, *TARDY, "--json", "-o", file) as verb:
                async with asyncio.timeout(20):
                    async for event in events:
                        if event.name == "STOP":
                            break
                os.kill(vm.guest.pid, signal.SIGKILL)
                ran = await verb.end()
        assert (ran.code, ran.out) == (3, ""), ran
        assert "error: " in ran.err
        assert "Traceback" not in ran.err
        report = await run_verb("report", file, "--json")
        assert report.code == 0
        assert report.documents[0]["truncated"] is False


# -- names ---------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_names_that_no_device_can_have(tmp_path: Path) -> None:
    """Nothing listens to them: the monitor has no client meanwhile."""
    path = tmp_path / "qmp"
    clients = 0

    async def client(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal clients
        clients += 1
        writer.close()

    server = await asyncio.start_unix_server(client, path)
    async with server:
        for name in ("", "a b", 'a"b', "a,,b", "a\nb", "é", "x" * 5000):
            ran = await run_verb("hotplug", path, "--device", f"virtio-rng-pci,id={name}")
            ran.check_error(2, "id ", "remedy: ")
            assert ran.out == ""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "qmp_memlistener", "unplug", str(path), b"d\xff", "--json"),
            stderr=asyncio.subprocess.PIPE,
        )
        _, err = await process.communicate()
        assert process.returncode == 2
        assert b"Traceback" not in err
    assert clients == 0
