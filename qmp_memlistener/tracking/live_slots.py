"""The memslots of a running guest, as far as they are known from outside.

KVM cannot be asked for its slots.  At attach the table is what QEMU's rules give for the map, with
the ids unknown; every traced operation then tells an id and a host address, and with the host
address which RAM block a slot shows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from operator import attrgetter, itemgetter

import msgspec
from msgspec.structs import replace

from ..memslots import READONLY, OpKind, Rules, Slot, SlotTable, slot_table
from ..records import SlotOp
from ..topology import (
    Extent,
    FlatRange,
    FlatView,
    Kind,
    MemoryMap,
    Transition,
    diff,
    ram_blocks,
    shared_extents,
)

__all__ = ["UNKNOWN_BLOCK", "LiveSlot", "LiveSlots", "SlotMaps"]

UNKNOWN_BLOCK = "RAM of slot "
"""What a section of a RAM block that is not known yet is called, with the slot's id behind it."""

_KEPT_MAPS = 16


class LiveSlot(msgspec.Struct, frozen=True, gc=False):
    """A slot; `slot` and `hva` are None until an operation has them, so is `block` until known."""

    as_id: int
    slot: int | None
    gpa: int
    size: int
    flags: int
    hva: int | None
    block: str | None
    owner: str | None
    offset: int

    @property
    def end(self) -> int:
        return self.gpa + self.size


