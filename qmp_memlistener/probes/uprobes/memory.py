"""Constant strings of a running QEMU: names of source files and of commands.

Reads /proc/PID/mem at addresses that lie in the program's read-only data for as long as it runs,
each once.  Nothing that QEMU changes is read here: it would be another value by then.
"""

from __future__ import annotations

import os
import re

from .results import Site

__all__ = ["Strings"]

_LONGEST = 256
_COMMAND = re.compile(rb"[a-zA-Z_][a-zA-Z0-9_.-]*")


class Strings:
    """What the pointers in records point to; `close` when done."""

    def __init__(self, pid: int) -> None:
        self._fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        self._sites: dict[Site, str | None] = {}
        self._commands: dict[int, str | None] = {}

    def site(self, site: Site) -> str | None:
        """`util/main-loop.c:318`; the build directory's `../` in front is left out."""
        if site not in self._sites:
            name = self._string(site.file)
            if name is not None:
                text = name.decode(errors="replace")
                while text.startswith("../"):
                    text = text[3:]
                self._sites[site] = f"{text}:{site.line}"
            else:
                self._sites[site] = None
        return self._sites[site]

    def command(self, info: int) -> str | None:
        """The name of a QMP command: the first member of struct QmpCommand (qapi/dispatch.h)."""
        if info not in self._commands:
            pointer = self._read(info, 8)
            name = self._string(int.from_bytes(pointer, "little")) if len(pointer) == 8 else None
            valid = name is not None and _COMMAND.fullmatch(name)
            self._commands[info] = name.decode() if name is not None and valid else None
        return self._commands[info]

    def close(self) -> None:
        os.close(self._fd)

    def _string(self, address: int) -> bytes | None:
        data = self._read(address, _LONGEST)
        end = data.find(b"\0")
        return data[:end] if end > 0 else None

    def _read(self, address: int, size: int) -> bytes:
        """Up to `size` bytes; less at the end of a mapping, none where nothing is mapped."""
        try:
            return os.pread(self._fd, size, address)
        except (OSError, OverflowError):
            return b""
