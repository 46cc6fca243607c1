"""`watch` as a user runs it: what it prints, and how it ends, whatever the cause."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from qmp_memlistener.errors import TargetLost
from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.records import Recording, TransitionRecord
from tests.live.verbs_support import in_time, is_as_before, one_build, watched
from tests.support.leftovers import enabled_events, file_has, left_behind
from tests.support.live import best_accel, booted, builds, cases, qmp, silenced
from tests.support.verbs import started_verb

pytestmark = pytest.mark.qemu

TRANSITION_KEYS = {
    *("schema", "type", "seq", "t_ns", "cause", "removed", "added"),
    *("holes_punched", "holes_filled"),
}
SLOT_OP_KEYS = {
    *("type", "t_ns", "as_id", "slot", "op", "gpa", "size", "flags", "ret"),
    *("predicted", "transition"),
}


@cases()
@pytest.mark.asyncio
async def test_watch_prints_records_and_ends_after_a_count(build: QemuBuild, accel: str) -> None:
    async with booted(build, accel) as vm, qmp(vm.guest.monitors[1]) as monitor:
        before = await enabled_events(monitor)
        async with watched(vm, "--json", "--count", "3") as watch:
            await vm.toggle(10)
            ran = await watch.end()
        assert await is_as_before(vm, monitor, before)
    assert (ran.code, ran.err) == (0, "")
    records = ran.documents
    assert all(r["schema"] == 1 for r in records)
    assert records[0]["type"] == "header"
    assert records[0]["qemu_version"] == build.version
    assert records[0]["accel"] == accel
    (first_map,) = (r for r in records if r["type"] == "map")
    assert first_map["address_space"] == "memory"
    transitions = [r for r in records if r["type"] == "transition"]
    assert [t["seq"] for t in transitions] == [1, 2, 3]
    for t in transitions:
        assert t.keys() >= TRANSITION_KEYS
    ops = [r for r in records if r["type"] == "slot_op"]
    for op in ops:
        assert op.keys() >= SLOT_OP_KEYS
        assert op["predicted"] is (accel == "tcg")
        assert op["op"] in ("add", "delete", "flags")
    # The last transition is complete.  TCG has operations to predict only where the map is known.
    told = {op["transition"] for op in ops}
    assert told == {1, 2, 3} if accel == "kvm" else told <= {1, 2, 3}


@builds()
@pytest.mark.asyncio
async def test_watch_in_words(build: QemuBuild) -> None:
    """By process id, until the time is over."""
    accel = best_accel(build)
    async with booted(build, accel) as vm:
        pid = f"pid:{vm.guest.pid}"
        async with started_verb("watch", pid, "--for", "700ms") as watch:
            await watch.ready()
            await vm.open_pam()
            line = await watch.until("hole filled")
            assert line.split() == [
                "hole",
                "filled",
                "pc.ram",
                "0xf0000+64",
                "KiB",
                "behind",
                "pc.bios",
            ]
            await watch.until("0x100000+63 MiB")
            ran = await watch.end()
    assert (ran.code, ran.err) == (0, "")
    assert ran.lines[0].startswith(f"QEMU {build.version}, machine pc-i440fx-")
    assert f"accelerator {accel}" in ran.lines[0]
    assert "every slot operation" in ran.lines[1]
    assert ("(predicted)" in ran.out) == (accel == "tcg")


@one_build
@pytest.mark.asyncio
async def test_watch_without_a_trace(build: QemuBuild) -> None:
    async with booted(build, best_accel(build)) as vm, qmp(vm.guest.monitors[1]) as monitor:
        before = await enabled_events(monitor)
        async with watched(vm, "--no-trace", "--probes", "none", "--count", "1") as watch:
            assert await enabled_events(monitor) == before
            await vm.open_pam()
            ran = await watch.end()
    assert ran.code == 0
    assert "short-lived holes may be missed" in ran.lines[1]
    assert "(predicted)" in ran.out


@builds()
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "quit"])
@pytest.mark.asyncio
async def test_watch_on_a_guest_that_ends(build: QemuBuild, how: str, tmp_path: Path) -> None:
    log = silenced(build, tmp_path) if how == "SIGTERM" else build
    async with (
        booted(build, best_accel(build), binary=log) as vm,
        qmp(vm.guest.monitors[1]) as monitor,
        watched(vm) as watch,
    ):
        await vm.toggle(6)
        start = time.monotonic()
        if how == "quit":
            with contextlib.suppress(TargetLost):
                await monitor.execute("quit")
        else:
            os.kill(vm.guest.pid, signal.Signals[how])
        ran = await watch.end()
        assert time.monotonic() - start < in_time()
        ran.check_error(3)
        assert str(vm.guest.monitors[0]) in ran.err
        assert "#6 " in ran.out  # what it did last is told
        assert left_behind(vm.guest.pid) == []


@one_build
@pytest.mark.asyncio
async def test_a_guest_that_cannot_be_put_back_is_told_and_the_next_attach_does_it(
    build: QemuBuild,
) -> None:
    async with booted(build, best_accel(build)) as vm, qmp(vm.guest.monitors[1]) as monitor:
        before = await enabled_events(monitor)
        async with watched(vm, "--probes", "none") as watch:
            vm.guest.process.send_signal(signal.SIGSTOP)
            watch.process.send_signal(signal.SIGINT)
            ran = await watch.end()
            vm.guest.process.send_signal(signal.SIGCONT)
        assert ran.code == 1
        assert "error: the guest was not put back as it was: the guest's trace events" in ran.err
        assert "remedy: the next attach does that" in ran.err
        assert "not put back: " in ran.out
        assert await enabled_events(monitor) != before
        async with watched(vm, "--probes", "none") as watch:
            await watch.signalled(signal.SIGINT)
        assert await is_as_before(vm, monitor, before)


@one_build
@pytest.mark.parametrize(
    ("verb", "number"),
    [
        ("watch", signal.SIGINT),
        ("record", signal.SIGTERM),
        pytest.param("watch", signal.SIGTERM, marks=pytest.mark.full),
        pytest.param("record", signal.SIGINT, marks=pytest.mark.full),
    ],
)
@pytest.mark.asyncio
async def test_a_signal_ends_cleanly(
    build: QemuBuild, verb: str, number: signal.Signals, tmp_path: Path
) -> None:
    file = tmp_path / "r.jsonl"
    args = ("-o", file, "--json") if verb == "record" else ()
    async with booted(build, best_accel(build)) as vm, qmp(vm.guest.monitors[1]) as monitor:
        before = await enabled_events(monitor)
        async with started_verb(verb, vm.target, *args) as running:
            if verb == "watch":
                await running.ready()
            else:
                await file_has(file, b'"type":"map"')
            await vm.toggle(4)
            running.process.send_signal(number)
            ran = await running.end()
        assert (ran.code, ran.err) == (0, "")
        assert ran.seconds < in_time()
        assert await is_as_before(vm, monitor, before)
        if verb == "record":
            (document,) = ran.documents
            found = [r for r in Recording(str(file)) if isinstance(r, TransitionRecord)]
            assert document["transitions"] == len(found)
            assert not Recording(str(file)).truncated


@one_build
@pytest.mark.parametrize("form", ["words", "json"])
@pytest.mark.asyncio
async def test_watch_whose_reader_has_gone(build: QemuBuild, form: str) -> None:
    """As in `watch TARGET | head -1`."""
    ours, theirs = os.pipe()
    args = ("--json",) if form == "json" else ()
    async with booted(build, best_accel(build)) as vm, qmp(vm.guest.monitors[1]) as monitor:
        before = await enabled_events(monitor)
        async with started_verb("watch", vm.target, *args, stdout=theirs) as watch:
            os.close(theirs)
            reader = asyncio.StreamReader(limit=1 << 22)
            transport, _ = await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb")
            )
            async with asyncio.timeout(10):
                assert await reader.readline()
            transport.close()
            end = asyncio.create_task(watch.end())
            while not end.done():
                await vm.toggle(2)
            ran = await end
        assert (ran.code, ran.err) == (0, "")
        assert await is_as_before(vm, monitor, before)
