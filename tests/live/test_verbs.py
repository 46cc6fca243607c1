"""The verbs as a user runs them: processes, real guests, fake servers, signals, closed pipes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from qmp_memlistener.errors import TargetLost
from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.monitor import Monitor, UnixTarget
from qmp_memlistener.recording import Recording, SlotOp, TransitionRecord
from tests.support.live import (
    QEMUS,
    Ran,
    Verb,
    Vm,
    best_accel,
    booted,
    builds,
    cases,
    enabled_events,
    file_has,
    left_behind,
    qmp,
    run_in_terminal,
    run_verb,
    silenced,
    started_verb,
)

pytestmark = pytest.mark.qemu

IN_TIME = 2.0  # seconds, from the cause of the end or from the start to the exit code
STRATEGIES = ["qemu", "pause", "batch-incremental", "batch-full", "hole"]
SECTION_KEYS = {"start", "size", "kind", "name", "offset", "owner", "memslot"}
HOLE_KEYS = {"start", "size", "offset", "covered_by", "owner"}
TRANSITION_KEYS = {
    *("schema", "type", "seq", "t_ns", "cause", "removed", "added"),
    *("holes_punched", "holes_filled"),
}
SLOT_OP_KEYS = {
    *("type", "t_ns", "as_id", "slot", "op", "gpa", "size", "flags", "ret"),
    *("predicted", "transition"),
}


one_build = builds(QEMUS[:1])


@asynccontextmanager
async def watched(vm: Vm, *args: str) -> AsyncIterator[Verb]:
    """`watch` that has attached."""
    async with started_verb("watch", vm.target, *args) as watch:
        await watch.ready()
        yield watch


async def is_as_before(vm: Vm, monitor: Monitor, before: frozenset[str]) -> bool:
    """Trace events as before, no files of ours, and the first monitor free."""
    async with await Monitor.connect(UnixTarget(str(vm.guest.monitors[0]))):
        pass
    return await enabled_events(monitor) == before and left_behind(vm.guest.pid) == []


async def check_tables_fit(*args: str | Path) -> None:
    """On a terminal of 80 columns no table is wider; sentences may wrap."""
    lines = await run_in_terminal(*args)
    assert [line for line in lines if "  " in line.strip() and len(line) > 80] == []


# -- watch ---------------------------------------------------------------------------------------


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
        assert time.monotonic() - start < IN_TIME
        ran.check_error(3)
        assert str(vm.guest.monitors[0]) in ran.err
        assert "#6 " in ran.out  # what it did last is told
        assert left_behind(vm.guest.pid) == []


@one_build
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("verb", ["watch", "record"])
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
        assert ran.seconds < IN_TIME
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


# -- targets that are no good --------------------------------------------------------------------

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""},'
    b' "capabilities": []}}\r\n'
)
FAKES = {
    "garbage": b"\x00\xff\xfe garbage that is not JSON\r\n" * 4,
    "http": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "other json": b'{"hello": "world"}\r\n',
    "a list": b"[1, 2, 3]\r\n",
    "half a greeting": GREETING[:40],
    "silence": b"",
    "a greeting and silence": GREETING,
    "a greeting and garbage": GREETING + b"}}}}\r\n",
    "endless": b"x" * (1 << 21),
}


@asynccontextmanager
async def fake_server(path: Path, says: bytes, close: bool = False) -> AsyncIterator[asyncio.Event]:
    """Says the same to every client, then hangs (or closes); the event tells of the first one."""
    connected, over = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        try:
            writer.write(says)
            await writer.drain()
            if not close:
                drained = asyncio.create_task(reader.read())
                await asyncio.wait(
                    [drained, asyncio.create_task(over.wait())],
                    return_when=asyncio.FIRST_COMPLETED,
                )
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield connected
    finally:
        over.set()
        server.close()


async def all_verbs(target: str, file: Path) -> list[Ran]:
    """`watch`, `show` and `record` of one target, at once."""
    return list(
        await asyncio.gather(
            run_verb("watch", target),
            run_verb("show", target),
            run_verb("record", target, "-o", file),
        )
    )


@pytest.mark.parametrize("says", FAKES)
@pytest.mark.asyncio
async def test_a_server_that_is_no_qemu(says: str, tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    async with fake_server(path, FAKES[says]):
        ran = await run_verb("watch", str(path))
    ran.check_error(3, str(path))
    assert ran.seconds < IN_TIME
    assert ran.out == ""


@pytest.mark.asyncio
async def test_a_server_that_closes_at_once(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    async with fake_server(path, b"", close=True):
        for ran in await all_verbs(str(path), tmp_path / "r"):
            ran.check_error(3, str(path))
            assert ran.seconds < IN_TIME
    assert not (tmp_path / "r").exists()


@pytest.mark.asyncio
async def test_targets_that_are_not_there(tmp_path: Path) -> None:
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(stale))
    plain = tmp_path / "plain"
    plain.write_text("no socket")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    targets = [str(tmp_path / "gone"), str(stale), str(plain), f"127.0.0.1:{port}"]
    ended = await asyncio.create_subprocess_exec("true")
    await ended.wait()
    targets += [f"pid:{os.getpid()}", f"pid:{ended.pid}"]
    for target in targets:
        ran = await run_verb("watch", target)
        ran.check_error(3, target, "remedy: ")
        assert ran.out == ""
        assert ran.seconds < IN_TIME
    for ran in await all_verbs(targets[0], tmp_path / "r"):
        ran.check_error(3, targets[0], "remedy: ")
    assert not (tmp_path / "r").exists()
    for target in ("pid:nobody", "a:b:c", "", "unix:"):
        (await run_verb("watch", target)).check_error(2)


@one_build
@pytest.mark.asyncio
async def test_a_busy_monitor(build: QemuBuild, tmp_path: Path) -> None:
    async with booted(build, best_accel(build)) as vm, watched(vm, "--probes", "none") as first:
        for ran in await all_verbs(vm.target, tmp_path / "r"):
            ran.check_error(3, vm.target, "another client")
            assert ran.seconds < IN_TIME
        assert not (tmp_path / "r").exists()
        # By process id another monitor is found; the first one goes on undisturbed.
        async with started_verb("watch", f"pid:{vm.guest.pid}", "--count", "1") as second:
            await second.ready()
            await vm.open_pam()
            assert (await second.end()).code == 0
        await first.until("hole filled")


@pytest.mark.asyncio
async def test_an_interrupt_before_it_is_attached(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    async with fake_server(path, b"") as connected, started_verb("watch", path) as watch:
        await connected.wait()
        watch.process.send_signal(signal.SIGINT)
        ran = await watch.end()
    assert ran.code == 130
    assert ran.err == "interrupted\n"
    assert ran.seconds < IN_TIME


# -- record and plan -----------------------------------------------------------------------------


@cases()
@pytest.mark.asyncio
async def test_record_then_plan(build: QemuBuild, accel: str, tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    async with (
        booted(build, accel) as vm,
        started_verb("record", vm.target, "-o", file, "--count", "4") as record,
    ):
        await file_has(file, b'"type":"map"')
        for i, step in enumerate((vm.open_pam, vm.close_pam) * 2, 1):
            await step()
            # a reader can follow while it grows
            await file_has(file, b'"type":"transition"', i)
        ran = await record.end()
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"{file}: 4 transitions, 16 slot operations")
    again = await run_verb("record", "/nowhere", "-o", file)
    assert again.code in (2, 3)

    recording = Recording(str(file))
    assert recording.header.qemu_version == build.version
    records = list(recording)
    traced: dict[int | None, list[SlotOp]] = {}
    for op in records:
        if isinstance(op, SlotOp):
            traced.setdefault(op.transition, []).append(op)

    ran = await run_verb("plan", file, "--json")
    assert (ran.code, ran.err) == (0, "")
    (document,) = ran.documents
    transitions = msgspec.convert(document["transitions"], list[dict[str, object]])
    assert [t["seq"] for t in transitions] == [1, 2, 3, 4]
    for t in transitions:
        plans = msgspec.convert(t["plans"], list[dict[str, object]])
        assert [p["strategy"] for p in plans] == STRATEGIES
        by_qemu = msgspec.convert(plans[0]["ops"], list[dict[str, object]])
        seq = t["seq"]
        assert isinstance(seq, int)
        wanted = [(op.op, op.gpa, op.size, op.flags) for op in traced[seq]]
        assert [(o["op"], o["gpa"], o["size"], o["flags"]) for o in by_qemu] == wanted
        assert plans[0]["missing"] != []
        assert plans[-1]["missing"] == []

    ran = await run_verb("plan", file, "--transition", "2")
    assert (ran.code, ran.err) == (0, "")
    assert "missing in between" in ran.out
    await check_tables_fit("plan", file, "--transition", "2")
    assert (await run_verb("plan", file, "--transition", "99")).code == 2


@one_build
@pytest.mark.asyncio
async def test_a_recording_is_never_overwritten(build: QemuBuild, tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text("precious")
    async with booted(build, best_accel(build)) as vm, qmp(vm.guest.monitors[1]) as monitor:
        before = await enabled_events(monitor)
        for output in (file, tmp_path / "no" / "such" / "directory", tmp_path):
            ran = await run_verb("record", vm.target, "-o", output)
            ran.check_error(2, str(output))
            assert await is_as_before(vm, monitor, before)
    assert file.read_text() == "precious"


@one_build
@pytest.mark.asyncio
async def test_a_full_disk_ends_a_recording_with_a_message(
    build: QemuBuild, tmp_path: Path
) -> None:
    """A file-size limit stands for the full disk."""
    prlimit = shutil.which("prlimit")
    if prlimit is None:
        pytest.skip("prlimit(1) is not installed: the Debian package is util-linux")
    file = tmp_path / "r.jsonl"
    async with booted(build, best_accel(build)) as vm, qmp(vm.guest.monitors[1]) as monitor:
        before = await enabled_events(monitor)
        async with started_verb("record", vm.target, "-o", file) as record:
            await file_has(file, b'"type":"map"')
            limit = await asyncio.create_subprocess_exec(
                prlimit, f"--pid={record.process.pid}", f"--fsize={file.stat().st_size + 3000}"
            )
            assert await limit.wait() == 0
            await vm.toggle(40)
            ran = await record.end()
        ran.check_error(1, str(file))
        assert await is_as_before(vm, monitor, before)
    recording = Recording(str(file))
    assert [r.seq for r in recording if isinstance(r, TransitionRecord)][:1] == [1]
    assert recording.truncated


# -- show, list, demo ----------------------------------------------------------------------------


@cases()
@pytest.mark.asyncio
async def test_show(build: QemuBuild, accel: str, tmp_path: Path) -> None:
    args = ("-m", "slots=2,maxmem=1G", "-device", "VGA")
    dimm = ("-object", "memory-backend-ram,id=m0,size=16M", "-device", "pc-dimm,id=d0,memdev=m0")
    async with booted(build, accel, "pc", *args, *dimm) as vm:
        shown = await run_verb("show", vm.target, "--json")
        text = await run_verb("show", f"pid:{vm.guest.pid}")
        await check_tables_fit("show", vm.target)
        async with qmp(vm.guest.monitors[0]) as monitor:
            saved = await monitor.execute(
                "human-monitor-command", {"command-line": "info mtree -o"}
            )
    assert (shown.code, shown.err) == (0, "")
    (document,) = shown.documents
    assert document["schema"] == 1
    assert document["address_space"] == "memory"
    ranges = msgspec.convert(document["ranges"], list[dict[str, object]])
    assert all(r.keys() >= SECTION_KEYS for r in ranges)
    starts = [msgspec.convert(r["start"], int) for r in ranges]
    assert starts == sorted(starts)
    blocks = msgspec.convert(document["ram_blocks"], list[dict[str, object]])
    by_name = {b["name"]: b for b in blocks}
    holes = msgspec.convert(by_name["pc.ram"]["holes"], list[dict[str, object]])
    assert all(h.keys() >= HOLE_KEYS for h in holes)
    assert (0xA0000, "vga-lowmem") in [(h["start"], h["covered_by"]) for h in holes]
    assert document["guest"] == {
        **msgspec.convert(document["guest"], dict[str, object]),
        "version": build.version,
        "accel": accel,
        "status": "running",
    }
    (device,) = msgspec.convert(document["memory_devices"], list[dict[str, object]])
    assert (device["id"], device["size"]) == ("d0", 16 << 20)

    # The same from a file.
    assert isinstance(saved, str)
    (tmp_path / "mtree").write_text(saved, newline="")
    from_file = await run_verb("show", "--from", tmp_path / "mtree", "--json")
    (second,) = from_file.documents
    assert second["ranges"] == document["ranges"]
    assert second["ram_blocks"] == document["ram_blocks"]

    assert (text.code, text.err) == (0, "")
    for words in ("vga-lowmem", "pc.ram", "memory devices", "d0"):
        assert words in text.out
    assert ("memslots" in text.out) == (accel == "kvm")


@builds()
@pytest.mark.asyncio
async def test_list(build: QemuBuild) -> None:
    accel = best_accel(build)

    async def entry(vm: Vm) -> dict[str, object]:
        ran = await run_verb("list", "--json")
        assert (ran.code, ran.err) == (0, "")
        (document,) = ran.documents
        assert document.keys() == {"schema", "guests"}
        guests = msgspec.convert(document["guests"], list[dict[str, object]])
        (found,) = (g for g in guests if g["pid"] == vm.guest.pid)
        return found

    def expected(vm: Vm, *states: str) -> dict[str, object]:
        monitors = [
            {"target": f"unix:{path}", "state": state}
            for path, state in zip(vm.guest.monitors, states, strict=True)
        ]
        return {
            "pid": vm.guest.pid,
            "name": "a guest",
            "version": build.version,
            "machine": "q35",
            "accel": accel,
            "monitors": monitors,
            "frozen": None,
        }

    async with booted(build, accel, "q35", "-name", "a guest") as vm:
        assert await entry(vm) == expected(vm, "free", "free", "free")
        async with watched(vm, "--probes", "none"):
            assert await entry(vm) == expected(vm, "busy", "free", "free")
            text = await run_verb("list")
            assert (text.code, text.err) == (0, "")
            assert str(vm.guest.pid) in text.out
            assert "a guest" in text.out
            assert "busy" in text.out
            await check_tables_fit("list")
        assert await entry(vm) == expected(vm, "free", "free", "free")


@builds()
@pytest.mark.parametrize("machine", ["pc", "q35"])
@pytest.mark.asyncio
async def test_demo(build: QemuBuild, machine: str) -> None:
    """Under the accelerator it chooses, and in words under TCG."""
    which = ("--qemu", build.version, "--machine", machine)
    ran = await run_verb("demo", "--json", *which, seconds=30)
    assert (ran.code, ran.err) == (0, "")
    (document,) = ran.documents
    assert document["schema"] == 1
    accel = best_accel(build)
    assert (document["qemu"], document["machine"]) == (build.version, machine)
    assert (document["accel"], document["source"]) == (accel, "trace")
    assert document["toggles_seen"] == document["toggles"]
    ops, predicted = document["slot_ops"], document["predicted_slot_ops"]
    assert ops
    assert predicted == (ops if accel == "tcg" else 0)

    ran = await run_verb("demo", "--accel", "tcg", *which, seconds=30)
    assert (ran.code, ran.err) == (0, "")
    for words in ("hole punched", "hole filled", "RAM appeared", "(predicted)", "missing in"):
        assert words in ran.out
    assert ("tseg" in ran.out) == (machine == "q35")


@pytest.mark.parametrize("verb", ["list", "show", "watch", "record", "plan", "demo"])
@pytest.mark.asyncio
async def test_help_has_an_example(verb: str) -> None:
    ran = await run_verb(verb, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"Example: qmp-memlistener {verb}" in " ".join(ran.out.split())
    assert all(len(line) <= 80 for line in ran.lines)
