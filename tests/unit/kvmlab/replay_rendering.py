"""Histories of slots that QEMU's rules give for random maps, and the logs QEMU would have written.

The truth that `read_replay` has to find again: operations, tables, and what is behind each slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from hypothesis import strategies as st

from qmp_memlistener.kvmlab.replay.read import ReplayInput, ReplayTransition
from qmp_memlistener.memslots import (
    LogChange,
    Op,
    OpKind,
    Order,
    Plan,
    PlanStrategy,
    Rules,
    Slot,
    SlotTable,
    plan,
    plan_all,
)
from qmp_memlistener.topology import FlatView
from tests.unit.memslots.memslots_model import ram, views

PLAIN, PLAIN_8, SPLIT = "7.2", "8.2", "9.1"
ORDERS = {PLAIN: Order.V7_2, PLAIN_8: Order.V8_0, SPLIT: Order.V8_0}
STAMPS = ("", "4711@1700000000.{:06}:", "2023-11-14T22:13:20.{:06}Z ")

# RAM blocks as mmap would place them: none touches another, none at its gpa's distance.
HVA = {
    name: 0x7F00_0000_0000 + i * (1 << 33)
    for i, name in enumerate(("pc.ram", "dimm", "vga.vram", "pc.rom", "flash", "vfio"))
}


@dataclass(frozen=True)
class Step:
    """One commit: its operations with the host address of each, and the tables around it."""

    ops: tuple[Op, ...]
    hvas: tuple[int, ...]
    before: SlotTable
    after: SlotTable


def hva_of(slot: Slot) -> int:
    assert slot.block is not None
    assert slot.offset is not None
    return HVA[slot.block] + slot.offset


def history(maps: Iterable[FlatView], logs: Iterable[bool | None], order: Order) -> list[Step]:
    """QEMU goes from map to map; `logs` says where a migration begins or ends.

    Commits without operations leave no trace and are left out.
    """
    steps: list[Step] = []
    table, old = SlotTable(), FlatView(())
    rules = Rules(order)
    for new, migration in zip(maps, logs, strict=True):
        log = LogChange(migration=migration) if migration is not None else None
        done = plan(old, new, PlanStrategy.QEMU, table=table, rules=rules, log=log)
        if done.ops:
            hvas = [
                hva_of(slot)
                for op in done.ops
                if (slot := (done.before if op.op is OpKind.DELETE else done.after).get(0, op.slot))
            ]
            steps.append(Step(done.ops, tuple(hvas), done.before, done.after))
        table, old = done.after, new
    return steps


@st.composite
def histories(draw: st.DrawFn, order: Order) -> list[Step]:
    """QEMU's first slot is RAM, and no migration runs then."""
    maps = draw(st.lists(views(), min_size=1, max_size=6))
    logs = draw(
        st.lists(st.sampled_from((None, None, True, False)), min_size=len(maps), max_size=len(maps))
    )
    return history([FlatView((ram(0, 4096),)), *maps], [None, *logs], order)


def line(op: Op, hva: int, form: str, ret: int = 0) -> str:
    """The line of `kvm_set_user_memory` for an operation of address space 0 or 1."""
    size, flags = (0, 0) if op.op is OpKind.DELETE else (op.size, op.flags)
    what = f"flags={flags:#x} gpa={op.gpa:#x} size={size:#x} ua={hva:#x}"
    if form == SPLIT:
        memfd = "guest_memfd=-1 guest_memfd_offset=0x0"
        return f"kvm_set_user_memory AddrSpace#{op.as_id} Slot#{op.slot} {what} {memfd} ret={ret}"
    return f"kvm_set_user_memory Slot#{op.as_id << 16 | op.slot} {what} ret={ret}"


def lines(steps: Sequence[Step], form: str, *, marked: bool) -> list[str]:
    out: list[str] = []
    for i, step in enumerate(steps):
        if marked:
            out += [f"flatview_new {0x55D0_0000 + i:#x} (root {root})" for root in ("(nil)", "0x5")]
        out += [line(op, hva, form) for op, hva in zip(step.ops, step.hvas, strict=True)]
    return out


