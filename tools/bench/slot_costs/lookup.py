"""Looking up a memory slot: sorted array against trees, from 8 slots to as many as KVM takes.

The question of the thread that proposed holes in slots: is an array good enough, or does KVM need a
tree?  Both are counted here, in steps that are the same on every machine (`lookup_array`,
`lookup_tree`), and timed by a C program where there is a compiler (`lookup_native`).

What is looked up (`Kind`), the slots being 16 pages each with 16 pages between them:

random   pages of slots at random, each found by a search: what a vCPU's first access costs
miss     pages between slots at random: MMIO, or a slot that is just being deleted
cached   16 pages of a slot, then of another one, through the slot that was found last
host     pages by host address, as when the host takes memory away (MMU notifier): up to 5.16 all
         slots are asked, since then (commit ed922739c919) an interval tree

What is updated: a slot at random is removed and added again.  In the array of KVM that copies the
whole set, in the trees it takes four removals or additions: by guest frame and by host address, in
the set that vCPUs use and in the one that they will use.  The stand-in for a slot that is being
removed is swapped in and out in constant time, and left out here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from enum import StrEnum
from itertools import islice

import msgspec

from qmp_memlistener.distribution import Distribution
from qmp_memlistener.errors import InputError, MissingPrerequisite

from .lookup_array import ARRAY_5_7, ARRAY_5_14, ArrayLayout, SlotArray
from .lookup_native import Timings, lookup_program
from .lookup_steps import Found, Interval, UpdateWork
from .lookup_tree import SlotTree

__all__ = [
    "MOST_SLOTS",
    "SLOT_COUNTS",
    "TREE",
    "Kind",
    "LookupCost",
    "LookupComparison",
    "Order",
    "Structure",
    "UpdateCost",
    "compare_lookups",
    "count_lookups",
    "count_updates",
    "lookup_document",
]

MOST_SLOTS = 32_764
"""KVM_CAP_NR_MEMSLOTS of x86-64 since 5.12."""

SLOT_COUNTS = (8, 64, 509, 4096, MOST_SLOTS)
"""A small guest, one with hotplug, the limit up to 5.11, RAM in slots of some MiB, the limit."""

TREE = "tree_5_17"
"""The layout of updates since 5.17; the others are `ArrayLayout.name`."""

LENGTH, PITCH, RUN = 16, 32, 16  # as in lookup.c
_MASK = (1 << 64) - 1


class Kind(StrEnum):
    """What is looked up; see the module."""

    RANDOM = "random"
    MISS = "miss"
    CACHED = "cached"
    HOST = "host"


class Structure(StrEnum):
    """Sorted array, red-black tree by start, interval tree."""

    ARRAY = "array"
    TREE = "tree"
    INTERVALS = "intervals"


class Order(StrEnum):
    """In which order slots came into a tree: by address, as QEMU adds them, or at random."""

    ASCENDING = "ascending"
    RANDOM = "random"


USED = {
    Kind.RANDOM: (Structure.ARRAY, Structure.TREE, Structure.INTERVALS),
    Kind.MISS: (Structure.ARRAY, Structure.TREE, Structure.INTERVALS),
    Kind.CACHED: (Structure.ARRAY, Structure.TREE),
    Kind.HOST: (Structure.ARRAY, Structure.INTERVALS),
}
"""KVM keeps no last slot for host addresses, and a tree without ends cannot find overlaps."""


class LookupCost(msgspec.Struct, frozen=True):
    """`lookups` of one kind in one structure that holds `slots`.

    `comparisons` and `slots_read` are of all of them together, `most_comparisons` of the worst one;
    `ids` is the sum of the ids found, a miss being -1.  `each` is what one took, the mean of a
    block, over all blocks; None where nothing was timed.
    """

    slots: int
    kind: Kind
    structure: Structure
    lookups: int
    comparisons: int
    most_comparisons: int
    slots_read: int
    ids: int
    each: Distribution | None = None


class UpdateCost(msgspec.Struct, frozen=True):
    """`updates` of one op, `add` or `remove`, with `slots` in the set; counts of all together.

    `each` is what one took, None where nothing was timed.
    """

    slots: int
    layout: str
    op: str
    updates: int
    bytes_copied: int
    bytes_shifted: int
    comparisons: int
    rotations: int
    each: Distribution | None = None


class LookupComparison(msgspec.Struct, frozen=True):
    """What `compare_lookups` found.  `compiler` timed it; where none did, `not_timed` says why."""

    seed: int
    order: Order
    compiler: str | None
    not_timed: str | None
    lookups: tuple[LookupCost, ...]
    updates: tuple[UpdateCost, ...]


def compare_lookups(
    counts: Sequence[int] = SLOT_COUNTS,
    *,
    lookups: int = 2048,
    updates: int = 500,
    blocks: int = 100,
    seed: int = 1,
    order: Order = Order.ASCENDING,
    progress: Callable[[int], None] | None = None,
) -> LookupComparison:
    """Count, and time where a C compiler is there; `progress` is told each number of slots.

    Raises InputError for a number of slots that KVM does not take, OperationFailed when the
    compiled program fails.
    """
    for slots in counts:
        if not 1 <= slots <= MOST_SLOTS:
            raise InputError(
                f"a set of {slots} slots: KVM takes 1 to {MOST_SLOTS}",
                remedy=f"give numbers from 1 to {MOST_SLOTS}",
            )
    found: list[LookupCost] = []
    updated: list[UpdateCost] = []
    with ExitStack() as stack:
        program, not_timed = None, None
        try:
            program = stack.enter_context(lookup_program())
        except MissingPrerequisite as exc:
            not_timed = exc.message
        for slots in counts:
            if progress is not None:
                progress(slots)
            timings = Timings()
            if program is not None:
                timings = program.time(slots, lookups, updates, blocks, seed, order)
            for cost in count_lookups(slots, lookups, seed, order):
                each = timings.lookups.get((cost.kind, cost.structure))
                found.append(msgspec.structs.replace(cost, each=each))
            for work in count_updates(slots, updates, seed, order):
                each = timings.updates.get((work.layout, work.op))
                updated.append(msgspec.structs.replace(work, each=each))
        compiler = None if program is None else program.compiler
    return LookupComparison(seed, order, compiler, not_timed, tuple(found), tuple(updated))


def count_lookups(
    slots: int, lookups: int, seed: int, order: Order = Order.ASCENDING
) -> Iterator[LookupCost]:
    """The steps of each kind in each structure; the same for the same arguments."""
    guest, host = _ranges(slots, PITCH), _ranges(slots, LENGTH)
    ids = _added(slots, _draws(seed, len(Kind)), order)
    array, by_host_array = SlotArray(guest), SlotArray(host)
    tree = SlotTree((guest[i] for i in ids), ends=True)
    by_host = SlotTree((host[i] for i in ids), ends=True)
    find: dict[tuple[Kind, Structure], Callable[[int], Found]] = {}
    for kind in (Kind.RANDOM, Kind.MISS):
        find[kind, Structure.ARRAY] = array.find
        find[kind, Structure.TREE] = tree.find
        find[kind, Structure.INTERVALS] = tree.covering
    find[Kind.CACHED, Structure.ARRAY] = array.find_cached
    find[Kind.CACHED, Structure.TREE] = tree.find_cached
    find[Kind.HOST, Structure.ARRAY] = by_host_array.scan
    find[Kind.HOST, Structure.INTERVALS] = by_host.covering
    for number, kind in enumerate(Kind):
        pages = list(islice(_pages(kind, slots, _draws(seed, number)), lookups))
        for structure in USED[kind]:
            array.forget()
            tree.forget()
            each = [find[kind, structure](page) for page in pages]
            yield LookupCost(
                slots,
                kind,
                structure,
                lookups,
                comparisons=sum(f.comparisons for f in each),
                most_comparisons=max(f.comparisons for f in each),
                slots_read=sum(f.slots_read for f in each),
                ids=sum(-1 if f.slot is None else f.slot for f in each),
            )


def count_updates(
    slots: int, updates: int, seed: int, order: Order = Order.ASCENDING
) -> Iterator[UpdateCost]:
    """The work of removing a slot and adding it again, in each layout that had so many slots."""
    guest, host = _ranges(slots, PITCH), _ranges(slots, LENGTH)
    draws = _draws(seed, len(Kind))
    ids = _added(slots, draws, order)
    changed = [draw % slots for draw in islice(draws, updates)]
    for layout in (ARRAY_5_7, ARRAY_5_14):
        if slots <= layout.most_slots:
            yield from _array_updates(layout, guest, changed)
    trees = (SlotTree(guest[i] for i in ids), SlotTree((host[i] for i in ids), ends=True))
    removed = added = UpdateWork()
    for i in changed:
        for tree, slot in zip(trees, (guest[i], host[i]), strict=True):
            work = tree.remove(slot)
            removed += work + work  # both sets have the same shape
            work = tree.add(slot)
            added += work + work
    yield _update_cost(slots, TREE, "remove", updates, removed)
    yield _update_cost(slots, TREE, "add", updates, added)


def lookup_document(found: LookupComparison) -> dict[str, object]:
    """For JSON: counts and ns are integers.

    Keys: `seed`, `order`, `compiler` and `not_timed` (strings or null);
    `lookups`: a list of `slots`, `kind`, `structure`, `lookups`, `comparisons`, `most_comparisons`,
    `slots_read`, `ids` and `each`; `updates`: a list of `slots`, `layout`, `op`, `updates`,
    `bytes_copied`, `bytes_shifted`, `comparisons`, `rotations` and `each`.  `each` is null or has
    `n`, `p50_ns`, `p90_ns`, `p99_ns` and `max_ns`.  See `LookupCost` and `UpdateCost`.
    """
    document: dict[str, object] = msgspec.to_builtins(found)
    return document


def _array_updates(
    layout: ArrayLayout, slots: Sequence[Interval], changed: Sequence[int]
) -> Iterator[UpdateCost]:
    array = SlotArray(slots, layout)
    removed = added = UpdateWork()
    for i in changed:
        removed += array.remove(slots[i])
        added += array.add(slots[i])
    yield _update_cost(len(slots), layout.name, "remove", len(changed), removed)
    yield _update_cost(len(slots), layout.name, "add", len(changed), added)


def _update_cost(slots: int, layout: str, op: str, updates: int, work: UpdateWork) -> UpdateCost:
    return UpdateCost(
        slots,
        layout,
        op,
        updates,
        work.bytes_copied,
        work.bytes_shifted,
        work.comparisons,
        work.rotations,
    )


def _ranges(slots: int, pitch: int) -> list[Interval]:
    return [Interval(i * pitch, i * pitch + LENGTH, i) for i in range(slots)]


def _draws(seed: int, stream: int) -> Iterator[int]:
    """splitmix64, so that `lookup.c` draws the same."""
    state = (seed + (stream << 56)) & _MASK
    while True:
        state = (state + 0x9E37_79B9_7F4A_7C15) & _MASK
        z = ((state ^ (state >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
        yield z ^ (z >> 31)


def _pages(kind: Kind, slots: int, draws: Iterator[int]) -> Iterator[int]:
    slot = 0
    for i, draw in enumerate(draws):
        if kind is not Kind.CACHED or i % RUN == 0:
            slot = draw % slots
        start = slot * (LENGTH if kind is Kind.HOST else PITCH)
        yield start + (draw >> 40) % LENGTH + (LENGTH if kind is Kind.MISS else 0)


def _added(slots: int, draws: Iterator[int], order: Order) -> list[int]:
    """Ids in the order in which they came into the trees (shuffled as Fisher and Yates do)."""
    ids = list(range(slots))
    if order is Order.RANDOM:
        for i in range(slots - 1, 0, -1):
            j = next(draws) % (i + 1)
            ids[i], ids[j] = ids[j], ids[i]
    return ids
