"""`hotplug`, `unplug` and `resize` as a user runs them: documents, exit codes, how they end."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.qmp import Monitor
from qmp_memlistener.records import Recording, SummaryRecord
from tests.live.verbs_support import check_tables_fit, is_as_before, one_build
from tests.support.leftovers import enabled_events, left_behind
from tests.support.live import best_accel, booted, qmp, silenced
from tests.support.qmp_proxy import Fault, How, QmpProxy
from tests.support.verbs import Ran, Verb, run_verb, started_verb

pytestmark = pytest.mark.qemu

MIB = 1 << 20
DIMMS = ("-m", "slots=8,maxmem=8G")
NAMED = ("-uuid", "6f1d3e2a-0d3b-4c55-9d0f-0a3f5f1f7a11")
"""For a guest behind a proxy, which is known by that."""
VIRTIO_MEM = (
    *("-object", "memory-backend-ram,id=vm0-ram,size=1G"),
    *("-device", "virtio-mem-pci,id=vm0,memdev=vm0-ram,requested-size=0"),
)
KEYS = {
    *("schema", "outcome", "reason", "strategy", "phases", "stalls", "slot_ops", "guest_state"),
    *("remedy", "transitions", "notes", "probes", "placed", "interrupted"),
}
PHASE_KEYS = {"name", "start_ns", "end_ns"}
QUICK = ("--wait", "200ms", "--probes", "runstate,trace")
BARE = ("--no-trace", "--probes", "none")
HOSTILE = "a,b=c \"d\" 'e' {f} é🐑\n\t\\ ,,id=x"


def document(ran: Ran, code: int) -> dict[str, object]:
    """The one document on stdout, with exactly the keys it has to have."""
    assert ran.code == code, ran.err
    assert "error" not in ran.err
    (found,) = ran.documents
    assert found.keys() == KEYS
    assert found["schema"] == 1
    assert (found["outcome"] == "done") == (code == 0) == (found["reason"] is None)
    phases = found["phases"]
    assert isinstance(phases, list)
    for phase in phases:
        assert PHASE_KEYS <= phase.keys() <= PHASE_KEYS | {"transitions", "stalls"}
        assert phase["start_ns"] <= phase["end_ns"]
    return found


async def things(monitor: Monitor) -> set[str]:
    found = set()
    for path in ("/objects", "/machine/peripheral"):
        answer = await monitor.execute("qom-list", {"path": path})
        assert isinstance(answer, list)
        found |= {child["name"] for child in answer if child["type"].startswith("child<")}
    return found


async def status(monitor: Monitor) -> object:
    answer = await monitor.execute("query-status")
    assert isinstance(answer, dict)
    return answer["status"]


async def happens(monitor: Monitor, event: str, verb: Verb) -> None:
    """Until QEMU tells of it, which is while the verb is at work."""
    events = monitor.events()
    ended = asyncio.ensure_future(verb.process.wait())

    async def told() -> None:
        async for found in events:
            if found.name == event:
                return

    telling = asyncio.ensure_future(told())
    async with asyncio.timeout(20):
        await asyncio.wait({telling, ended}, return_when=asyncio.FIRST_COMPLETED)
    assert telling.done(), "the verb ended before"
    ended.cancel()
    events.close()


# -- what is printed -----------------------------------------------------------------------------


@one_build
@pytest.mark.asyncio
async def test_documents_and_exit_codes(build: QemuBuild, tmp_path: Path) -> None:
    file = tmp_path / "recording"
    async with (
        booted(build, best_accel(build), "pc", *DIMMS, *VIRTIO_MEM) as vm,
        qmp(vm.guest.monitors[2]) as monitor,
    ):
        before = await enabled_events(monitor)
        end = (*QUICK, "--json")
        plug = await run_verb(
            *("hotplug", vm.target, "--object", "memory-backend-ram,id=m0,size=128M"),
            *("--device", "pc-dimm,id=d0,memdev=m0", "--strategy", "pause", "-o", file, *end),
        )
        found = document(plug, 0)
        assert found["strategy"] == "pause"
        assert found["guest_state"] == {"before": "running", "after": "running"}
        ops = found["slot_ops"]
        assert isinstance(ops, list)
        (op,) = ops
        assert (op["type"], op["op"], op["size"]) == ("slot_op", "add", 128 * MIB)
        assert "vcpu_pause" in str(found["stalls"])
        recording = Recording(str(file))
        assert isinstance(list(recording)[-1], SummaryRecord)
        assert not recording.truncated

        # this guest answers for no memory
        grown = document(await run_verb("resize", vm.target, "+128M", *end), 1)
        assert grown["outcome"] == "partial"
        assert {"qml-dimm0", "qml-mem0"} < await things(monitor)
        # 64 MiB at boot, and two DIMMs
        same = document(await run_verb("resize", vm.target, "=320M", *end), 0)
        assert same["notes"] == ["the guest has that much already"]
        for args, outcome in (
            (("resize", "+128M", "--strategy", "hole"), "partial"),
            (("resize", "-64M", "--strategy", "hole"), "partial"),
            (("resize", "+8G", "--strategy", "hole"), "refused"),
            (("resize", "-128M"), "partial"),
            (("unplug", "d0", "--backends"), "partial"),
            (("unplug", "d9"), "refused"),
        ):
            ran = await run_verb(args[0], vm.target, *args[1:], *end)
            assert document(ran, 1)["outcome"] == outcome
        assert await status(monitor) == "running"
        assert await is_as_before(vm, monitor, before)


@one_build
@pytest.mark.asyncio
async def test_in_words_on_a_terminal(build: QemuBuild, tmp_path: Path) -> None:
    quiet = silenced(build, tmp_path)
    async with booted(build, best_accel(build), "pc", *DIMMS, monitors=4, binary=quiet) as vm:
        await check_tables_fit(
            *("hotplug", vm.target, "--object", "memory-backend-ram,id=m0,size=128M"),
            *("--device", "pc-dimm,id=d0,memdev=m0", "--strategy", "pause", *QUICK),
        )
        ran = await run_verb("resize", vm.target, "-256M", *QUICK)
        assert ran.code == 1
        assert ran.lines[0] == "refused: resize -256M (strategy direct)"
        assert "make up 256 MiB" in ran.lines[1]
        assert ran.lines[2].startswith("  remedy: ")
        ran = await run_verb("resize", vm.target, "+128M", *QUICK)
        assert ran.code == 1
        assert ran.lines[0] == "partial: resize +128M (strategy direct)"
        assert "128 MiB were given, and the guest has not answered" in ran.lines[1]
        assert "  qml-dimm0: pc-dimm, slot 1, node 0, memory 0x1" in ran.out
        assert "  guest: running before, running after" in ran.lines
        assert "map changed by QEMU" in ran.out
        assert "1 slot operation" in ran.out


# -- names ---------------------------------------------------------------------------------------


@one_build
@pytest.mark.asyncio
async def test_hostile_properties_arrive_as_they_are(build: QemuBuild, tmp_path: Path) -> None:
    """In option syntax and as JSON; what QEMU has then is what was given."""
    path = f"{tmp_path}/{HOSTILE}"
    async with (
        booted(build, best_accel(build), "pc", *DIMMS) as vm,
        qmp(vm.guest.monitors[2]) as monitor,
    ):
        text = path.replace(",", ",,")
        ran = await run_verb(
            *("hotplug", vm.target, "--object"),
            f"memory-backend-file,id=m0,size=128M,share=on,mem-path={text}",
            *("--device", "pc-dimm,id=d0,memdev=m0", "--json", *QUICK),
        )
        document(ran, 0)
        where = {"path": "/objects/m0", "property": "mem-path"}
        assert await monitor.execute("qom-get", where) == path
        before = await things(monitor)
        for name in ('a"b', "a\nb", "é", "x" * 4000, "d0/virtio-backend", "/machine/peripheral/d0"):
            ran = await run_verb("unplug", vm.target, name, *QUICK, *BARE)
            assert ran.code == 1
            assert ran.lines[0].startswith("refused: ")
            assert "".join(ran.lines).isprintable()
        assert await things(monitor) == before


# -- how they end --------------------------------------------------------------------------------


@one_build
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.asyncio
async def test_interrupted_while_it_waits(build: QemuBuild, number: signal.Signals) -> None:
    """The guest is waited for no longer, and what came of it until then is told."""
    async with (
        booted(build, best_accel(build), "pc", "-device", "virtio-rng-pci,id=r0", monitors=4) as vm,
        qmp(vm.guest.monitors[3]) as monitor,
    ):
        events = await enabled_events(monitor)
        async with started_verb("unplug", vm.target, "r0", "--wait", "60s", "--json") as verb:
            await verb.told("waiting for the guest")
            ran = await verb.signalled(number)
        assert ran.err.splitlines()[-1] == "interrupted"
        told = document(ran, 130)
        assert told["outcome"] == "partial"
        assert "r0 is still there" in str(told["reason"])
        assert "interrupted" in str(told["notes"])
        assert "r0" in await things(monitor)
        assert await status(monitor) == "running"
        assert await is_as_before(vm, monitor, events)


@one_build
@pytest.mark.asyncio
async def test_interrupted_before_it_waits(build: QemuBuild) -> None:
    """What QEMU was told stays, with what it stands on; nothing else does."""
    async with (
        booted(build, best_accel(build), "pc", *DIMMS, monitors=4) as vm,
        qmp(vm.guest.monitors[3]) as monitor,
    ):
        events = await enabled_events(monitor)
        before = await things(monitor)
        waiting = ("--strategy", "pause", "--wait", "60s", "--json")
        async with started_verb("resize", vm.target, "+128M", *waiting) as verb:
            await happens(monitor, "RESUME", verb)
            ran = await verb.signalled(signal.SIGINT)
        assert ran.code == 130
        assert ran.err.splitlines()[-1] == "interrupted"
        assert await things(monitor) - before == {"qml-dimm0", "qml-mem0"}
        assert await status(monitor) == "running"
        assert await is_as_before(vm, monitor, events)


@one_build
@pytest.mark.asyncio
async def test_qemu_killed_in_the_middle(build: QemuBuild, tmp_path: Path) -> None:
    file = tmp_path / "recording"
    async with (
        booted(build, best_accel(build), "pc", *DIMMS, monitors=4) as vm,
        qmp(vm.guest.monitors[3]) as monitor,
    ):
        waiting = ("--strategy", "pause", "--wait", "60s", "--json", "-o", file)
        async with started_verb("resize", vm.target, "+128M", *waiting) as verb:
            await happens(monitor, "RESUME", verb)
            os.kill(vm.guest.pid, signal.SIGKILL)
            ran = await verb.end()
        assert (ran.code, ran.out) == (3, "")
        (error,) = [line for line in ran.err.splitlines() if line.startswith("error: ")]
        assert str(vm.guest.monitors[0]) in error
        assert "Traceback" not in ran.err
        assert not Recording(str(file)).truncated
        assert left_behind(vm.guest.pid) == []


@one_build
@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault("device_add", 1, How.REFUSED), 1),
        (Fault("device_add", 1, How.CUT_BEFORE), 3),
        (Fault("object-add", 1, How.CUT_AFTER), 3),
        (Fault("query-memory-devices", 1, How.CUT_BEFORE), 3),
    ],
    ids=str,
)
@pytest.mark.asyncio
async def test_a_command_that_fails(build: QemuBuild, fault: Fault, code: int) -> None:
    async with (
        booted(build, best_accel(build), "pc", *DIMMS, *NAMED) as vm,
        qmp(vm.guest.monitors[1]) as monitor,
        QmpProxy.on(vm.guest.monitors[0]) as proxy,
    ):
        before = await things(monitor)
        proxy.begin(fault)
        ran = await run_verb(
            *("resize", proxy.target, "+128M", "--strategy", "pause", "--json", *BARE),
            *("--guard-monitor", f"unix:{vm.guest.monitors[2]}"),
        )
        assert proxy.hits == 1
        if code == 1:
            (said,) = ran.documents
            assert (ran.code, said["outcome"]) == (1, "failed")
            assert "device_add" in str(said["reason"])
        else:
            assert ran.out == ""
            assert ran.code == 3
            assert "\nerror: " in f"\n{ran.err}"
            assert "Traceback" not in ran.err
        assert await things(monitor) == before
        async with asyncio.timeout(10):
            while await status(monitor) != "running":  # noqa: ASYNC110 - the guard resumes it
                await asyncio.sleep(0.05)
