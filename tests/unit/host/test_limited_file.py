"""A file that holds what it may and no more, also when nobody is left to see to it."""

from __future__ import annotations

import errno
import os

import pytest

from qmp_memlistener.host import limited_file as module
from qmp_memlistener.host.limited_file import give_back, is_full, limited_file

SIZE = 256 * 1024


def check(handle: int) -> None:
    status = os.fstat(handle)
    assert (status.st_size, status.st_mode & 0o777, status.st_uid) == (0, 0o600, os.geteuid())
    assert not os.get_inheritable(handle)
    writer = os.open(f"/proc/self/fd/{handle}", os.O_WRONLY | os.O_APPEND)
    try:
        for _ in range(0, SIZE, 1024):
            assert os.write(writer, b"x" * 1024) == 1024
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            os.write(writer, b"x")
        assert is_full(os.fstat(handle), SIZE)
        assert give_back(handle, 0, SIZE // 2)
        assert not is_full(os.fstat(handle), SIZE)
        assert os.write(writer, b"y" * 1000) == 1000
        assert os.fstat(handle).st_size == SIZE + 1000
        assert os.pread(handle, 1000, SIZE) == b"y" * 1000
    finally:
        os.close(writer)


def test_the_limit_holds() -> None:
    try:
        handle = limited_file(SIZE)
    except OSError as error:
        pytest.skip(f"neither root nor a user namespace here: {error}")
    try:
        check(handle)
        assert not os.path.exists(os.readlink(f"/proc/self/fd/{handle}"))
    finally:
        os.close(handle)


def test_the_limit_holds_for_other_users() -> None:
    """In a user namespace, as one who is not root makes it."""
    try:
        handle = module._from_namespace(SIZE)
    except OSError as error:
        pytest.skip(f"no user namespace may be made here: {error}")
    try:
        check(handle)
    finally:
        os.close(handle)
