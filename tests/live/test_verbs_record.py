"""`record` as a user runs it, and `plan` of what it wrote."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import msgspec
import pytest

from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.records import Recording, SlotOp, TransitionRecord
from tests.live.verbs_support import check_tables_fit, is_as_before, one_build
from tests.support.leftovers import enabled_events, file_has
from tests.support.live import best_accel, booted, cases, qmp
from tests.support.verbs import run_verb, started_verb

pytestmark = pytest.mark.qemu

STRATEGIES = ["qemu", "pause", "batch-incremental", "batch-full", "hole", "hole-split"]


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
        assert plans[STRATEGIES.index("hole")]["missing"] == []

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
