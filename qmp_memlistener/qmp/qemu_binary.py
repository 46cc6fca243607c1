"""Is a process a QEMU system emulator, and of which version?  Its binary's text decides.

A process calls itself what it likes, and so do those who package QEMU
(`qemu-acme-system-x86_64`, `.qemu-system-x86_64-wrapped`, `qemu-kvm`).  The text that `-version`
prints is in every system emulator and in nothing else: it is looked for, the file is never run.
Only the binaries of processes that something hints at are read, each once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache

from ..host.files import find_text, open_foreign
from ..host.processes import Process, path_seen_by
from .cmdline import has_qemu_options, is_qemu_name, program_index

__all__ = ["emulator_of"]

# version() in softmmu/vl.c and system/vl.c prints this, joined by the compiler into one literal.
_VERSION_TEXT = b"QEMU emulator version "
_LONGEST_VERSION = 16
_VERSION = re.compile(rb"QEMU emulator version (\d+\.\d+\.\d+)")


def emulator_of(process: Process, *, asked_for: bool) -> tuple[int, str | None] | None:
    """Where in its `argv` the emulator is named and its version, None when it is no QEMU.

    The version is None when the binary does not tell.  Without `asked_for` a process that nothing
    hints at is not looked into.
    """
    argv = process.argv
    at = program_index(argv)
    if at is None:
        return None
    named = is_qemu_name(argv[at])
    hinted = named or has_qemu_options(argv[at + 1 :]) or "qemu" in _names(process, argv[at])
    if not (hinted or asked_for):
        return None
    read = False
    for path in _binaries(process, argv[at], through_loader=at > 0):
        text = _version_text(path)
        if text is None:
            continue
        read = True
        if text:
            match = _VERSION.match(text)
            return at, match[1].decode() if match is not None else None
    if process.exe is None:
        # of another user: there is nothing but the name to go by
        return (at, None) if named else None
    return (at, None) if is_qemu_name(process.exe) or (named and at > 0 and not read) else None


def _names(process: Process, binary: str) -> str:
    return os.path.basename(binary) + os.path.basename(process.exe or "")


def _binaries(process: Process, binary: str, *, through_loader: bool) -> Iterator[str]:
    """Files that may be the emulator: what the kernel runs, or what its loader was told to."""
    if not through_loader:
        yield f"/proc/{process.pid}/exe"
        if process.exe is not None:
            return
    if "/" in binary:
        path = path_seen_by(process, binary)
        if path is not None:
            yield path
    else:
        yield from (f"{d}/{binary}" for d in ("/usr/bin", "/usr/local/bin"))


def _version_text(path: str) -> bytes | None:
    """The version as the binary has it, b"" when it has none, None when it cannot be read."""
    try:
        # a link may be what it was started by; where its own executable is known that is read
        handle = open_foreign(path, follow=True)
    except (OSError, ValueError):
        return None
    try:
        status = os.fstat(handle)
        times = (status.st_mtime_ns, status.st_ctime_ns)
        return _search(_Binary(handle), status.st_dev, status.st_ino, times)
    except OSError:
        return None
    finally:
        os.close(handle)


class _Binary:
    """An open file that is no part of what a search is cached by."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Binary)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=256)
def _search(binary: _Binary, device: int, inode: int, times: tuple[int, int]) -> bytes:
    """Raises OSError.  Cached by identity of the file: the numbers are only keys."""
    del device, inode, times
    return find_text(binary.handle, _VERSION_TEXT, extra=_LONGEST_VERSION) or b""
