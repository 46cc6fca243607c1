"""The tail brings every line once, in order, whatever happens to the file."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qmp_memlistener.host.limited_file import give_back, limited_file
from qmp_memlistener.qmp import TraceTail
from qmp_memlistener.records import SlotOp
from tests.support.host import patience

MIB = 1 << 20


def line(gpa: int) -> bytes:
    return b"kvm_set_user_memory Slot#5 flags=0x0 gpa=%#x size=0x1000 ua=0x7f00 ret=0\n" % gpa


class Log:
    """A log file as QEMU writes it; `append` as 7.2 opens it, else as 10.0 does."""

    def __init__(self, path: Path, *, append: bool) -> None:
        self.path = str(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_APPEND if append else 0)
        self.fd = os.open(self.path, flags)

    def write(self, *gpas: int) -> None:
        os.write(self.fd, b"".join(map(line, gpas)))

    def head(self, size: int) -> bytes:
        with open(self.path, "rb") as f:
            return f.read(size)

    def allocated(self) -> int:
        return os.stat(self.path).st_blocks * 512


@pytest.fixture(params=[True, False], ids=["append", "truncate"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Log]:
    made = Log(tmp_path / "log", append=request.param)
    yield made
    os.close(made.fd)


async def take(tail: TraceTail, count: int) -> list[int]:
    """The addresses of the next `count` slot operations."""
    got: list[int] = []
    async with asyncio.timeout(10):
        while len(got) < count:
            batch = await anext(tail)
            got += [r.gpa for r in batch.records if isinstance(r, SlotOp)]
    return got


@pytest.mark.asyncio
async def test_lines_come_as_they_are_written(log: Log) -> None:
    log.write(0)
    async with TraceTail(log.path) as tail:
        assert await take(tail, 1) == [0]
        for i in range(1, 50):
            log.write(i)
            assert await take(tail, 1) == [i]


@pytest.mark.asyncio
async def test_start_skips_what_was_there(log: Log) -> None:
    log.write(1, 2)
    async with TraceTail(log.path, start=os.stat(log.path).st_size) as tail:
        log.write(3)
        assert await take(tail, 1) == [3]


@pytest.mark.asyncio
async def test_times_bracket_the_write(log: Log) -> None:
    async with TraceTail(log.path) as tail:
        for i in range(5):
            before = time.monotonic_ns()
            log.write(i)
            after = time.monotonic_ns()
            batch = await anext(tail)
            # the write was somewhere between `before` and `after`
            assert batch.t_after_ns < after
            assert before < batch.t_ns
            assert batch.t_ns - batch.late_ns <= after
            assert batch.records[0].t_ns == batch.t_ns


@pytest.mark.asyncio
async def test_a_busy_event_loop_makes_no_line_late(log: Log) -> None:
    async with TraceTail(log.path) as tail:
        await asyncio.sleep(0.05)  # the reader waits
        log.write(1)
        written = time.monotonic_ns()
        busy_s = patience(1)
        time.sleep(busy_s)  # noqa: ASYNC251 (the loop is busy with something else)
        batch = await anext(tail)
        assert batch.t_ns < written + busy_s * 0.75e9


@pytest.mark.asyncio
async def test_a_reader_that_lags_says_by_how_much(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held up between two looks at the file: the time since the first of them is told."""
    lag_s = 0.1
    looked = threading.Event()
    real = os.pread

    def slow(fd: int, size: int, offset: int) -> bytes:
        data = real(fd, size, offset)
        if data:
            looked.set()
            time.sleep(lag_s)
        return data

    async with TraceTail(log.path) as tail:
        log.write(0)
        await anext(tail)
        monkeypatch.setattr(os, "pread", slow)
        log.write(1)
        assert await asyncio.to_thread(looked.wait, 5)
        before = time.monotonic_ns()
        log.write(2)
        first, second = await anext(tail), await anext(tail)
    assert [r.gpa for r in second.records if isinstance(r, SlotOp)] == [2]
    for batch in (first, second):
        assert batch.t_after_ns <= batch.t_ns - batch.late_ns
        assert batch.late_ns > lag_s * 1e9 / 2
    assert second.t_ns - second.late_ns <= before


@pytest.mark.asyncio
async def test_a_line_in_pieces_is_one_record(log: Log) -> None:
    async with TraceTail(log.path) as tail:
        os.write(log.fd, line(7)[:20])
        assert (await anext(tail)).records == []
        os.write(log.fd, line(7)[20:])
        assert await take(tail, 1) == [7]


@pytest.mark.asyncio
async def test_finish_reads_the_rest_and_ends(log: Log) -> None:
    async with TraceTail(log.path) as tail:
        log.write(*range(1000))
        tail.finish()
        got = [r.gpa async for b in tail for r in b.records if isinstance(r, SlotOp)]
    assert got == list(range(1000))


@pytest.mark.asyncio
async def test_what_was_read_is_given_back_and_nothing_is_lost(log: Log) -> None:
    total = 200_000
    async with TraceTail(log.path, release=lambda offset: offset) as tail:
        seen: list[int] = []
        for start in range(0, total, 2000):
            log.write(*range(start, start + 2000))
            seen += await take(tail, 2000)
        assert seen == list(range(total))
        assert os.stat(log.path).st_size > 12 * MIB
        assert log.allocated() < 3 * MIB
        assert tail.decoder.unknown == 0


