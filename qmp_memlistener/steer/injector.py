"""Into a QEMU, or out of it: `python -m qmp_memlistener.steer.injector attach|detach KEY OBJECT`.

KEY is `Process.key`.  A process of its own: whoever started QEMU and waits for it may not trace it.
It writes one JSON document: `{"stopped_ns": [...], "error": str | null}`, how long QEMU's main loop
was stopped for each call, and why nothing was done.  The answers of attach and detach are in the
channel.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from ..errors import MissingPrerequisite
from ..host.elf import read_elf
from ..host.files import open_memfd
from ..host.processes import Process, process_of
from .hijack import GLIBC, HijackRefused, MappedRange, call, find_restorer, mappings

__all__ = ["main"]

_CODE = "qmp-memlistener-code"
_RTLD_NOW = 2
_MFD_FLAGS = 3  # MFD_CLOEXEC, MFD_ALLOW_SEALING
_LIBC = ("memfd_create", "dlopen", "close")


def main() -> int:
    """Exit code 0 when it was carried out."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it takes milliseconds
    verb, key, path = sys.argv[1:]
    stopped: list[int] = []
    error = None
    try:
        process = process_of(key)
        if process is None:
            raise HijackRefused("QEMU has ended")
        _Injection(process, Path(path), stopped).run(verb)
    except HijackRefused as refused:
        error = str(refused)
    except MissingPrerequisite as unavailable:
        error = unavailable.message
    except OSError as failed:
        error = f"the kernel refused it: {failed.strerror}"
    sys.stdout.write(json.dumps({"stopped_ns": stopped, "error": error}) + "\n")
    return 1 if error else 0


class _Injection:
    def __init__(self, process: Process, code: Path, stopped: list[int]) -> None:
        self._process = process
        self._pid = process.pid
        self._code = code
        self._stopped = stopped
        libc = _object(self._pid, GLIBC)
        if not libc:
            raise HijackRefused("it has no glibc mapped")
        self._functions = _addresses(_file_of(self._pid, libc[0]), libc, _LIBC)
        self._restorer = find_restorer(self._pid, libc)

    def run(self, verb: str) -> None:
        name = f"qmp_memlistener_{verb}"
        self._tidy()
        ours = self._loaded()
        if not ours:
            if verb == "detach":
                return
            ours = self._load()
        self._call(_addresses(str(self._code), ours, (name,))[name])

    def _tidy(self) -> None:
        """Close the memfd that an injector left which was killed.

        What that one began in QEMU is over when the main thread can be taken again.
        """
        while (found := open_memfd(self._process, _CODE)) is not None:
            number, handle = found
            os.close(handle)
            self._call(self._functions["close"], number)

    def _loaded(self) -> list[MappedRange]:
        return _object(self._pid, f"/memfd:{_CODE} (deleted)") or _object(
            self._pid, f"/{self._code.name}"
        )

    def _load(self) -> list[MappedRange]:
        """Our object, from a memfd of QEMU's: no file in its namespaces, no right of its user."""
        self._call(self._functions["memfd_create"], _CODE.encode(), _MFD_FLAGS)
        found = open_memfd(self._process, _CODE)
        if found is None:
            raise HijackRefused("it could not make a memfd (a seccomp filter of its own?)")
        number, handle = found
        with open(handle, "wb", closefd=True) as file:
            file.write(self._code.read_bytes())
        self._call(self._functions["dlopen"], f"/proc/self/fd/{number}".encode(), _RTLD_NOW)
        self._call(self._functions["close"], number)
        ours = self._loaded()
        if not ours:
            raise HijackRefused(
                "its dynamic linker did not load the object (another libc, or no /proc)"
            )
        return ours

    def _call(self, function: int, *arguments: int | bytes) -> None:
        self._stopped.append(call(self._pid, function, *arguments, restorer=self._restorer))


def _object(pid: int, suffix: str) -> list[MappedRange]:
    """The mappings of a shared object, the first one its beginning."""
    found = [m for m in mappings(pid) if m.path.endswith(suffix)]
    return found if found and found[0].offset == 0 else []


def _file_of(pid: int, mapping: MappedRange) -> str:
    """The mapped file itself, whatever the path means in our namespace."""
    link = f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"
    return link if os.access(link, os.R_OK) else f"/proc/{pid}/root{mapping.path}"


def _addresses(file: str, mapped: list[MappedRange], names: tuple[str, ...]) -> dict[str, int]:
    """Where exported functions are in the process.  Raises HijackRefused when one is missing."""
    found = {}
    for name, offset in read_elf(file, names).offsets.items():
        for m in mapped:
            if m.offset <= offset < m.offset + (m.end - m.start) and "x" in m.perms:
                found[name] = m.start + offset - m.offset
    for name in names:
        if name not in found:
            raise HijackRefused(f"{os.path.basename(file)} does not export {name}")
    return found


if __name__ == "__main__":
    sys.exit(main())
