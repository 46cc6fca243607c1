"""Files of others that do not answer, names that are no text: every verb goes on and says so."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from qmp_memlistener.qmp import Monitor, UnixTarget, start_tracing
from qmp_memlistener.records import Recording
from tests.support.bare_qemu import running
from tests.support.host import patience
from tests.support.leftovers import left_behind
from tests.support.live import NO_QEMU, QEMUS
from tests.support.silent_fs import silent
from tests.support.verbs import run_verb

pytestmark = [pytest.mark.qemu, pytest.mark.skipif(not QEMUS, reason=NO_QEMU)]


@pytest.mark.alone
@pytest.mark.asyncio
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")
async def test_one_process_whose_files_do_not_answer(tmp_path: Path) -> None:
    (tmp_path / "silent").mkdir()
    with silent(tmp_path / "silent"):
        config = str(tmp_path / "silent" / "machine.conf")
        stuck = await asyncio.create_subprocess_exec(
            *(QEMUS[0].binary, *QEMUS[0].args, "-readconfig", config),
            env={**os.environ, **QEMUS[0].env},
        )
        try:
            async with running(QEMUS[0], tmp_path) as qemu:
                for name in ("list", "doctor"):
                    ran = await run_verb(name, "--json")
                    assert ran.code == 0, ran.err
                    assert ran.seconds < patience(30)
                ran = await run_verb("list", "--json")
                guests = {g["pid"]: g for g in ran.documents[0]["guests"]}  # type: ignore[attr-defined]
                assert guests[qemu.pid]["version"] == QEMUS[0].version
                assert [m["state"] for m in guests[qemu.pid]["monitors"]] == ["free", "free"]
                assert guests[qemu.pid]["notes"] == []
                (note,) = guests[stuck.pid]["notes"]
                assert config in note
                assert guests[stuck.pid]["monitors"] == []
                # another guest is none of its business
                ran = await run_verb("show", str(qemu.a), "--json")
                assert ran.code == 0, ran.err
        finally:
            stuck.kill()
    await stuck.wait()


@pytest.mark.asyncio
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")
async def test_a_log_whose_file_system_does_not_answer(tmp_path: Path) -> None:
    """The guest is observed without its log, and nothing waits for the thread that looked at it."""
    (tmp_path / "silent").mkdir()
    async with running(QEMUS[0], tmp_path, "-D", str(tmp_path / "silent" / "log")) as qemu:
        with silent(tmp_path / "silent"):
            ran = await run_verb("watch", str(qemu.a), "--for", "200ms", "--probes", "ping")
            assert ran.code == 0, ran.err
            assert "does not answer: where its log goes cannot be seen" in " ".join(ran.out.split())
            ran = await run_verb("doctor", str(qemu.a))
            assert ran.code == 0, ran.err
            assert ran.seconds < patience(30)
        assert left_behind(qemu.pid) == []


@pytest.mark.asyncio
async def test_names_that_are_no_text(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/a\xff\xe2\x80\xae"))
    os.mkdir(odd)
    option = ("-name", os.fsdecode(b"g\xfe"), "-D", str(odd / "log"))
    async with running(QEMUS[0], odd, *option) as qemu:
        ran = await run_verb("list", "--json")
        assert ran.code == 0, ran.err
        (guest,) = [g for g in ran.documents[0]["guests"] if g["pid"] == qemu.pid]  # type: ignore[attr-defined]
        assert guest["name"] == "g\\udcfe"
        assert guest["monitors"][0]["target"].endswith("/a\\udcff\u202e/a")
        assert (await run_verb("list")).code == 0
        for verb in (("show", str(qemu.a), "--json"), ("doctor", str(qemu.a), "--json")):
            ran = await run_verb(*verb)
            assert ran.code == 0, ran.err
            assert len(ran.documents) == 1
        out = tmp_path / "recording"
        record = ("record", str(qemu.a), "-o", str(out), "--for", "500ms")
        ran = await run_verb(*record)
        assert ran.code == 0, ran.err
        assert Recording(str(out)).header.target.endswith("/a\\udcff\u202e/a")
        async with (
            await Monitor.connect(UnixTarget(str(odd / "b"))) as monitor,
            await start_tracing(monitor, guest=qemu.guest()) as session,
        ):
            assert session.in_place
        assert left_behind(qemu.pid) == []


@pytest.mark.asyncio
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")
@pytest.mark.parametrize("verb", ["report", "plan", "show --from"])
async def test_a_verb_whose_own_file_does_not_answer_ends_at_sigterm(
    verb: str, tmp_path: Path
) -> None:
    """No handler runs while the main thread is in the kernel: another thread takes the signal."""
    (tmp_path / "silent").mkdir()
    with silent(tmp_path / "silent"):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "qmp_memlistener", *verb.split(), str(tmp_path / "silent/x")),
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            await _in_the_kernel(process.pid)
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                _, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()
    assert process.returncode == 130
    assert b"does not answer" in err


async def _in_the_kernel(pid: int) -> None:
    async with asyncio.timeout(30):
        while not _waits_for_fuse(pid):  # noqa: ASYNC110 (no event)
            await asyncio.sleep(0.05)


def _waits_for_fuse(pid: int) -> bool:
    return "fuse" in Path(f"/proc/{pid}/stack").read_text()
