"""Random views, and a page-by-page VM that carries out plans: the independent truth in tests.

The VM knows nothing of the package's tables: it keeps, for each slot, which half pages are
mapped and what host memory shows there, and refuses what KVM would refuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec
from hypothesis import strategies as st

from qmp_memlistener.memslots import Op, OpKind, Plan, Slot, SlotTable
from qmp_memlistener.records import SlotOp
from qmp_memlistener.topology.model import FlatRange, FlatView, Kind

PAGE = 4096
PAGES = 24

Content = tuple[str, int]  # block, offset


def view_of(*ranges: FlatRange) -> FlatView:
    return FlatView(ranges)


def ram(start: int, size: int, name: str = "pc.ram", offset: int | None = None) -> FlatRange:
    """RAM at its usual place: the offset is the address."""
    at = start if offset is None else offset
    return FlatRange(start, size, Kind.RAM, name, at, region_kind=Kind.RAM)


def io(start: int, size: int, name: str = "mmio") -> FlatRange:
    return FlatRange(start, size, Kind.IO, name, 0, region_kind=Kind.IO)


def rom(start: int, size: int, name: str = "pc.rom", offset: int = 0) -> FlatRange:
    return FlatRange(start, size, Kind.ROM, name, offset, region_kind=Kind.ROM)


def pam_rom(start: int, size: int) -> FlatRange:
    """Main RAM behind a read-only alias."""
    return FlatRange(start, size, Kind.ROM, "pc.ram", start, region_kind=Kind.RAM)


REGIONS = {
    "pc.ram": (Kind.RAM, (Kind.RAM, Kind.ROM)),
    "dimm": (Kind.RAM, (Kind.RAM,)),
    "vga.vram": (Kind.RAM, (Kind.RAM,)),
    "pc.rom": (Kind.ROM, (Kind.ROM,)),
    "flash": (Kind.ROMD, (Kind.ROMD,)),
    "vfio": (Kind.RAMD, (Kind.RAMD,)),
    "mmio": (Kind.IO, (Kind.IO,)),
}


@st.composite
def views(draw: st.DrawFn, aligned: bool = False) -> FlatView:
    """A view of up to a dozen ranges in `PAGES` pages, with blocks at one of three places."""
    grain = PAGE if aligned else PAGE // 2
    top = PAGES * PAGE // grain
    cuts = sorted(draw(st.sets(st.integers(0, top), min_size=2, max_size=13)))
    ranges: list[FlatRange] = []
    for low, high in pairwise(cuts):
        name = draw(st.sampled_from((*REGIONS, "pc.ram", "pc.ram", "")))
        if not name:
            continue
        region_kind, kinds = REGIONS[name]
        delta = draw(st.sampled_from((0, 0, 0, 64, 128))) * PAGE
        ranges.append(
            FlatRange(
                low * grain,
                (high - low) * grain,
                draw(st.sampled_from(kinds)),
                name,
                low * grain + delta,
                region_kind=region_kind,
            )
        )
    return FlatView(ranges)


def content_of(view: FlatView) -> dict[int, Content]:
    """What host memory each page of a view shows, by page number, as slots of `PAGE` can."""
    out: dict[int, Content] = {}
    for r in view:
        if r.kind is Kind.IO:
            continue
        for page in range(-(-r.start // PAGE), r.end // PAGE):
            out[page] = (r.name, r.offset + page * PAGE - r.start)
    return out


@dataclass
class VmSlot:
    gpa: int
    size: int
    flags: int
    content: dict[int, Content]  # of every page of the slot, whether in a hole or not
    mapped: set[int]
    dirty: set[int] = field(default_factory=set)


class Vm:
    """One address space of a VM with holes and batches."""

    def __init__(self, table: Iterable[Slot]) -> None:
        self.slots: dict[int, VmSlot] = {}
        for slot in table:
            pages = {p for low, high in slot.mapped for p in range(low // PAGE, high // PAGE)}
            assert slot.block is not None
            assert slot.offset is not None
            self.slots[slot.slot] = self.make(slot.gpa, slot.size, slot.flags, slot)
            self.slots[slot.slot].mapped = pages

    @staticmethod
    def make(gpa: int, size: int, flags: int, slot: Slot) -> VmSlot:
        assert slot.block is not None
        assert slot.offset is not None
        assert gpa % PAGE == size % PAGE == 0
        first = gpa // PAGE
        content = {
            p: (slot.block, slot.offset + p * PAGE - slot.gpa)
            for p in range(first, first + size // PAGE)
        }
        return VmSlot(gpa, size, flags, content, set(content))

    def reach(self) -> dict[int, Content]:
        """What the guest reaches; two slots must not show one page."""
        out: dict[int, Content] = {}
        for slot in self.slots.values():
            for page in slot.mapped:
                assert page not in out, f"two slots map page {page:#x}"
                out[page] = slot.content[page]
        return out

    def run(self, ops: Iterable[Op], after: SlotTable) -> Iterator[dict[int, Content]]:
        """Carry the ops out; yields what the guest reaches in each state that it can observe."""
        closed = 0
        for op in ops:
            match op.op:
                case OpKind.PARK | OpKind.BATCH_BEGIN:
                    closed += 1
                case OpKind.UNPARK | OpKind.BATCH_COMMIT:
                    closed -= 1
                case OpKind.DELETE:
                    gone = self.slots.pop(op.slot)
                    assert (gone.gpa, gone.size) == (op.gpa, op.size)
                case OpKind.ADD:
                    assert op.slot not in self.slots
                    slot = after.get(op.as_id, op.slot)
                    assert slot is not None
                    self.slots[op.slot] = self.make(op.gpa, op.size, op.flags, slot)
                case OpKind.FLAGS:
                    live = self.slots[op.slot]
                    assert (live.gpa, live.size) == (op.gpa, op.size)
                    assert live.flags ^ op.flags == 1, "only the dirty log changes live"
                    live.flags = op.flags
                    live.dirty = set()
                case OpKind.SET_HOLE | OpKind.CLEAR_HOLE:
                    live = self.slots[op.slot]
                    pages = set(range(op.gpa // PAGE, op.end // PAGE))
                    assert pages
                    assert pages <= set(live.content)
                    if op.op is OpKind.SET_HOLE:
                        assert pages <= live.mapped
                        live.mapped -= pages
                        live.dirty -= pages
                    else:
                        assert not pages & live.mapped
                        live.mapped |= pages
            if not closed:
                yield self.reach()


def observed_gaps(
    before: Mapping[int, Content],
    states: list[dict[int, Content]],
) -> dict[int, int]:
    """Pages that are there before and after, and in how many states between they are not."""
    after = states[-1] if states else before
    gaps = {page: sum(page not in s for s in states[:-1]) for page in before if page in after}
    return {page: n for page, n in gaps.items() if n}


def traced_op(as_id: int, slot: int, gpa: int, size: int, flags: int, ret: int = 0) -> SlotOp:
    """An operation as QEMU's trace shows it: `size` 0 deletes."""
    return SlotOp(
        t_ns=0,
        as_id=as_id,
        slot=slot,
        op=OpKind.ADD if size else OpKind.DELETE,
        gpa=gpa,
        size=size,
        flags=flags,
        ret=ret,
    )


