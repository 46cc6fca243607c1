"""PURE: one line of a trace log in any form that people have, to what it says of slots.

QEMU's `log` backend prints `kvm_set_user_memory AddrSpace#0 Slot#1 flags=0x0 gpa=0x0 ... ret=0`;
stderr, syslog, journald, ftrace and SystemTap put something in front of that, containers' logs and
journald's JSON something behind it, and downstream kernels more fields.  scripts/simpletrace.py,
LTTng and perf print the arguments of the event under the names, or in the order, of
accel/kvm/trace-events.  What counts is the event's name and what follows it as NAME=VALUE.

The decoder of a live log, which takes QEMU's own form alone and is faster, is
`monitor.trace_lines`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["SLOT_EVENT", "TraceLine", "read_trace_line"]

SLOT_EVENT = b"kvm_set_user_memory"

_EVENTS = (
    b"flatview_new",
    b"pci_update_mappings_add",
    b"pci_update_mappings_del",
    b"memory_device_pre_plug",
    b"memory_device_plug",
    b"memory_device_unplug",
)
# A console that ends in no newline may be right before it.
_NAME = re.compile(rb"(" + b"|".join((SLOT_EVENT, *_EVENTS)) + rb")(?![\w-])")
_PAIR = re.compile(
    rb"([A-Za-z_]\w{0,31})(?: ?= ?|#)(-?(?:0x[0-9a-fA-F]{1,16}|\d{1,20}))(?![0-9a-fA-Fx.])"
)
_NAMES = {
    b"as": "as_id",
    b"as_id": "as_id",
    b"AddrSpace": "as_id",
    b"slot": "slot",
    b"Slot": "slot",
    b"flags": "flags",
    b"gpa": "gpa",
    b"guest_phys_addr": "gpa",
    b"size": "size",
    b"memory_size": "size",
    b"ua": "ua",
    b"userspace_addr": "ua",
    b"fd": "guest_memfd",
    b"guest_memfd": "guest_memfd",
    b"fd_offset": "guest_memfd_offset",
    b"guest_memfd_offset": "guest_memfd_offset",
    b"ret": "ret",
}
_WANTED = ("slot", "flags", "gpa", "size", "ua", "ret")
# perf names arguments by their number; how many there are says which QEMU it was.
_IN_ORDER = {
    6: ("slot", "flags", "gpa", "size", "ua", "ret"),
    7: ("as_id", "slot", "flags", "gpa", "size", "ua", "ret"),
    9: (
        "as_id", "slot", "flags", "gpa", "size", "ua", "guest_memfd", "guest_memfd_offset", "ret",
    ),
}  # fmt: skip
_NUMBERED = re.compile(rb"arg(\d)")
_ROOT = re.compile(rb"(?:root(?: ?= ?| )|arg2=)(?:0x)?([0-9a-f]{1,16}\b|\(nil\))")
_PID_BEFORE = re.compile(rb"\[(\d{1,10})\]: $")
_PID_BEHIND = re.compile(rb" -?[\d.]{1,32} pid=(\d{1,10}) ")
_WORDS = (SLOT_EVENT, b"flatview_new", b"pci_update_mappings_", b"memory_device_")
_LIMITS = {"as_id": 1 << 32, "slot": 1 << 32, "flags": 1 << 32}


@dataclass(frozen=True, slots=True)
class TraceLine:
    """What a line says: `event`, and of a slot operation its numbers.

    `split`: it names the address space by itself, as QEMU does from 9.1 on; before, the upper 16
    bits of the slot's number are the address space.  `root` is that of a `flatview_new`.  `pid` is
    the process that wrote it, where the log says so of every line (journald, syslog, simpletrace).
    `usable` is False when it is a slot operation that cannot be read.
    """

    event: str
    usable: bool = True
    split: bool = False
    as_id: int = 0
    slot: int = 0
    flags: int = 0
    gpa: int = 0
    size: int = 0
    ua: int = 0
    ret: int = 0
    root: int = 0
    pid: int | None = None


def read_trace_line(line: bytes, *, cut: bool = False) -> TraceLine | None:
    """The event of a line about slots or a commit; None for any other line.

    `cut`: the line has no end, so a number at its end may go on, unless it is 0.
    """
    if not any(word in line for word in _WORDS):
        return None
    found = None
    for found in _NAME.finditer(line):  # noqa: B007 - the last one counts: lines run together
        pass
    if found is None:
        return None
    name, rest = found[1], line[found.end() :]
    whole = not cut or rest.endswith(b" ret=0")
    if name != SLOT_EVENT and not whole:
        return None
    if name == SLOT_EVENT:
        pid = _PID_BEFORE.search(line, max(0, found.start() - 16), found.start())
        told = _slot_line(rest, pid or _PID_BEHIND.match(rest))
        return told if whole or told is None else TraceLine("slot", usable=False)
    if name == b"flatview_new":
        root = _ROOT.search(rest)
        return None if root is None else TraceLine("flatview_new", root=_pointer(root[1]))
    return TraceLine(name.decode()) if b"=" in rest or b"," in rest else None


def _pointer(text: bytes) -> int:
    return 0 if text == b"(nil)" else int(text, 16)


def _slot_line(rest: bytes, pid: re.Match[bytes] | None) -> TraceLine | None:
    pairs: dict[str, int] = {}
    numbered: dict[int, int] = {}
    for m in _PAIR.finditer(rest):
        name = _NAMES.get(m[1])
        if name is not None:
            pairs.setdefault(name, int(m[2], 0) if b"x" in m[2] else int(m[2]))
        elif (number := _NUMBERED.fullmatch(m[1])) is not None:
            numbered.setdefault(int(number[1]), int(m[2], 0) if b"x" in m[2] else int(m[2]))
    order = _IN_ORDER.get(len(numbered))
    if order is not None and sorted(numbered) == list(range(1, len(order) + 1)):
        pairs = {name: numbered[i] for i, name in enumerate(order, 1)}
    elif not pairs and not numbered:
        return None  # somebody switches the event on
    unusable = TraceLine("slot", usable=False)
    if any(name not in pairs for name in _WANTED):
        return unusable
    for name, limit in _LIMITS.items():
        if not 0 <= pairs.get(name, 0) < limit:
            return unusable
    for name in ("gpa", "size", "ua", "ret"):
        if not -(1 << 63) <= pairs[name] < 1 << 64:
            return unusable
    for name in ("gpa", "size", "ua"):
        pairs[name] &= (1 << 64) - 1  # perf prints what has the highest bit as negative
    split = "as_id" in pairs
    slot = pairs["slot"]
    return TraceLine(
        "slot",
        split=split,
        as_id=pairs["as_id"] if split else slot >> 16,
        slot=slot & 0xFFFF,
        flags=pairs["flags"],
        gpa=pairs["gpa"],
        size=pairs["size"],
        ua=pairs["ua"],
        ret=_signed(pairs["ret"]),
        pid=int(pid[1]) if pid is not None else None,
    )


def _signed(number: int) -> int:
    """A C int that was printed as an unsigned one of 32 or 64 bits."""
    if 1 << 31 <= number < 1 << 32:
        return number - (1 << 32)
    return number - (1 << 64) if 1 << 63 <= number < 1 << 64 else number
