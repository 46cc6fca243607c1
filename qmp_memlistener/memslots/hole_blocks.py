"""RAM blocks at their places: the slots they have, what is mapped before and after, new ids.

The arithmetic under the `hole` strategy; `hole` itself says what is done about it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import msgspec

from ..topology.model import FlatView
from .dirty_log import DirtyLog
from .intervals import Range, complement, join
from .rules import Rules, Sections, with_id
from .slots import LOG_DIRTY_PAGES, BlockKey, Slot, SlotTable

__all__ = ["Block", "blocks_of", "follow_blocks", "give_ids", "retire", "target"]


@dataclass(slots=True)
class Block:
    """A RAM block at one place of an address space.

    `slots` are those it has before the transition, by gpa; `was` and `now` what is mapped before
    and after.  `removed` and `added` are slots that go and come, `kept` the others.
    """

    key: BlockKey
    slots: list[Slot] = field(default_factory=list)
    was: list[Range] = field(default_factory=list)
    now: list[Range] = field(default_factory=list)
    logged: bool = False
    kept: list[Slot] = field(default_factory=list)
    removed: list[Slot] = field(default_factory=list)
    added: list[Slot] = field(default_factory=list)

    @property
    def twin(self) -> tuple[str, str | None, int]:
        """The same memory at the same place, whatever its READONLY flag."""
        return self.key[:3]

    @property
    def whole(self) -> Slot | None:
        """The one slot that follows the block, None when it has none or plain ones."""
        if len(self.slots) == 1 and self.slots[0].follows_block:
            return self.slots[0]
        return None


def blocks_of(
    as_id: int, table: SlotTable, after: FlatView | None, sections: Sections
) -> tuple[dict[BlockKey, Block], list[Slot]]:
    """The blocks of one address space, and the slots whose backing is unknown."""
    blocks: dict[BlockKey, Block] = {}
    unknown: list[Slot] = []
    for slot in table.slots(as_id):
        key = slot.key
        if key is None:
            unknown.append(slot)
            continue
        block = blocks.get(key)
        if block is None:
            block = blocks[key] = Block(key)
        block.slots.append(slot)
        block.was += slot.mapped
    for r in after or ():
        new = sections.after(r, as_id)
        key = new.key if new is not None else None
        if new is None or key is None:
            continue
        block = blocks.get(key)
        if block is None:
            block = blocks[key] = Block(key)
        block.now.append((new.gpa, new.end))
        block.logged = new.logged
    for block in blocks.values():
        block.was = join(block.was)
        block.now = join(block.now)
    return blocks, unknown


def follow_blocks(
    table: SlotTable,
    views: Iterable[Mapping[int, FlatView]],
    rules: Rules,
    max_holes: int | None,
) -> SlotTable:
    """The table as it would be had slots followed their RAM blocks all along.

    The slots that QEMU gave to one block at one place become one, under the lowest id among
    them, that reaches as far as the block is mapped in the table or in any of `views`; where that
    takes more than `max_holes` holes, one for each mapped range.  Slots whose backing is
    unknown stay as they are.
    """
    views = list(views)
    log = DirtyLog(table)
    sections = Sections(rules, [v for by_as in views for v in by_as.values()], table, log)
    extents: dict[tuple[int, BlockKey], Range] = {}
    for by_as in views:
        for as_id, view in by_as.items():
            for r in view:
                slot = sections.after(r, as_id)
                if slot is None or slot.key is None:
                    continue
                lo, hi = extents.get((as_id, slot.key), (slot.gpa, slot.end))
                extents[as_id, slot.key] = (min(lo, slot.gpa), max(hi, slot.end))
    out: list[Slot] = []
    for as_id in table.as_ids():
        blocks, unknown = blocks_of(as_id, table, None, sections)
        out += unknown
        for key, block in blocks.items():
            lo, hi = extents.get((as_id, key), block.was[0])
            lo, hi = min(lo, block.was[0][0]), max(hi, block.was[-1][1])
            holes = complement(lo, hi, block.was)
            if block.whole is not None:
                out += block.slots
                continue
            logged = any(s.logged for s in block.slots)
            if max_holes is None or len(holes) <= max_holes:
                slot_id = min(s.slot for s in block.slots)
                out.append(_whole(as_id, key, slot_id, (lo, hi), holes, logged))
                continue
            lowest: dict[int, int] = {}
            for s in block.slots:
                i = bisect_right(block.was, s.gpa, key=_start) - 1
                lowest[i] = min(s.slot, lowest.get(i, s.slot))
            out += [_plain(as_id, key, lowest[i], r, logged) for i, r in enumerate(block.was)]
    return SlotTable(out, retired=table.retired, elsewhere=table.elsewhere)


def target(as_id: int, block: Block, table: SlotTable, max_holes: int | None) -> list[Slot]:
    """The slots the block should have after the transition, with id -1 yet to be given.

    One over its whole extent, or a plain one for each mapped range when that has too many holes.
    """
    if not block.now:
        return []
    spans = [(s.gpa, s.end) for s in block.slots if s.follows_block]
    retired = table.retired.get(("whole", as_id, block.key))
    if not spans and retired is not None:
        spans = [(retired.gpa, retired.end)]
    spans += [block.now[0], block.now[-1]]
    if block.was:
        spans += [block.was[0], block.was[-1]]
    lo, hi = min(s for s, _ in spans), max(e for _, e in spans)
    holes = complement(lo, hi, block.now)
    if max_holes is None or len(holes) <= max_holes:
        return [_whole(as_id, block.key, -1, (lo, hi), holes, block.logged)]
    return [_plain(as_id, block.key, -1, r, block.logged) for r in block.now]


def give_ids(as_id: int, blocks: Sequence[Block], table: SlotTable) -> None:
    """Give ids to all `added` slots.

    A slot that was there once gets its old id; else one that its block, or the same memory with
    another READONLY flag, loses now; else the lowest that no slot has before the transition.
    """
    used = {s.slot for s in table.slots(as_id)} | table.elsewhere.get(as_id, frozenset())
    spare: dict[tuple[str, str | None, int], set[int]] = {}
    for block in blocks:
        spare.setdefault(block.twin, set()).update(s.slot for s in block.removed)
    given: set[int] = set()
    waiting: list[tuple[Block, int]] = []
    for block in blocks:
        own = spare[block.twin]
        for i, slot in enumerate(block.added):
            old = table.retired.get(_form(slot))
            if (
                old is not None
                and old.slot not in given
                and (old.slot not in used or old.slot in own)
            ):
                given.add(old.slot)
                block.added[i] = with_id(slot, old.slot)
            else:
                waiting.append((block, i))
    lowest = {twin: iter(sorted(ids - given)) for twin, ids in spare.items()}
    unused = (i for i in count() if i not in used and i not in given)
    for block, i in waiting:
        new = next(lowest[block.twin], None)
        block.added[i] = with_id(block.added[i], next(unused) if new is None else new)


def retire(table: SlotTable, blocks: Iterable[Block]) -> dict[tuple[object, ...], Slot]:
    """What to remember after the transition: old forms whose id no other slot has taken.

    A block may take its own id in another form and go back later, so the last form before is
    kept; what it was before that is not.
    """
    removed = {_form(s): s for b in blocks for s in b.removed}
    taken = {(s.as_id, s.slot): _form(s) for b in blocks for s in b.added}
    out: dict[tuple[object, ...], Slot] = {}
    for form, slot in {**table.retired, **removed}.items():
        by = taken.get((slot.as_id, slot.slot))
        own = by is not None and by != form and by[1:3] == form[1:3]
        if by is None or (own and (form in removed or by[0] != form[0])):
            out[form] = slot
    return out


def _form(slot: Slot) -> tuple[object, ...]:
    """What a slot stands for, whatever its id: a block at its place, or one range of it."""
    if slot.follows_block:
        return ("whole", slot.as_id, slot.key)
    return ("range", slot.as_id, slot.key, slot.gpa, slot.size)


def _plain(as_id: int, key: BlockKey, slot_id: int, r: Range, logged: bool) -> Slot:
    name, owner, delta, fixed = key
    flags = fixed | LOG_DIRTY_PAGES if logged else fixed
    return Slot(as_id, slot_id, r[0], r[1] - r[0], flags, name, owner, r[0] - delta)


def _whole(
    as_id: int, key: BlockKey, slot_id: int, extent: Range, holes: Iterable[Range], logged: bool
) -> Slot:
    plain = _plain(as_id, key, slot_id, extent, logged)
    return msgspec.structs.replace(plain, holes=tuple(holes), follows_block=True)


def _start(r: Range) -> int:
    return r[0]
