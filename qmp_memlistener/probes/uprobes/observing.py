"""From windows to observations: names, call sites, and what is too short to be reported.

Called in the reader's thread.  When to look and where to deliver is `probe`'s business.

A thread is `main`, `CPU 0`, a name of its own, or `tid 1234`.  Source files and commands are
constant strings of the running QEMU, read once each from /proc/PID/mem, at addresses that lie in
the program's read-only data for as long as it runs.  Nothing that QEMU changes is read there: it
would be another value by then.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ...qmp.guest import GuestVcpu
from ...records import CommandRecord
from ..model import Observation, StallKind
from .calls import CommandSpan, Site, Window

__all__ = ["FLOOR_NS", "Observer", "QUERY_FLOOR_NS", "Strings", "ThreadNames"]

FLOOR_NS = 100_000
"""Shorter waits, holds and commits without slot updates are counted, not reported."""

QUERY_FLOOR_NS = 1_000_000
"""Shorter commands that only ask (query-*) are not reported: a client may ask all the time."""

_EVERYBODY = (StallKind.VCPU_INHIBIT, StallKind.VCPU_PAUSE)
"""All vCPUs stall in these, whichever thread brought it about."""

_FLOORED = (StallKind.COMMIT, StallKind.BQL_WAIT, StallKind.BQL_HOLD)


@dataclass(slots=True)
class _Short:
    count: int = 0
    total_ns: int = 0


@dataclass(slots=True)
class Observer:
    """Makes observations for `probe`; `must_see` lowers the floor of a kind."""

    probe: str
    names: ThreadNames
    must_see: Mapping[StallKind, int]
    _short: dict[StallKind, _Short] = field(default_factory=lambda: {k: _Short() for k in _FLOORED})

    def observe(self, windows: list[Window], strings: Strings) -> list[Observation]:
        """The windows that are reported; commits inside others never are."""
        return [self._observation(w, strings) for w in windows if not w.inner and self._long(w)]

    @property
    def floor_ns(self) -> int:
        """Shorter commits without slot updates are not reported."""
        return min(FLOOR_NS, self.must_see.get(StallKind.COMMIT, FLOOR_NS))

    def add_short_commits(self, count: int, total_ns: int) -> None:
        """The reader has counted some and made no windows of them."""
        short = self._short[StallKind.COMMIT]
        short.count += count
        short.total_ns += total_ns

    def commands(self, commands: list[CommandSpan], strings: Strings) -> list[CommandRecord]:
        """The commands that are reported: those whose name can be read."""
        found = []
        for command in commands:
            name = strings.command(command.info) if command.info else "hmp"
            start, end = command.start_ns, command.end_ns
            asks = name is not None and name.startswith("query-")
            if name is not None and not (asks and end - start < QUERY_FLOOR_NS):
                found.append(
                    CommandRecord(
                        name=name, start_ns=start, busy_until_ns=end, end_ns=end, probe=self.probe
                    )
                )
        return found

    def counts(self) -> dict[str, int | float | str]:
        """How many windows of each kind were not reported, and their time in all."""
        values: dict[str, int | float | str] = {}
        for kind, short in self._short.items():
            values[f"short_{kind}"] = short.count
            values[f"short_{kind}_ns"] = short.total_ns
        return values

    def _long(self, window: Window) -> bool:
        short = self._short.get(window.kind)
        if short is None or window.updates:
            return True
        length = window.end_ns - window.start_ns
        if length >= min(FLOOR_NS, self.must_see.get(window.kind, FLOOR_NS)):
            return True
        short.count += 1
        short.total_ns += length
        return False

    def _observation(self, window: Window, strings: Strings) -> Observation:
        length = window.end_ns - window.start_ns
        everybody = window.kind in _EVERYBODY
        return Observation(
            window.kind,
            window.start_ns,
            window.end_ns,
            min(window.at_least_ns, length),
            length,
            self.probe,
            thread=None if everybody else self.names[window.tid],
            tid=None if everybody else window.tid,
            site=strings.site(window.site) if window.site is not None else None,
            update=window.update,
            handoffs=window.handoffs,
        )


_VCPU = re.compile(r"CPU (\d+)/\w+")  # with -name debug-threads=on


class ThreadNames:
    """Names by thread id as the host counts; QEMU in a container counts otherwise."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._vcpus: dict[int, str] = {}
        self._others: dict[int, str] = {}

    def learn_vcpus(self, vcpus: Iterable[GuestVcpu]) -> None:
        """These are the threads of the vCPUs."""
        threads: dict[int, list[int]] = {}
        for cpu in vcpus:
            threads.setdefault(cpu.thread_id, []).append(cpu.cpu_index)
        inner = {self._inner(tid): tid for tid in self._tids()}
        # TCG with one thread for all: it is named after all of them
        self._vcpus = {
            inner.get(tid, tid): "CPU " + ",".join(map(str, sorted(cpus)))
            for tid, cpus in threads.items()
        }

    def __getitem__(self, tid: int) -> str:
        if tid == self._pid:
            return "main"
        name = self._vcpus.get(tid) or self._others.get(tid)
        if name is None:
            name = self._others[tid] = self._own(tid)
        return name

    def forget(self, tid: int) -> None:
        """Its id is another thread's now, or its name may have changed."""
        self._others.pop(tid, None)

    def _own(self, tid: int) -> str:
        """The name it gave itself; one that it merely has from the process is none."""
        name, process = self._comm(tid), self._comm(self._pid)
        vcpu = _VCPU.fullmatch(name)
        if vcpu is not None:
            return f"CPU {vcpu[1]}"
        return name if name and name != process else f"tid {tid}"

    def _comm(self, tid: int) -> str:
        try:
            with open(f"/proc/{self._pid}/task/{tid}/comm", encoding="utf-8") as file:
                return file.read().strip()
        except (OSError, UnicodeDecodeError):
            return ""

    def _tids(self) -> list[int]:
        try:
            return [int(name) for name in os.listdir(f"/proc/{self._pid}/task")]
        except OSError:
            return []

    def _inner(self, tid: int) -> int:
        """The id by which QEMU itself knows its thread (NSpid, Linux 4.1)."""
        try:
            with open(f"/proc/{self._pid}/task/{tid}/status", encoding="utf-8") as file:
                for line in file:
                    if line.startswith("NSpid:"):
                        return int(line.split()[-1])
        except (OSError, ValueError):
            pass
        return tid


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