class LiveSlots:
    """Slots by address space and gpa, and the host addresses of RAM blocks."""

    def __init__(self, maps: Mapping[int, MemoryMap], rules: Rules) -> None:
        self._rules = rules
        self._slots: dict[tuple[int, int], LiveSlot] = {}
        self._ids: Counter[tuple[int, int]] = Counter()  # how many of `_slots` have it
        self._taken: dict[int, set[int]] = {}  # ids that slots without a known id must have
        self._tops: dict[int, int] = {}
        self._bases: list[tuple[int, str, str | None]] = []  # hva of offset 0, block, owner
        self._spans: dict[tuple[str, str | None], int] = {}
        self._shapes: dict[tuple[int, int, str, int], FlatRange] = {}
        self.learn(maps)
        for slot in slot_table({a: m.view for a, m in maps.items()}, rules):
            self._slots[slot.as_id, slot.gpa] = LiveSlot(
                slot.as_id, None, slot.gpa, slot.size, slot.flags, None,
                slot.block, slot.owner, slot.offset or 0,
            )  # fmt: skip

    @classmethod
    def of(cls, slots: Sequence[LiveSlot], rules: Rules) -> LiveSlots:
        """These slots, of a guest whose map is not known."""
        new = cls({}, rules)
        new._slots.update({(s.as_id, s.gpa): s for s in slots})
        new._ids.update((s.as_id, s.slot) for s in slots if s.slot is not None)
        return new

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[LiveSlot]:
        return map(itemgetter(1), sorted(self._slots.items()))  # no two keys are equal

    def copy(self) -> LiveSlots:
        """The slots as they are now; what is known of RAM blocks is shared."""
        new = LiveSlots.__new__(LiveSlots)
        new.__dict__.update(self.__dict__)
        new._slots = dict(self._slots)  # noqa: SLF001 - our own kind
        new._ids = self._ids.copy()  # noqa: SLF001
        new._taken = {as_id: set(ids) for as_id, ids in self._taken.items()}  # noqa: SLF001
        new._tops = dict(self._tops)  # noqa: SLF001
        return new

    @property
    def ids_known(self) -> bool:
        """Every slot has been seen in an operation, so ids can be predicted."""
        return all(s.slot is not None for s in self._slots.values())

    def learn(self, maps: Mapping[int, MemoryMap]) -> None:
        """Note how large each RAM block is and what its ranges look like."""
        for m in maps.values():
            for b in m.ram_blocks:
                span = max(e.offset + e.size for e in b.mapped)
                key = (b.name, b.owner)
                self._spans[key] = max(span, self._spans.get(key, 0))
            for r in m.view:
                if r.kind.backed:
                    self._shapes[r.start, r.size, r.name, r.offset] = r
        for (as_id, gpa), s in list(self._slots.items()):
            here = maps.get(as_id)
            shown = here.view.lookup(gpa) if here is not None and s.block is None else None
            if shown is None or not shown.kind.backed:
                continue
            offset = shown.offset + gpa - shown.start
            self._slots[as_id, gpa] = replace(s, block=shown.name, owner=shown.owner, offset=offset)
            if s.hva is not None:
                self._note_base(s.hva, shown.name, shown.owner, offset)

    def take_names(self, marked: LiveSlots) -> None:
        """Name our slots as in `marked`, an older copy of us, where they are still the same."""
        for key, s in list(self._slots.items()):
            named = marked._slots.get(key)
            if s.block is None and named is not None and (named.slot, named.hva) == (s.slot, s.hva):
                self._slots[key] = replace(
                    s, block=named.block, owner=named.owner, offset=named.offset
                )

    def complete(self, op: SlotOp) -> SlotOp:
        """An operation as it came, with what the slots tell of it: whether it is an add or changes
        flags, and the size of what a delete takes away (0 when we do not know the slot)."""
        old = self._slots.get((op.as_id, op.gpa))
        if op.op is OpKind.DELETE:
            return replace(op, size=old.size) if old is not None else op
        same = old is not None and old.size == op.size
        kind = OpKind.FLAGS if same else OpKind.ADD
        return op if op.op is kind else replace(op, op=kind)

    def apply(self, op: SlotOp) -> None:
        """Fold a complete operation in; one that KVM refused changes nothing."""
        if op.ret != 0:
            return
        key = (op.as_id, op.gpa)
        old, hva = self._slots.get(key), op.hva or 0
        self._learn_ids(op)
        if op.op is OpKind.DELETE:
            if old is not None:
                del self._slots[key]
                self._count_id(old, -1)
                if old.block is not None:
                    self._note_base(hva, old.block, old.owner, old.offset)
            return
        block, owner, offset = self._backing(hva, op.size)
        if op.op is OpKind.FLAGS and old is not None and block is None:
            block, owner, offset = old.block, old.owner, old.offset
        new = LiveSlot(op.as_id, op.slot, op.gpa, op.size, op.flags, hva, block, owner, offset)
        if old is not None:
            self._count_id(old, -1)
        self._count_id(new, 1)
        self._slots[key] = new

    def view(self, slots: Iterable[LiveSlot], previous: FlatView) -> FlatView:
        """The `memory` view that `slots` give: RAM and ROM from them, the rest as in `previous`.

        What covers a new hole is not known, so nothing is put there.
        """
        ram: list[FlatRange] = []
        for s in slots:
            if s.as_id != 0:
                continue
            if s.block is None and s.hva is not None:
                block, owner, offset = self._backing(s.hva, s.size)
                s = replace(s, block=block, owner=owner, offset=offset)
            shape = self._shapes.get((s.gpa, s.size, s.block or "", s.offset))
            ram.append(shape or _range(s))
        starts = [r.start for r in ram]
        out = list(ram)
        for r in previous:
            if r.kind is Kind.IO:
                i = bisect_right(starts, r.start) - 1
                below = i < 0 or ram[i].end <= r.start
                above = i + 1 >= len(ram) or ram[i + 1].start >= r.end
                if below and above:
                    out.append(r)
        out.sort(key=attrgetter("start"))
        return FlatView(out, previous.address_space)

    def table(self) -> SlotTable:
        """The slots as a table.

        Where ids are not known they are those of a fresh start, or, once QEMU has given out an id,
        the ones that must be in use for that and then any that it would not give next.
        """
        slots: list[Slot] = []
        for as_id in sorted({s.as_id for s in self._slots.values()}):
            here = [s for s in self if s.as_id == as_id]
            known = {s.slot for s in here if s.slot is not None}
            taken = self._taken.get(as_id)
            guesses = [i for i in sorted(taken or ()) if i not in known]
            above = 1 + max((*known, *guesses), default=-1) if taken is not None else 0
            spare = (i for i in count(above) if i not in known)
            for s in here:
                slot_id = s.slot
                if slot_id is None:
                    slot_id = guesses.pop(0) if guesses else next(spare)
                slots.append(
                    Slot(s.as_id, slot_id, s.gpa, s.size, s.flags, s.block, s.owner, s.offset)
                )
        return SlotTable(slots)

    def compare(self, maps: Mapping[int, MemoryMap]) -> list[str]:
        """What differs from the slots that QEMU's rules give for `maps`, in words.

        Ids and dirty logging do not follow from a map and are left out.
        """
        wanted = {
            (s.as_id, s.gpa): s
            for s in slot_table({a: m.view for a, m in maps.items()}, self._rules)
        }
        out: list[str] = []
        for key in sorted({*wanted, *self._slots}):
            w, s = wanted.get(key), self._slots.get(key)
            where = f"address space {key[0]}, gpa {key[1]:#x}"
            if s is None and w is not None:
                out.append(f"{where}: predicted a slot of {w.size:#x} bytes, traced none")
            elif w is None and s is not None:
                out.append(f"{where}: traced a slot of {s.size:#x} bytes, predicted none")
            elif w is not None and s is not None:
                if w.size != s.size:
                    out.append(f"{where}: predicted {w.size:#x} bytes, traced {s.size:#x}")
                elif (w.flags ^ s.flags) & READONLY:
                    out.append(f"{where}: predicted flags {w.flags:#x}, traced {s.flags:#x}")
        return out

    def adopt(self, maps: Mapping[int, MemoryMap]) -> None:
        """Start again from the rules, keeping what was traced and still fits."""
        traced = dict(self._slots)
        fresh = LiveSlots(maps, self._rules)
        self._slots = {
            key: traced[key] if key in traced and traced[key].size == s.size else s
            for key, s in fresh._slots.items()
        }
        self._ids = Counter((s.as_id, s.slot) for s in self if s.slot is not None)
        self.learn(maps)

    def _count_id(self, slot: LiveSlot, change: int) -> None:
        if slot.slot is not None:
            self._ids[slot.as_id, slot.slot] += change

    def _learn_ids(self, op: SlotOp) -> None:
        """QEMU gives the lowest free id: those below it are in use, by slots we know or not."""
        taken = self._taken.setdefault(op.as_id, set())
        top = self._tops.get(op.as_id, 0)  # ids from here on have not been looked at
        if op.op is not OpKind.DELETE and op.slot >= top:
            taken |= {i for i in range(top, op.slot) if not self._ids[op.as_id, i]}
            self._tops[op.as_id] = op.slot + 1
        taken.discard(op.slot)

    def _backing(self, hva: int, size: int) -> tuple[str | None, str | None, int]:
        i = bisect_right(self._bases, hva, key=itemgetter(0)) - 1
        if i >= 0:
            base, block, owner = self._bases[i]
            if hva - base + size <= self._spans.get((block, owner), 0):
                return block, owner, hva - base
        return None, None, 0

    def _note_base(self, hva: int, block: str, owner: str | None, offset: int) -> None:
        entry = (hva - offset, block, owner)
        if entry not in self._bases:
            # a block that was freed may have left its address or its name to this one
            others = [b for b in self._bases if b[0] != entry[0] and b[1:] != entry[1:]]
            self._bases[:] = sorted([*others, entry], key=itemgetter(0))  # copies share the list


