"""Into a QEMU, or out of it: `python -m qmp_memlistener.steer.injector attach|detach KEY OBJECT`.

KEY is `Process.key`.  A process of its own: whoever started QEMU and waits for it may not trace it.
It writes one JSON document: `{"stopped_ns": [...], "error": str | null}`, how long QEMU's main loop
did not do its own work, each time, and why nothing was done.  The answers of attach and detach are
in the channel.  It is killed when it holds QEMU for too long (see `hijack`), and then writes none.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..errors import MissingPrerequisite
from ..host.elf import read_elf
from ..host.files import open_memfd
from ..host.processes import Process, process_of
from .channel import State, open_channel
from .hijack import GLIBC, HijackedCall, HijackRefused, MappedRange, call, find_restorer, mappings

__all__ = ["main"]

_CODE = "qmp-memlistener-code"
_RTLD_NOW = 2
_MFD_FLAGS = 3  # MFD_CLOEXEC, MFD_ALLOW_SEALING
_LIBC = ("memfd_create", "dlopen", "close", "sched_setscheduler")


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
        self._tidy()
        ours = self._loaded()
        if ours:
            self._ask(ours, f"qmp_memlistener_{verb}")
        elif verb == "attach":
            self._load()  # which attaches it

    def _tidy(self) -> None:
        """Close the memfd that an injector left which was killed.

        What that one began in QEMU is over when the main thread can be taken again.
        """
        while (found := open_memfd(self._process, _CODE)) is not None:
            number, handle = found
            os.close(handle)
            self._call(HijackedCall(self._functions["close"], (number,)), ended=self._closed)

    def _loaded(self) -> list[MappedRange]:
        return _object(self._pid, f"/memfd:{_CODE} (deleted)") or _object(
            self._pid, f"/{self._code.name}"
        )

    def _ask(self, ours: list[MappedRange], name: str) -> None:
        function = _addresses(str(self._code), ours, (name,))[name]
        before = self._answers()

        def answered() -> int | None:
            state = self._state()
            return state.answered_ns if state and state.answers != before else None

        self._call(HijackedCall(function), ended=answered)

    def _load(self) -> None:
        """Our object, from a memfd of QEMU's: no file in its namespaces, no right of its user."""
        make = HijackedCall(self._functions["memfd_create"], (_CODE.encode(), _MFD_FLAGS))
        self._call(make, ended=self._made)
        found = open_memfd(self._process, _CODE)
        if found is None:
            raise HijackRefused("it could not make a memfd (a seccomp filter of its own?)")
        number, handle = found
        with open(handle, "wb", closefd=True) as file:
            file.write(self._code.read_bytes())
        path = f"/proc/self/fd/{number}".encode()
        before = self._answers()

        def loaded() -> int | None:
            state = self._state()
            return state.answered_ns if state and state.answers != before else self._closed()

        self._call(
            HijackedCall(self._functions["dlopen"], (path, _RTLD_NOW)),
            HijackedCall(self._functions["close"], (number,)),
            ended=loaded,
        )
        if not self._loaded():
            raise HijackRefused(
                "its dynamic linker did not load the object (another libc, or no /proc)"
            )

    def _state(self) -> State | None:
        channel = open_channel(self._process)
        if channel is None:
            return None
        with channel:
            return channel.state()

    def _answers(self) -> int:
        state = self._state()
        return state.answers if state else 0

    def _made(self) -> int | None:
        found = open_memfd(self._process, _CODE)
        if found is None:
            return None
        os.close(found[1])
        return time.monotonic_ns()

    def _closed(self) -> int | None:
        return time.monotonic_ns() if self._made() is None else None

    def _call(self, *calls: HijackedCall, ended: Callable[[], int | None]) -> None:
        took = call(
            self._pid,
            calls,
            restorer=self._restorer,
            ended=ended,
            scheduler=self._functions["sched_setscheduler"],
        )
        self._stopped.append(took)


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
