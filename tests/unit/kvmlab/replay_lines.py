"""Lines of a small guest's log, written by hand: a boot, a PAM write, and what a test adds."""

from __future__ import annotations

from pathlib import Path

from qmp_memlistener.kvmlab.replay.read import ReplayInput, read_replay
from qmp_memlistener.memslots import READONLY, Op, OpKind
from tests.unit.kvmlab.replay_rendering import SPLIT, check, line, write

MIB = 1 << 20
RAM, ROM, VGA = 0x7F00_0000_0000, 0x7F10_0000_0000, 0x7F20_0000_0000


def add(slot: int, gpa: int, size: int, hva: int, flags: int = 0, as_id: int = 0) -> str:
    return line(Op(OpKind.ADD, as_id, slot, gpa, size, flags), hva, SPLIT)


def delete(slot: int, gpa: int, hva: int, as_id: int = 0) -> str:
    return line(Op(OpKind.DELETE, as_id, slot, gpa), hva, SPLIT)


def read(tmp_path: Path, *text: str) -> ReplayInput:
    found = read_replay(write(tmp_path / "log", text))
    check(found)
    return found


def shape(found: ReplayInput) -> list[list[tuple[str, int, int, int]]]:
    return [[(str(o.op), o.slot, o.gpa, o.size) for o in t.ops] for t in found.transitions]


BOOT = (
    add(0, 0, 0xA0000, RAM),
    add(1, 0xC0000, 0x20000, ROM, READONLY),
    add(2, 0xE0000, 15 * MIB, RAM + 0xE0000),
)
PAM = (
    delete(2, 0xE0000, RAM + 0xE0000),
    add(2, 0xE0000, 0x10000, RAM + 0xE0000),
    add(3, 0xF0000, 15 * MIB - 0x10000, RAM + 0xF0000),
)


def view(root: str = "(nil)") -> str:
    return f"flatview_new 0x55d000001000 (root {root})"
