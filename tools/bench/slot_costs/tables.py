"""What slot operations and slot look-ups cost, as tables of at most 80 columns.

`cost_tables` and `lookup_tables` give titles, columns and cells, `cost_lines` and `lookup_lines`
the same as lines.  Nothing is printed here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from qmp_memlistener.distribution import Distribution
from qmp_memlistener.reports.lab import Table
from qmp_memlistener.reports.terminal import size_text

from .costs import Costs
from .lookup import Kind, LookupComparison, LookupCost, Structure, UpdateCost
from .vm import Op

__all__ = ["cost_lines", "cost_tables", "lookup_lines", "lookup_tables"]

_OPS = {
    Op.ADD: "add",
    Op.LOG_ON: "log on",
    Op.LOG_OFF: "log off",
    Op.MOVE: "move",
    Op.DELETE: "delete",
    Op.SAME: "same",
    Op.PUNCH: "punch",
    Op.FILL: "fill",
}
_KINDS = {
    Kind.RANDOM: "searched",
    Kind.MISS: "in no slot",
    Kind.CACHED: "cached",
    Kind.HOST: "host's",
}
_STRUCTURES = {
    Structure.ARRAY: "array",
    Structure.TREE: "tree",
    Structure.INTERVALS: "intervals",
}
_LAYOUTS = {
    "array_5_7": "array 5.7",
    "array_5_14": "array 5.14",
    "tree_5_17": "trees 5.17",
}


def cost_lines(found: Costs) -> Iterator[str]:
    """The tables of `cost_tables`, one below the other."""
    return _joined(cost_tables(found))


def lookup_lines(found: LookupComparison) -> Iterator[str]:
    """The tables of `lookup_tables`, and why nothing was timed where nothing was."""
    yield from _joined(lookup_tables(found))
    if found.not_timed is not None:
        yield ""
        yield from textwrap.wrap(f"not timed: {found.not_timed}", 80)


def cost_tables(found: Costs) -> tuple[Table, ...]:
    """Operations by shape, p50 and p90 in us; then what a guest's reads cost by number of slots."""
    tables = []
    if found.shapes:
        cycles = found.shapes[0].cycles
        apart = "" if found.cpus_apart else ", the CPU shared with vCPUs"
        for name, attribute in (("median", "p50_ns"), ("90th percentile", "p90_ns")):
            tables.append(
                Table(
                    f"slot operations, us: {name} of {cycles:,} each ({found.kvm} KVM{apart}); "
                    "vCPUs is how many run; punch and fill are mprotect of the slot's first page",
                    ("slot", "slots", "vCPUs", *_OPS.values()),
                    tuple(
                        (
                            size_text(shape.size),
                            f"{shape.slots:,}",
                            str(shape.vcpus),
                            *(_us(getattr(shape.ops[op], attribute)) for op in _OPS),
                        )
                        for shape in found.shapes
                    ),
                )
            )
    if found.accesses:
        pages = found.accesses[0].pages
        tables.append(
            Table(
                f"a guest's read of one of {pages:,} pages that it reads in random order, us: "
                "medians of passes; all pages in one slot, or in as many as there are",
                ("slots", "in one", "in many", "so many", "ratio"),
                tuple(
                    (
                        f"{access.slots:,}",
                        _us(access.one.p50_ns),
                        _us(access.many.p50_ns),
                        f"{access.spread:,}",
                        f"{access.many.p50_ns / max(1, access.one.p50_ns):.2f}x",
                    )
                    for access in found.accesses
                ),
            )
        )
    return tuple(tables)


def lookup_tables(found: LookupComparison) -> tuple[Table, ...]:
    """Look-ups by kind and number of slots, then updates."""
    costs = {(c.kind, c.slots, c.structure): c for c in found.lookups}
    wanted = dict.fromkeys((c.kind, c.slots) for c in found.lookups)
    lookups = Table(
        "looking up a page's slot: comparisons, mean / most, and ns (median of blocks); cached is "
        "16 pages of a slot in a row, through the slot found last; host's is by host address",
        ("page", "slots", *(cell for s in _STRUCTURES.values() for cell in (s, "ns"))),
        tuple(
            (
                _KINDS[kind],
                f"{slots:,}",
                *(cell for s in _STRUCTURES for cell in _lookup(costs.get((kind, slots, s)))),
            )
            for kind, slots in sorted(wanted, key=lambda row: (list(_KINDS).index(row[0]), row[1]))
        ),
    )
    work = {(u.op, u.slots, u.layout): u for u in found.updates}
    changes = dict.fromkeys((u.op, u.slots) for u in found.updates)
    updates = Table(
        "changing a slot: bytes that the arrays of Linux 5.7 and 5.14 copy and shift, comparisons "
        "and rotations in all trees of 5.17, and ns (median)",
        ("update", "slots", *(cell for layout in _LAYOUTS.values() for cell in (layout, "ns"))),
        tuple(
            (
                op,
                f"{slots:,}",
                *(c for name in _LAYOUTS for c in _update(work.get((op, slots, name)))),
            )
            for op, slots in sorted(changes)
        ),
    )
    return lookups, updates


def _lookup(cost: LookupCost | None) -> tuple[str, str]:
    if cost is None:
        return "-", "-"
    mean = cost.comparisons / cost.lookups
    return f"{_number(mean)} / {cost.most_comparisons:,}", _ns(cost.each)


def _update(cost: UpdateCost | None) -> tuple[str, str]:
    if cost is None:
        return "-", "-"
    moved = cost.bytes_copied + cost.bytes_shifted
    work = moved or cost.comparisons + cost.rotations
    return _number(work / max(1, cost.updates)), _ns(cost.each)


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _ns(each: Distribution | None) -> str:
    return "-" if each is None else f"{each.p50_ns:,}"


def _us(ns: int) -> str:
    return f"{ns / 1000:.1f}" if ns < 100_000 else f"{ns / 1000:,.0f}"


def _joined(tables: Iterable[Table]) -> Iterator[str]:
    for i, table in enumerate(tables):
        if i:
            yield ""
        yield from table.lines()