def as_traced(op: Op) -> SlotOp | None:
    """What QEMU's trace shows of a planned operation that succeeds, None when it shows nothing.

    A delete is traced with size 0 and flags 0 (`kvm_set_phys_mem` clears both before the ioctl,
    accel/kvm/kvm-all.c).
    """
    if op.op is OpKind.DELETE:
        return traced_op(op.as_id, op.slot, op.gpa, 0, 0)
    if op.op is OpKind.ADD or op.op is OpKind.FLAGS:
        return traced_op(op.as_id, op.slot, op.gpa, op.size, op.flags)
    return None


def fold(table: SlotTable, ops: Iterable[SlotOp]) -> SlotTable:
    """The table after traced ops, as KVM sees it; `table` itself is not touched.

    Size 0 deletes; a live id with another range or flags is set anew; an op that failed
    (`ret` not 0) changes nothing.  A delete of an id that is not there is passed over: the trace
    began too late for it.  A slot keeps the name of what backs it while its range stays.
    Raises InputError when a slot comes where another one is: lines of the trace are missing.
    """
    after = table.copy()
    for op in ops:
        if op.ret != 0:
            continue
        old = after.get(op.as_id, op.slot)
        if old is not None:
            after.remove(op.as_id, op.slot)
        if op.size == 0:
            continue
        if old is not None and (old.gpa, old.size) == (op.gpa, op.size):
            after.add(msgspec.structs.replace(old, flags=op.flags))
        else:
            after.add(Slot(op.as_id, op.slot, op.gpa, op.size, op.flags))
    return after


def ops(done: Plan) -> list[tuple[str, int, int, int, int]]:
    """The ops as (what, slot, gpa, size, flags), all of one address space."""
    assert {o.as_id for o in done.ops} <= {0}
    return [(o.op.value, o.slot, o.gpa, o.size, o.flags) for o in done.ops]


def traced(done: Plan) -> list[tuple[int, int, int, int]]:
    """What QEMU's trace would print: slot, flags, gpa, size."""
    lines = [as_traced(o) for o in done.ops]
    return [(t.slot, t.flags, t.gpa, t.size) for t in lines if t is not None]


def table_of(*slots: tuple[int, int, int, int]) -> SlotTable:
    return SlotTable(Slot(0, i, gpa, size, flags) for i, gpa, size, flags in slots)
