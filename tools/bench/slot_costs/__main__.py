"""What slot operations cost on real KVM, and how KVM finds a slot among many: array or tree.

    python -m tools.bench.slot_costs
    python -m tools.bench.slot_costs --slot-sizes 16M,1G --vcpus 0,1,4 --rounds 5
    python -m tools.bench.slot_costs --json > costs.json

Times every operation on a slot, by its size, the number of slots and of running vCPUs, in random
order.  The first of each list goes with the first of the others; the rest are varied one at
a time.  Then what finding a slot costs in a sorted array (KVM until 5.16) and in a tree (since
5.17), from 8 to 32,764 slots, counted exactly and, where a C compiler is there, timed.  Figures are
in docs/findings.md.
"""

from __future__ import annotations

import argparse
import json
import sys

from qmp_memlistener.cli.lab import progress_bar, size
from qmp_memlistener.errors import MemListenerError
from qmp_memlistener.kvmlab import Kvm

from .costs import cost_document, default_shapes, default_slots, measure_costs, one_at_a_time
from .lookup import compare_lookups, lookup_document
from .tables import cost_lines, lookup_lines


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.slot_costs")
    parser.add_argument("--slot-sizes", type=lambda text: [size(part) for part in text.split(",")])
    parser.add_argument("--slots", type=_counts, help="how many slots there are in all")
    parser.add_argument("--vcpus", type=_counts, help="how many vCPUs run")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-lookup", action="store_true", help="operations alone")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    given = options.slot_sizes or options.slots or options.vcpus
    with Kvm() as kvm:
        shapes = (
            one_at_a_time(
                options.slot_sizes or [16 << 20], options.slots or [8], options.vcpus or [1]
            )
            if given
            else default_shapes(kvm)
        )
        with progress_bar("measuring") as progress:
            costs = measure_costs(
                kvm,
                shapes,
                rounds=options.rounds,
                access_slots=() if given else default_slots(kvm),
                seed=options.seed,
                progress=progress,
            )
    compared = None if options.no_lookup else compare_lookups(seed=options.seed)
    if options.json:
        document = cost_document(costs)
        document["lookup"] = None if compared is None else lookup_document(compared)
        print(json.dumps(document))
        return 0
    print(*cost_lines(costs), sep="\n")
    if compared is not None:
        print("", *lookup_lines(compared), sep="\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MemListenerError as exc:
        print(exc, file=sys.stderr)
        sys.exit(exc.exit_code)
