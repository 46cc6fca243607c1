"""What a mirror keeps in step with a guest: `SlotBackend`, and how a plan becomes calls of it.

`SlotBackend` is what to implement for memslots of your own: a VM on /dev/kvm, the memory table
of an out-of-process device, the page map of an introspection tool.  `ModelBackend` is one in
memory, with KVM's rules and dirty bitmaps.  Which plan is carried out, and when, is in `mirror`.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Concatenate, ParamSpec, Protocol

import msgspec

from ..errors import OperationFailed
from ..memslots import LOG_DIRTY_PAGES, READONLY, Op, OpKind, Rules, Slot, SlotTable, slot_table
from ..records import MemoryShown, MirrorDifference
from ..topology import FlatView

__all__ = ["MEMORY", "ModelBackend", "SlotBackend", "SlotWriter", "map_differences"]

Done = Awaitable[None] | None
"""A method of a backend may be a plain or an `async` one."""

P = ParamSpec("P")

MEMORY = 0  # KVM's id of the address space `memory`, the one that a mirror follows


class SlotBackend(Protocol):
    """Memslots that a mirror adds, changes and deletes.

    A `Slot` has all that KVM_SET_USER_MEMORY_REGION takes (`kvm_slot` with the address space in
    it, `gpa`, `size`, `flags`), and in place of a host address what is behind it: RAM block
    (`block`, `owner`) and the `offset` in it of the slot's first byte.  `holes` are ranges of it
    that the guest cannot reach; another slot may lie there.  Addresses are gpas, ranges are half
    open, all are whole pages of the host.

    Each call is one operation of a plan; the mirror awaits it before the next.  It gets the slot as
    it is afterwards (`delete_slot`: as it was), so that a backend may just keep that.  When one
    raises, whatever it raises, the mirror is out of step until `Mirror.resync`, which goes by what
    `slots` says.  An `async` one that does not return in time is cancelled and counts as that.  A
    plain one blocks the event loop: it should take milliseconds at most.
    """

    def add_slot(self, slot: Slot) -> Done:
        """`slot` comes, with `slot.holes` in it from the start; its id is free."""

    def delete_slot(self, slot: Slot) -> Done:
        """`slot` goes, its dirty bitmap with it."""

    def set_flags(self, slot: Slot) -> Done:
        """`slot` has other flags now; only LOG_DIRTY_PAGES differs."""

    def set_hole(self, slot: Slot, start: int, end: int) -> Done:
        """`[start, end)` of `slot` is no longer reached; the rest, dirty bits too, stays.

        `slot.holes` has the hole in it, joined with those that it touches.
        """

    def clear_hole(self, slot: Slot, start: int, end: int) -> Done:
        """`[start, end)` of `slot` is reached again; it is no longer in `slot.holes`."""

    def begin(self) -> Done:
        """What is called until `end` must look like one change to whoever uses the slots.

        A batch of ioctls, a lock, parked vCPUs: whatever the backend has for it.
        """

    def end(self) -> Done:
        """The change is complete; called after every `begin` that did not raise."""

    def slots(self) -> Iterable[Slot]:
        """What the backend holds, by its own records, of what the mirror has it hold."""


class SlotWriter:
    """Carries out operations of plans on a backend, one after the other.

    `table` is what the backend should hold, and does if no call has failed.  `calls` counts those
    that succeeded, by name; `operations` are those that changed a slot.
    """

    def __init__(self, backend: SlotBackend, deadline: float) -> None:
        self._backend = backend
        self._deadline = deadline
        self.table = SlotTable()
        self.calls: Counter[str] = Counter()

    @property
    def operations(self) -> int:
        return self.calls.total() - self.calls["begin"] - self.calls["end"]

    async def together(self, ops: Sequence[Op], after: SlotTable) -> None:
        """`ops` between `begin` and `end`; markers among them do not count.  Raises as `run`."""
        await self._bracket(self._backend.begin)
        try:
            for op in ops:
                if op.slot >= 0:
                    await self.run(op, after)
        finally:
            await self._bracket(self._backend.end)

    async def run(self, op: Op, after: SlotTable) -> None:
        """One operation; `after` is the table that its plan leaves.

        A slot is added with the holes it has then, so the plan's `set_hole`s for it are passed
        over.  Raises OperationFailed when the backend fails or takes too long.
        """
        backend = self._backend
        if op.op is OpKind.ADD:
            new = after.get(op.as_id, op.slot)
            assert new is not None, "what a plan adds, it leaves"
            await self._call(backend.add_slot, new)
            self.table.add(new)
            return
        slot = self.table.get(op.as_id, op.slot)
        assert slot is not None, "a plan starts from our table"
        if op.op is OpKind.DELETE:
            await self._call(backend.delete_slot, slot)
            self.table.remove(op.as_id, op.slot)
        elif op.op is OpKind.FLAGS:
            new = msgspec.structs.replace(slot, flags=op.flags)
            await self._call(backend.set_flags, new)
            self._replace(slot, new)
        elif op.op is OpKind.CLEAR_HOLE:
            new = slot.without_hole(op.gpa, op.end)
            await self._call(backend.clear_hole, new, op.gpa, op.end)
            self._replace(slot, new)
        elif not any(low <= op.gpa and op.end <= high for low, high in slot.holes):
            new = slot.with_hole(op.gpa, op.end)
            await self._call(backend.set_hole, new, op.gpa, op.end)
            self._replace(slot, new)

    def _replace(self, old: Slot, new: Slot) -> None:
        self.table.remove(old.as_id, old.slot)
        self.table.add(new)

    async def _call(
        self,
        method: Callable[Concatenate[Slot, P], Done],
        slot: Slot,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> None:
        name = method.__name__
        await self._checked(lambda: method(slot, *args, **kwargs), name, f"{name} of {slot}")

    async def _bracket(self, method: Callable[[], Done]) -> None:
        await self._checked(method, method.__name__, method.__name__)

    async def _checked(self, call: Callable[[], Done], name: str, what: str) -> None:
        try:
            result = call()
            if inspect.isawaitable(result):
                async with asyncio.timeout(self._deadline):
                    await result
        except Exception as exc:
            why = str(exc) or f"no answer within {self._deadline:g} s"
            raise OperationFailed(f"the backend failed in {what}: {why}") from exc
        self.calls[name] += 1


class ModelBackend:
    """Memslots in memory that refuse what KVM would refuse, with the errno KVM would use.

    Stands for whoever uses the slots as well: `write` is a store through them, `backing` is what
    is found at an address.  Between `begin` and `end` those see the state before.
    """

    def __init__(self, page_size: int = 4096) -> None:
        self._page_size = page_size
        self._table = SlotTable()
        self._shown: SlotTable | None = None
        self._dirty: dict[tuple[int, int], set[int]] = {}

    def add_slot(self, slot: Slot) -> None:
        """Raises OSError: EINVAL for an id in use or part of a page, EEXIST for an overlap."""
        if (slot.gpa | slot.size) % self._page_size or not slot.size:
            raise _refused(errno.EINVAL, slot)
        if self._table.get(slot.as_id, slot.slot) is not None:
            raise _refused(errno.EINVAL, slot)
        if any(self._table.overlapping(slot.as_id, start, end) for start, end in slot.mapped):
            raise _refused(errno.EEXIST, slot)
        self._table.add(slot)
        self._dirty[slot.as_id, slot.slot] = set()

    def delete_slot(self, slot: Slot) -> None:
        """Raises OSError: EINVAL when there is no such slot."""
        self._take(slot)
        del self._dirty[slot.as_id, slot.slot]

    def set_flags(self, slot: Slot) -> None:
        """Raises OSError: EINVAL when anything but LOG_DIRTY_PAGES would change."""
        held = self._held(slot)
        if (held.flags ^ slot.flags) & ~LOG_DIRTY_PAGES:
            raise _refused(errno.EINVAL, slot)
        self._replace(held, msgspec.structs.replace(held, flags=slot.flags))
        if not slot.logged:
            self._dirty[slot.as_id, slot.slot] = set()

    def set_hole(self, slot: Slot, start: int, end: int) -> None:
        """Raises OSError: EINVAL when not all of it is reached through the slot."""
        held = self._held(slot)
        if start >= end or not any(low <= start and end <= high for low, high in held.mapped):
            raise _refused(errno.EINVAL, slot)
        self._replace(held, held.with_hole(start, end))
        dirty = self._dirty[slot.as_id, slot.slot]
        dirty -= {page for page in dirty if start <= page < end}

    def clear_hole(self, slot: Slot, start: int, end: int) -> None:
        """Raises OSError: EINVAL when not all of it is a hole, EEXIST when a slot lies there."""
        held = self._held(slot)
        if start >= end or not any(low <= start and end <= high for low, high in held.holes):
            raise _refused(errno.EINVAL, slot)
        if self._table.overlapping(slot.as_id, start, end):
            raise _refused(errno.EEXIST, slot)
        self._replace(held, held.without_hole(start, end))

    def begin(self) -> None:
        self._shown = self._table.copy()

    def end(self) -> None:
        self._shown = None

    def slots(self) -> tuple[Slot, ...]:
        return tuple(self._table)

    # -- what uses the slots -----------------------------------------------------------------

    def backing(self, gpa: int, as_id: int = MEMORY) -> tuple[str, str | None, int] | None:
        """RAM block, owner and offset behind an address; None where there is no memory."""
        slot = self._visible.at(as_id, gpa)
        if slot is None or slot.block is None or slot.offset is None:
            return None
        return slot.block, slot.owner, slot.offset + gpa - slot.gpa

    def write(self, gpa: int, as_id: int = MEMORY) -> bool:
        """A store to `gpa`: False when it does not reach memory that can be written."""
        slot = self._visible.at(as_id, gpa)
        if slot is None or slot.flags & READONLY:
            return False
        pages = self._dirty.get((as_id, slot.slot))
        if slot.logged and pages is not None:
            pages.add(gpa - gpa % self._page_size)
        return True

    def dirty(self, slot_id: int, as_id: int = MEMORY) -> frozenset[int]:
        """The gpas of the pages written through a logged slot since it came (or was logged)."""
        return frozenset(self._dirty.get((as_id, slot_id), ()))

    # -- inside ------------------------------------------------------------------------------

    @property
    def _visible(self) -> SlotTable:
        return self._table if self._shown is None else self._shown

    def _held(self, slot: Slot) -> Slot:
        held = self._table.get(slot.as_id, slot.slot)
        if held is None or (held.gpa, held.size) != (slot.gpa, slot.size):
            raise _refused(errno.EINVAL, slot)
        return held

    def _take(self, slot: Slot) -> None:
        held = self._held(slot)
        self._table.remove(held.as_id, held.slot)

    def _replace(self, old: Slot, new: Slot) -> None:
        self._table.remove(old.as_id, old.slot)
        self._table.add(new)


def _refused(number: int, slot: Slot) -> OSError:
    return OSError(number, os.strerror(number), str(slot))


# start, end, block, owner, gpa less offset, read-only
_Piece = tuple[int, int, str | None, str | None, int | None, bool]


def map_differences(
    view: FlatView, slots: Iterable[Slot], rules: Rules | None = None
) -> tuple[MirrorDifference, ...]:
    """Where `slots` (of address space 0) do not show what `view` does, in address order.

    How the memory is cut into slots, their ids and dirty logging do not count.  Neighbours that
    differ in the same way are one.  Raises InputError when the slots overlap.  O(n log n).
    """
    wanted = _pieces(slot_table(view, rules or Rules()))
    found = _pieces(SlotTable(slots))
    edges = sorted({edge for p in (*wanted, *found) for edge in p[:2]})
    out: list[MirrorDifference] = []
    last: tuple[object, object] | None = None
    for start, end in pairwise(edges):
        a, b = _at(wanted, start), _at(found, start)
        what = (a and a[2:], b and b[2:])
        if what[0] == what[1]:
            last = None
            continue
        if last == what and out[-1].end == start:
            out[-1] = MirrorDifference(out[-1].start, end, out[-1].wanted, out[-1].found)
        else:
            out.append(MirrorDifference(start, end, _shown(a, start), _shown(b, start)))
        last = what
    return tuple(out)


def _pieces(table: SlotTable) -> list[_Piece]:
    out: list[_Piece] = []
    for slot in table.slots(MEMORY):
        delta = slot.gpa - slot.offset if slot.offset is not None else None
        for start, end in slot.mapped:
            readonly = bool(slot.flags & READONLY)
            out.append((start, end, slot.block, slot.owner, delta, readonly))
    out.sort(key=itemgetter(0))
    return out


def _at(pieces: Sequence[_Piece], addr: int) -> _Piece | None:
    i = bisect_right(pieces, addr, key=itemgetter(0)) - 1
    return pieces[i] if i >= 0 and addr < pieces[i][1] else None


def _shown(piece: _Piece | None, start: int) -> MemoryShown | None:
    if piece is None:
        return None
    _, _, block, owner, delta, readonly = piece
    return MemoryShown(block, owner, start - delta if delta is not None else None, readonly)