@pytest.mark.asyncio
async def test_a_second_reader_holds_back_what_it_has_not_read(log: Log) -> None:
    async with TraceTail(log.path, release=lambda _: MIB) as tail:
        log.write(*range(60_000))
        await take(tail, 60_000)
        log.write(60_000)
        await take(tail, 1)
        size = os.stat(log.path).st_size
        assert size - 2 * MIB < log.allocated() < size
    async with TraceTail(log.path, start=MIB) as other:
        got = await take(other, 10_000)
        assert got == list(range(got[0], got[0] + len(got)))


@pytest.mark.asyncio
async def test_a_file_that_is_not_ours_keeps_its_bytes(log: Log) -> None:
    async with TraceTail(log.path) as tail:
        log.write(*range(50_000))
        await take(tail, 50_000)
    assert log.allocated() >= os.stat(log.path).st_size
    assert log.head(len(line(0))) == line(0)


@pytest.mark.asyncio
async def test_a_cut_log_is_reported_and_followed(log: Log) -> None:
    """QEMU that appends begins anew at 0; one that does not leaves a hole before what it writes."""
    async with TraceTail(log.path) as tail:
        log.write(*range(100))
        await take(tail, 100)
        os.truncate(log.path, 0)
        async with asyncio.timeout(10):
            batch = await anext(tail)
        assert batch.lost is not None
        assert batch.records == []
        log.write(200)
        assert await take(tail, 1) == [200]
        log.write(201)
        assert await take(tail, 1) == [201]
        assert tail.decoder.unknown == 0


@pytest.mark.asyncio
async def test_an_unlinked_log_is_still_read(log: Log) -> None:
    async with TraceTail(log.path) as tail:
        os.unlink(log.path)
        log.write(1)
        assert await take(tail, 1) == [1]


@pytest.mark.asyncio
async def test_without_inotify_it_polls(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    no_watch: Callable[[TraceTail], None] = lambda _self: None  # noqa: E731
    monkeypatch.setattr(TraceTail, "_watch", no_watch)
    async with TraceTail(log.path) as tail:
        log.write(1)
        assert await take(tail, 1) == [1]
        log.write(2)
        assert await take(tail, 1) == [2]


@pytest.mark.asyncio
async def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        async with TraceTail(str(tmp_path / "none")):
            pass


@pytest.mark.asyncio
async def test_leaving_while_waiting_leaves_nothing_open(log: Log) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with TraceTail(log.path) as tail:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await anext(tail)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(StopAsyncIteration):
        await anext(tail)


def limited(size: int, *, append: bool) -> tuple[int, int]:
    """A limited file, and as QEMU opens it."""
    try:
        ours = limited_file(size)
    except OSError as error:
        pytest.skip(f"this user may make no file with a limit here: {error}")
    flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_APPEND if append else 0)
    return ours, os.open(f"/proc/self/fd/{ours}", flags)


def fill(fd: int, start: int) -> int:
    """Write lines as QEMU does, until none fits any more; the number of the first that did not."""
    for gpa in itertools.count(start):
        try:
            if os.write(fd, line(gpa)) < len(line(gpa)):
                return gpa
        except OSError:  # ENOSPC
            return gpa
    raise AssertionError


@pytest.mark.parametrize("append", [True, False])
@pytest.mark.asyncio
async def test_a_log_that_was_full_says_so_and_goes_on(append: bool) -> None:
    ours, theirs = limited(MIB, append=append)
    try:
        lost = fill(theirs, 0)
        path = f"/proc/self/fd/{ours}"
        async with TraceTail(path, release=lambda offset: offset, limit=MIB) as tail:
            assert await take(tail, lost) == list(range(lost))
            async with asyncio.timeout(10):
                while (batch := await anext(tail)).lost is None:
                    assert batch.records == []
            assert "full" in batch.lost
            os.write(theirs, line(lost + 1))
            assert await take(tail, 1) == [lost + 1]
            assert tail.decoder.unknown == 0
            # and again, as often as it is read
            for first in range(0, 3 * MIB // len(line(0)), 10):
                several = range(first, first + 10)  # when its last page is begun there is room
                os.write(theirs, b"".join(map(line, several)))
                assert await take(tail, 10) == list(several)
            assert os.fstat(ours).st_blocks * 512 <= MIB
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.asyncio
async def test_what_another_reader_gave_back_is_said_to_be_lost(log: Log) -> None:
    async with TraceTail(log.path) as slow:
        log.write(1)
        assert await take(slow, 1) == [1]
        assert slow._thread is not None
        slow.finish()  # it is stopped, as by SIGSTOP
        slow._thread.join(5)
        read = slow.offset
        log.write(*range(2, 30_000))
        assert give_back(log.fd, 0, MIB)
    async with TraceTail(log.path, start=read) as woken:
        async with asyncio.timeout(10):
            batch = await anext(woken)
        assert batch.lost is not None
        lost = int(batch.lost.split()[0])
        assert lost == MIB - read
        first = (await take(woken, 1))[0]
        missing = sum(len(line(gpa)) for gpa in range(2, first))
        assert lost <= missing < lost + len(line(first))  # to the end of the line
        assert woken.decoder.unknown == 0


def test_a_reader_that_hangs_keeps_no_process(log: Log) -> None:
    """Its file system does not answer: closing can be given up, and the loop ends without it."""
    answers = threading.Event()

    async def give_up() -> None:
        tail = TraceTail(log.path)
        await tail.__aenter__()
        tail.finish()
        assert tail._thread is not None
        tail._thread.join(5)
        tail._thread = threading.Thread(target=answers.wait, args=(20,), daemon=True)
        tail._thread.start()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await tail.__aexit__(None, None, None)

    start = time.monotonic()
    asyncio.run(give_up())
    assert time.monotonic() - start < 15
    answers.set()
