"""Plans of every strategy for transitions of 1,000 to 100,000 ranges, and slot-table operations.

    python -m tools.bench.bench_plan

Two transitions: of one hole in a hundred, as a busy guest makes them, and of every hole at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from qmp_memlistener.memslots import PlanStrategy, Slot, SlotTable, plan, slot_table
from tools.bench.growth import Figure, interleaved, print_growths, print_table, sizes
from tools.bench.synthetic import holed_view

AT = 10_000
PAGE = 4096
TIMES = 1000
LAST_SLOT = 32_764  # as many as KVM takes (KVM_CAP_NR_MEMSLOTS)


def run(quick: bool) -> list[Figure]:
    """Print the tables; the figures at 10,000."""
    figures = _plans(quick)
    _slot_operations(quick)
    return figures


def _plans(quick: bool) -> list[Figure]:
    runs = 2 if quick else 3
    worst: tuple[float, str] = (0.0, "")
    for move_every, what in ((100, "one hole in a hundred moves"), (1, "every hole moves")):
        cases: dict[str, Callable[[], object]] = {}
        for n in sizes(quick):
            before, after = holed_view(n), holed_view(n, move_every)
            table = slot_table(before)
            for strategy in PlanStrategy:
                cases[f"{strategy} {n}"] = partial(plan, before, after, strategy, table=table)
        results = interleaved(cases, runs)
        tables = {
            str(strategy): {n: results[f"{strategy} {n}"] for n in sizes(quick)}
            for strategy in PlanStrategy
        }
        print_growths(f"plan: {what}, n ranges", tables, at=AT, wanted="<= 100 at 10,000")
        for name, by_size in tables.items():
            worst = max(worst, (by_size[AT].median, f"{name}, {what}"))
    seen = f"{worst[0]:.3f} s ({worst[1]})"
    return [Figure(f"plan of {AT:,} ranges, slowest strategy", "<= 0.1 s", seen)]


def _slot_operations(quick: bool) -> None:
    """Microseconds for one operation on a table of n slots, at random places."""
    rows = []
    for n in (min(n, LAST_SLOT) for n in sizes(quick)):
        slots = [Slot(0, i, i * 2 * PAGE, PAGE) for i in range(n)]
        table = SlotTable(slots)
        rng = random.Random(n)
        some = [slots[rng.randrange(n)] for _ in range(2000)]
        some = list({s.slot: s for s in some}.values())
        timed: dict[str, Callable[[], object]] = {
            "build": partial(SlotTable, slots),
            "copy": table.copy,
            "exact": partial(_exact, table, some),
            "at": partial(_at, table, some),
            "lowest_free": partial(_lowest_free, table),
            "remove+add": partial(_replace, table, some),
        }
        counts = {"build": n, "copy": n, "lowest_free": TIMES}
        samples = interleaved(timed, 3)
        rows.append(
            [f"{n:,}"]
            + [f"{s.median * 1e6 / counts.get(k, len(some)):.2f}" for k, s in samples.items()]
        )
    print("\nslot table, µs for one operation (build, copy: for one slot)")
    print_table(["slots", "build", "copy", "exact", "at", "lowest_free", "remove+add"], rows)


def _exact(table: SlotTable, slots: list[Slot]) -> None:
    for slot in slots:
        table.exact(0, slot.gpa, slot.size)


def _at(table: SlotTable, slots: list[Slot]) -> None:
    for slot in slots:
        table.at(0, slot.gpa + 100)


def _lowest_free(table: SlotTable) -> None:
    for _ in range(TIMES):
        table.lowest_free(0)


def _replace(table: SlotTable, slots: list[Slot]) -> None:
    for slot in slots:
        table.add(table.remove(0, slot.slot))


if __name__ == "__main__":
    run(quick=False)
