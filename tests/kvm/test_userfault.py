"""Holes by userfaultfd: whoever waits goes on, whatever state the pages are in."""

from __future__ import annotations

import contextlib
import ctypes
import select
import threading
from collections.abc import Iterator

import pytest

from qmp_memlistener.kvmlab import system
from qmp_memlistener.kvmlab.memory import PAGE, HostMemory
from qmp_memlistener.kvmlab.userfault import UFFDIO_CONTINUE, Userfault, _Continue, _Range, why_not

PAGES = 64
DEADLINE_S = 10


@pytest.fixture
def userfault() -> Iterator[Userfault]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    made = Userfault()
    yield made
    made.close()


@contextlib.contextmanager
def waiting_at(address: int, userfault: Userfault) -> Iterator[threading.Thread]:
    """A thread that reads a page and has to wait for it."""
    word = ctypes.create_string_buffer(8)
    # a foreign function: it waits without the interpreter's lock
    thread = threading.Thread(
        target=ctypes.CDLL(None).memcpy,
        args=(word, ctypes.c_void_p(address), ctypes.c_size_t(8)),
        daemon=True,
    )
    thread.start()
    try:
        assert select.select([userfault.fd], [], [], DEADLINE_S)[0], "nobody came to the hole"
        assert userfault.addresses() == [address]
        yield thread
    except BaseException:
        userfault.close()  # wakes the thread, before its memory goes
        thread.join()
        raise
    assert word.raw == address.to_bytes(8, "little")


@pytest.mark.parametrize("mapped", [None, 0, PAGES // 2, PAGES - 1])
@pytest.mark.parametrize("waiter", [1, PAGES // 2 + 1, PAGES - 2])
def test_a_hole_is_filled_though_a_page_of_it_is_mapped_already(
    userfault: Userfault, mapped: int | None, waiter: int
) -> None:
    """Linux stops at such a page, with EEXIST at the first one and with EAGAIN behind it."""
    with HostMemory(PAGES * PAGE) as memory:
        for i in range(PAGES):
            memory.words[i * PAGE // 8] = memory.hva + i * PAGE
        userfault.punch(memory.hva, memory.size)
        if mapped is not None:
            at = memory.hva + mapped * PAGE
            system.ioctl(userfault.fd, UFFDIO_CONTINUE, _Continue(_Range(at, PAGE)))
        with waiting_at(memory.hva + waiter * PAGE, userfault) as thread:
            userfault.fill(memory.hva, memory.size)
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), "who waited still waits"
        for i in range(PAGES):
            read = ctypes.c_uint64.from_address(memory.hva + i * PAGE).value
            assert read == memory.hva + i * PAGE
        assert userfault.addresses() == []
