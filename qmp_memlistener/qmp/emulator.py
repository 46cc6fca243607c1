"""Is a process a QEMU system emulator, and of which version?

Its binary's text decides.  A process calls
itself what it likes, and so do those who package QEMU (`qemu-acme-system-x86_64`,
`.qemu-system-x86_64-wrapped`, `qemu-kvm`).  The text that `-version` prints is in every system
emulator and in nothing else: it is looked for, the file is never run.  Only the binaries of
processes that something hints at are read, each once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from ..host.files import find_text, open_foreign
from ..host.processes import Process, path_seen_by
from .cmdline import has_qemu_options, is_qemu_name, program_index

__all__ = ["emulator_of"]

# version() in softmmu/vl.c and system/vl.c prints this, joined by the compiler into one literal.
_VERSION_TEXT = b"QEMU emulator version "
_LONGEST_VERSION = 16
_VERSION = re.compile(rb"QEMU emulator version (\d+\.\d+\.\d+)")
_MOST_SEARCHED = 256
_searched: dict[tuple[int, ...], bytes] = {}
"""What was found in a file, by its device, inode and times."""


def emulator_of(process: Process, *, asked_for: bool) -> tuple[int, str | None] | None:
    """Where in its `argv` the emulator is named and its version, None when it is no QEMU.

    The version is None when the binary does not show it.  Without `asked_for` a process that
    nothing hints at is not looked into.
    """
    argv = process.argv
    at = program_index(argv)
    if at is None:
        return None
    named = is_qemu_name(argv[at])
    names = os.path.basename(argv[at]) + os.path.basename(process.exe or "")
    hinted = named or has_qemu_options(argv[at + 1 :]) or "qemu" in names
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


def _binaries(process: Process, binary: str, *, through_loader: bool) -> Iterator[str]:
    """Files that may be the emulator: what the kernel runs, or what its loader was given."""
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
        file = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        if file not in _searched:
            found = find_text(handle, _VERSION_TEXT, extra=_LONGEST_VERSION) or b""
            if len(_searched) >= _MOST_SEARCHED:
                _searched.clear()
            _searched[file] = found
        return _searched[file]
    except OSError:
        return None
    finally:
        os.close(handle)