def write(path: Path, text: Sequence[str], stamp: str = "", end: str = "\n") -> str:
    stamped = (stamp.format(i) + part for i, part in enumerate(text))
    path.write_bytes("".join(part + end for part in stamped).encode())
    return str(path)


def ops_of(found: ReplayInput) -> list[Op]:
    return [op for t in found.transitions for op in t.ops]


def planned(found: ReplayInput, t: ReplayTransition) -> Plan:
    """QEMU's plan for a transition, as the lab makes it."""
    return plan(
        t.view_before, t.view_after, PlanStrategy.QEMU, table=t.before, rules=found.rules, log=t.log
    )


def check(found: ReplayInput) -> None:
    """What must hold of whatever was read: KVM would accept it, and every strategy can do it."""
    table = found.initial
    for t in found.transitions:
        assert t.before == table
        assert len(t.ops) == len(t.rets) == len(t.slots) > 0
        assert run(t) == t.after
        table = t.after
        as_ids = {*t.before.as_ids(), *t.after.as_ids()}
        reachable = {as_id: t.after.mapped(as_id) for as_id in as_ids}
        for done in plan_all(
            t.view_before, t.view_after, table=t.before, rules=found.rules, log=t.log
        ):
            for as_id, ranges in reachable.items():
                assert done.after.mapped(as_id) == ranges, (t.seq, done.strategy)
            if done.strategy not in (PlanStrategy.QEMU, PlanStrategy.HOLE_SPLIT):
                assert done.atomic, (t.seq, done.strategy)
    sizes = {block.name: block.size for block in found.blocks}
    assert len(sizes) == len(found.blocks)
    for slot in slots_of(found):
        assert slot.block is not None
        assert slot.offset is not None
        assert slot.offset % 4096 == 0
        assert 0 <= slot.offset < slot.offset + slot.size <= sizes[slot.block]


def slots_of(found: ReplayInput) -> Iterator[Slot]:
    """Every slot that there ever is."""
    yield from found.initial
    for t in found.transitions:
        yield from t.after


def run(t: ReplayTransition) -> SlotTable:
    """The operations one by one, as KVM takes them; SlotTable refuses overlaps and ids in use."""
    table = t.before.copy()
    for op, ret, slot in zip(t.ops, t.rets, t.slots, strict=True):
        if ret != 0:
            continue
        if op.op is not OpKind.ADD:
            was = table.remove(op.as_id, op.slot)
            assert (was.gpa, was.size) == (op.gpa, op.size)
            if op.op is OpKind.FLAGS:
                assert (was.flags ^ op.flags) & ~1 == 0
        if op.op is not OpKind.DELETE:
            assert (slot.slot, slot.gpa, slot.size, slot.flags) == (
                op.slot, op.gpa, op.size, op.flags,
            )  # fmt: skip
            table.add(slot)
    return table


def check_backing(found: ReplayInput, truth: Iterable[tuple[Slot, int]]) -> None:
    """A byte of a block is at one of QEMU's addresses; `truth` tells where slots really begin."""
    base: dict[str, int] = {}
    for slot, hva in truth:
        assert slot.block is not None
        assert slot.offset is not None
        assert base.setdefault(slot.block, hva - slot.offset) == hva - slot.offset, slot
    assert set(base) <= {block.name for block in found.blocks}


def check_apart(found: ReplayInput, truth: Iterable[tuple[Slot, int]]) -> None:
    """And one of QEMU's addresses is in one block."""
    size = {block.name: block.size for block in found.blocks}
    at = {s.block: hva - (s.offset or 0) for s, hva in truth if s.block is not None}
    assert set(at) == set(size)
    places = sorted((start, start + size[name]) for name, start in at.items())
    assert all(a[1] <= b[0] for a, b in pairwise(places))
