"""The SVM guest's words to its host, and what an error says of a guest that failed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.svm import SvmImage, _Run, _Status

PANIC = """\
[    9.1] kvm_amd: a warning
[   10.0] BUG: kernel NULL pointer dereference, address: 0000000000000008
[   10.0] Oops: 0000 [#1] PREEMPT SMP NOPTI
[   10.0] RIP: 0010:kvm_set_memory_region+0x1/0x2 [kvm]
[   10.1] Kernel panic - not syncing: Fatal exception
[   10.1] Kernel Offset: disabled
"""


@pytest.fixture
def run(tmp_path: Path) -> _Run:
    image = SvmImage("6.12", "6.12.95", "6.12.95-1", tmp_path / "k", tmp_path / "i", b"")
    return _Run(image, tmp_path)


async def told(status: _Status, *parts: bytes, lost: bool = False) -> int | str:
    """The outcome after these parts have arrived."""
    for part in parts:
        status.data_received(part)
    if lost:
        status.connection_lost(None)
    async with asyncio.timeout(1):
        return await status.outcome()


@pytest.mark.asyncio
async def test_lines_may_come_in_pieces(tmp_path: Path) -> None:
    status = _Status(tmp_path / "status")
    assert await told(status, b"up 6.1", b"2.95\nex", b"it 1", b"43\n") == 143
    assert status.release == "6.12.95"
    # What follows, an end for instance, changes nothing.
    assert await told(status, b"exit 0\n", lost=True) == 143


@pytest.mark.asyncio
async def test_an_end_without_a_result(tmp_path: Path) -> None:
    assert await told(_Status(tmp_path), lost=True) == "ended while it booted"
    cut = (b"up 6.1\n", b"exit 0")
    assert await told(_Status(tmp_path), *cut, lost=True) == "ended before its program did"
    failed = b"failed no /dev/kvm: insmod: it's no use\n"
    assert await told(_Status(tmp_path), failed) == (
        "cannot run it: no /dev/kvm: insmod: it's no use"
    )


def test_a_guest_of_which_nothing_was_seen(run: _Run) -> None:
    assert run.failed("ended while it booted").message == "the SVM guest 6.12 ended while it booted"
    assert run.late(5) == "was not up within 5 s"


def test_the_end_of_what_was_seen(run: _Run, tmp_path: Path) -> None:
    (tmp_path / "console").write_text("".join(f"line {n}\n\n" for n in range(20)))
    (tmp_path / "stderr").write_bytes(b"Traceback\nMemoryError \xff\n")
    assert run.failed("did not end").message == (
        "the SVM guest 6.12 did not end; on its console: "
        + " | ".join(f"line {n}" for n in range(12, 20))
        + "; on its standard error: Traceback | MemoryError \N{REPLACEMENT CHARACTER}"
    )


def test_of_a_panic_the_beginning(run: _Run, tmp_path: Path) -> None:
    (tmp_path / "console").write_text(PANIC + "[ 10.2] register\n" * 20)
    message = run.failed("ended before its program did").message
    start = "the SVM guest 6.12 had a kernel panic; on its console: [   10.0] BUG: kernel NULL"
    assert message.startswith(start)
    assert "kvm_set_memory_region" in message
    assert message.count("register") == 3
