"""What one hit costs on this machine: a uprobe on ourselves."""

from __future__ import annotations

import ctypes
import threading
import time

from .perf import Architecture, Ring, open_dummy, open_uprobe, set_enabled, set_output

__all__ = ["USUAL_HIT_NS", "measure_hit"]

USUAL_HIT_NS = 5_000
"""Taken where it cannot be measured: more than any of ours was."""

_CALLS = 200
_ROUNDS = 7
_MARGIN = 2
"""A hit of a program with colder caches, other instructions and more threads costs more."""


_known: dict[int, int] = {}
"""What was measured, by PMU: once in the life of a process is enough."""


def measure_hit(arch: Architecture, pmu: int) -> tuple[int, list[int]]:
    """What one hit costs at most, in ns, and the descriptors that are to be released.

    The function is one of the Python interpreter's own, which only Python programs have mapped; the
    breakpoint is in this process only.  Takes 5 ms, the first time.
    """
    if pmu in _known:
        return _known[pmu], []
    cost, fds = _measure(arch, pmu)
    _known[pmu] = cost
    return cost, fds


def _measure(arch: Architecture, pmu: int) -> tuple[int, list[int]]:
    function = ctypes.pythonapi.Py_GetVersion
    function.restype = ctypes.c_void_p
    address = ctypes.cast(function, ctypes.c_void_p).value or 0
    where = _file_of(address)
    if where is None:
        return USUAL_HIT_NS, []
    tid = threading.get_native_id()
    fds: list[int] = []
    try:
        bare = _per_call(function)
        owner, _ = open_dummy(arch, tid)
        fds.append(owner)
        ring = Ring(owner, 1 << 18)
        try:
            for is_return in (True, False):
                fd, _ = open_uprobe(arch, pmu, *where, tid, is_return=is_return)
                fds.append(fd)
                set_output(fd, owner)
                set_enabled(fd, True)
            both = _per_call(function)
            for fd in fds:
                set_enabled(fd, False)
        finally:
            ring.close()
    except OSError:
        return USUAL_HIT_NS, fds
    return max(1, both - bare) // 2 * _MARGIN, fds


def _per_call(function: ctypes._NamedFuncPointer) -> int:
    """The median of some rounds, in ns."""
    found = []
    for _ in range(_ROUNDS):
        start = time.perf_counter_ns()
        for _ in range(_CALLS):
            function()
        found.append((time.perf_counter_ns() - start) // _CALLS)
    return sorted(found)[_ROUNDS // 2]


def _file_of(address: int) -> tuple[bytes, int] | None:
    """The file that is mapped at an address of ours, and the place in it."""
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            span, _, offset, _, _, *path = line.split(None, 5)
            start, end = (int(x, 16) for x in span.split(b"-"))
            if start <= address < end and path:
                return path[0].strip(), address - start + int(offset, 16)
    return None
