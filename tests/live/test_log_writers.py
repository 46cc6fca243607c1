"""A guest whose console is QEMU's log could write slot operations that never were: refused."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmp_memlistener.qmp import Monitor, TraceReason, TraceUnavailable, start_tracing
from tests.support.any_monitor import AnyMonitor
from tests.support.bare_qemu import Running, running
from tests.support.leftovers import left_behind
from tests.support.live import NO_QEMU, QEMUS
from tests.support.qtest import QTest
from tests.support.tracing import states, writing

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not QEMUS, reason=NO_QEMU),
    pytest.mark.asyncio,
]

FORGED = b"kvm_set_user_memory AddrSpace#0 Slot#7 flags=0x0 gpa=0x0 size=0x1000 ua=0x1 ret=0\n"


async def forge(qemu: Running, port: int) -> None:
    """What a guest does: write a line of its choice to a console."""
    async with await QTest.connect(qemu.qtest) as qtest:
        for byte in FORGED:
            await qtest.outb(port, byte)


async def check_refused(qemu: Running, reason: TraceReason, *words: str) -> None:
    async with await Monitor.connect(qemu.a) as monitor:
        before = await states(monitor)
        with pytest.raises(TraceUnavailable) as refused:
            await start_tracing(monitor)
        assert refused.value.reason is reason
        assert refused.value.remedy
        for word in words:
            assert word in refused.value.message
        assert await states(monitor) == before
        assert left_behind(qemu.pid) == []


@pytest.mark.parametrize(
    ("args", "port"),
    [
        (("-serial", "file:log"), 0x3F8),
        (("-chardev", "file,id=c,path=log,append=on", "-serial", "chardev:c"), 0x3F8),
        (("-debugcon", "file:log"), 0xE9),
        (("-chardev", "null,id=c,logfile=log", "-serial", "chardev:c"), 0x3F8),
    ],
)
async def test_a_console_in_the_log(tmp_path: Path, args: tuple[str, ...], port: int) -> None:
    log = tmp_path / "log"
    async with running(QEMUS[0], tmp_path, *args, "-D", "log", "-d", "guest_errors") as qemu:
        await forge(qemu, port)
        assert FORGED in log.read_bytes()  # so it can
        await check_refused(qemu, TraceReason.LOG_OF_GUEST)


async def test_a_console_on_the_standard_output_that_is_the_log(tmp_path: Path) -> None:
    with writing(tmp_path / "log") as log:
        script = ("sh", "-c", 'exec "$@" >&2', "sh")
        qemu_with_stdio = running(QEMUS[0], tmp_path, "-serial", "stdio", stderr=log, prefix=script)
        qemu = await qemu_with_stdio.__aenter__()
    try:
        await check_refused(qemu, TraceReason.LOG_OF_GUEST, "standard output")
    finally:
        await qemu_with_stdio.__aexit__(None, None, None)


async def test_a_standard_output_that_nothing_of_the_guest_reaches(tmp_path: Path) -> None:
    """As libvirt starts it: one file for both."""
    with writing(tmp_path / "log") as log:
        script = ("sh", "-c", 'exec "$@" >&2', "sh")
        plain = running(QEMUS[0], tmp_path, stderr=log, prefix=script)
        qemu = await plain.__aenter__()
    try:
        async with (
            await AnyMonitor.connect(qemu.a) as monitor,
            await start_tracing(monitor) as session,
        ):
            assert session.in_place
    finally:
        await plain.__aexit__(None, None, None)


async def test_a_console_that_is_plugged_in_later(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with running(QEMUS[0], tmp_path, "-D", "log", "-d", "guest_errors") as qemu:
        async with await AnyMonitor.connect(qemu.b) as monitor:
            data = {"out": str(log), "append": True}
            backend = {"type": "file", "data": data}
            await monitor.execute("chardev-add", {"id": "late", "backend": backend})
        await check_refused(qemu, TraceReason.LOG_OF_GUEST)


async def test_another_process_that_writes_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with running(QEMUS[0], tmp_path, "-D", "log", "-d", "guest_errors") as qemu:
        with appending(log, ["cat"]) as pid:
            await check_refused(qemu, TraceReason.LOG_SHARED, "cat", str(pid))
        # who keeps it open after having started QEMU is welcome
        async with await Monitor.connect(qemu.a) as monitor:
            with kept_open(log):
                async with await start_tracing(monitor) as session:
                    assert session.in_place
                    assert any(f"pid {os.getpid()}" in remark for remark in session.remarks)


@contextmanager
def kept_open(path: Path) -> Iterator[None]:
    """The test, which started QEMU, has the file open for writing."""
    with open(path, "ab"):
        yield


@contextmanager
def appending(path: Path, argv: list[str]) -> Iterator[int]:
    """A process whose standard output is the file."""
    with open(path, "ab") as out:
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=out)
    try:
        yield process.pid
    finally:
        process.kill()
        process.communicate()