class SlotMaps:
    """Maps of `memory` that slots make of the map before, which gives all but RAM and ROM.

    A guest that goes back and forth between two maps is reported fast: what was worked out is kept.
    """

    def __init__(self, live: LiveSlots) -> None:
        self._live = live
        # by the map before, which is kept for its id, and the slots after
        self._known: dict[
            tuple[int, tuple[LiveSlot, ...]], tuple[MemoryMap, MemoryMap, Transition]
        ] = {}

    def of(self, old: MemoryMap, slots: tuple[LiveSlot, ...]) -> tuple[MemoryMap, Transition]:
        """The map when the slots have become these, and how it differs from `old`."""
        known = self._known.get((id(old), slots))
        if known is not None:
            return known[1:]
        view = self._live.view(slots, old.view)
        extents = [
            Extent(m.start, m.size, b.name, b.owner, m.offset)
            for b in old.ram_blocks
            for m in b.mapped
        ]
        shown = {(e.name, e.owner, e.start - e.offset) for e in extents}
        extents += [
            e for e in shared_extents(view) if (e.name, e.owner, e.start - e.offset) not in shown
        ]
        new = MemoryMap(view, ram_blocks(view, extents), rendered=True)
        new = next((m for _, m, _ in self._known.values() if m == new), new)
        transition = diff(old.view, new.view, old.ram_blocks, new.ram_blocks)
        if all(s.block is not None for s in slots):
            if len(self._known) >= _KEPT_MAPS:
                self._known.clear()
            self._known[id(old), slots] = (old, new, transition)
        return new, transition

    def forget(self) -> None:
        """More is known of the slots now, or the map is another."""
        self._known.clear()


def _range(s: LiveSlot) -> FlatRange:
    kind = Kind.ROM if s.flags & READONLY else Kind.RAM
    name = s.block if s.block is not None else f"{UNKNOWN_BLOCK}{s.slot}"
    return FlatRange(s.gpa, s.size, kind, name, s.offset, s.owner, kind, memslot=True)
