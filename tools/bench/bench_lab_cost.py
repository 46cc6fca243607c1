"""What the lab's Python adds to a slot operation, beside the same operations in C.

    python -m tools.bench.bench_lab_cost

tools/bench/lab_cost.c makes the same VM as the lab, with the same guest in it, and goes through the
same cycle.  In each round both do so for a while, in random order; the vCPUs of the one stand while
the other is measured.  Ratios are of the medians of one round.  With a running vCPU an update is
fast or slow depending on when that vCPU is next disturbed, so two equal programs differ from round
to round, too: a second C program shows by how much, and it takes many rounds to tell.
"""

from __future__ import annotations

import math
import random
import statistics
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from qmp_memlistener.errors import MissingPrerequisite, OperationFailed
from qmp_memlistener.kvmlab import programs, x86
from qmp_memlistener.kvmlab.vm import Kvm
from tools.bench.growth import Figure, Sample, print_table, ratios
from tools.bench.slot_costs import vm as cost_vm
from tools.bench.slot_costs.lookup_native import build
from tools.bench.slot_costs.vm import CostVm, Layout, Op, Shape

MIB = 1 << 20
RUNNING = Shape(size=16 * MIB, slots=8, vcpus=1)
OTHERS = (Shape(16 * MIB, 8, 0), Shape(1024 * MIB, 8, 1), Shape(16 * MIB, 4096, 1))
EVERY = 4
"""Of so many rounds, the others are in one."""
UPDATES = (Op.ADD, Op.LOG_ON, Op.LOG_OFF, Op.MOVE, Op.DELETE)
"""What a slot update is; the others are what it costs to do nothing, and no slot operations."""
ALL = "all five"

_SOURCE = Path(__file__).with_name("lab_cost.c")

Round = dict[str, float]
"""The median of each operation in one round, ns."""

PYTHON, C, AGAIN = "Python", "C", "C again"


class CProgram:
    """lab_cost, running."""

    def __init__(self, program: Path, shape: Shape, directory: Path) -> None:
        layout = Layout(shape.size)
        gibibytes = -(-layout.reach // x86.GIB) + 1
        private = programs.Private(cost_vm.PRIVATE_GPA, 2, gibibytes)
        scratch = [private.scratch_gpa(0)]
        home, moved = (
            [gpa + i * 4096 for i in range(shape.touched)] or scratch
            for gpa in (layout.home, layout.moved)
        )
        numbers = {
            "size": shape.size,
            "slots": shape.slots,
            "vcpus": shape.vcpus,
            "touched": shape.touched,
            "private_gpa": private.gpa,
            "home": layout.home,
            "moved": layout.moved,
            "others": layout.other(0),
            "pitch": cost_vm.OTHERS_PITCH,
            "first": private.code_gpa + programs.DATA,
            "rest": private.code_gpa + programs.GAP,
            "cr3": private.cr3,
            "reports": private.report_gpa(0),
            "report_pitch": private.report_gpa(1) - private.report_gpa(0),
            "home_table": private.set_table(0, home),
            "moved_table": private.set_table(0, moved),
            "scratch_table": private.set_table(1, scratch),
        }
        private.reports[0].table = numbers["scratch_table"]
        image = directory / f"private-{id(self)}"
        image.write_bytes(private.memory.bytes)
        private.close()
        self._process = subprocess.Popen(
            [program, image, *(f"{name}={number}" for name, number in numbers.items())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def cycles(self, count: int) -> tuple[dict[Op, list[int]], int]:
        """As `CostVm.cycles`.  Raises OperationFailed when the program ended."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        took: dict[Op, list[int]] = {}
        logged = 0
        try:
            process.stdin.write(f"cycles {count}\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it says on stderr why it ended
        for line in process.stdout:
            what, *numbers = line.split()
            if what == "done":
                return took, logged
            if what == "logged":
                logged = int(numbers[0])
            else:
                took[Op(what)] = [int(ns) for ns in numbers]
        raise OperationFailed(f"the C program ended: {process.stderr.read().strip()}")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def run(quick: bool) -> list[Figure]:
    """Print a table a shape; what Python adds with a running vCPU is the figure."""
    rounds, cycles = (40, 4) if quick else (150, 5)
    try:
        found = measure(RUNNING, OTHERS, rounds, cycles)
    except MissingPrerequisite as exc:
        print(f"\nleft out: {exc.message}")
        return []
    for shape, sides in found.items():
        print(
            f"\nslot of {shape.size // MIB} MiB, {shape.slots} slots, {shape.vcpus} running vCPUs: "
            f"us; medians of {len(sides[C])} rounds of {cycles}"
        )
        _print_operations(sides)
    python, c, again = (_sample(found[RUNNING][name], ALL) for name in (PYTHON, C, AGAIN))
    ratio = ratios(python, c)
    control = _likely(ratios(again, c))
    print(f"\nC over C, all five operations: the median ratio is in {control} (95 %)")
    print(f"Python over C: in {_likely(ratio)}; of the rounds {ratio.spread(digits=2)}")
    same_python, same_c = (_sample(found[RUNNING][name], Op.SAME) for name in (PYTHON, C))
    adds = same_python.median - same_c.median
    share = len(UPDATES) * adds / c.median
    print(
        f"an operation that changes nothing: Python adds {adds / 1e3:.1f} us, five are {share:.1%}"
    )
    return [
        Figure(
            "the lab's Python over C, slot updates with a running vCPU",
            "<= 1.10x",
            f"{ratio.median:.2f}x (95 %: {_likely(ratio)}; C over C: {control})",
        ),
        Figure(
            "the same, from what Python adds to an operation that changes nothing",
            "<= 10 %",
            f"{share:.1%} ({adds / 1e3:.1f} us an operation)",
        ),
    ]


def measure(
    shape: Shape, others: tuple[Shape, ...], rounds: int, cycles: int
) -> dict[Shape, dict[str, list[Round]]]:
    """The rounds of each side of each shape; a round more as warm-up.

    Raises MissingPrerequisite without KVM or a C compiler.
    """
    chance = random.Random(1)
    found: dict[Shape, dict[str, list[Round]]] = {}
    with ExitStack() as stack:
        kvm = stack.enter_context(Kvm())
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        program = directory / "lab_cost"
        build(_SOURCE, program)
        sides: list[tuple[Shape, str, CostVm | CProgram]] = []
        for one in (shape, *others):
            sides.append((one, PYTHON, stack.enter_context(CostVm(kvm, one))))
            sides += [
                (one, name, stack.enter_context(CProgram(program, one, directory)))
                for name in ((C, AGAIN) if one == shape else (C,))
            ]
            found[one] = {name: [] for of, name, _ in sides if of == one}
        for turn in range(-1, rounds):
            chance.shuffle(sides)
            for one, name, side in sides:
                if one != shape and turn % EVERY and turn >= 0:
                    continue
                took, logged = side.cycles(cycles)
                if logged != one.touched:
                    raise OperationFailed(
                        f"the dirty log had {logged} of {one.touched} pages that were written"
                    )
                if turn >= 0:
                    found[one][name].append(_medians(took))
    return found


def _print_operations(sides: dict[str, list[Round]]) -> None:
    rows = []
    for op in (*Op, ALL):
        python, c = _sample(sides[PYTHON], op), _sample(sides[C], op)
        difference = Sample(tuple(a - b for a, b in zip(python.values, c.values, strict=True)))
        ratio = ratios(python, c)
        rows.append(
            [
                str(op),
                f"{c.median / 1e3:.1f}",
                f"{python.median / 1e3:.1f}",
                f"{difference.median / 1e3:+.1f}",
                f"{ratio.median:.2f}x",
                _likely(ratio),
            ]
        )
    print_table(["operation", "C", "Python", "difference", "ratio", "95 %"], rows)


def _medians(took: dict[Op, list[int]]) -> Round:
    medians: Round = {op: statistics.median(ns) for op, ns in took.items()}
    medians[ALL] = sum(medians[op] for op in UPDATES)
    return medians


def _sample(rounds: list[Round], op: str) -> Sample:
    return Sample(tuple(r[op] for r in rounds))


def _likely(sample: Sample) -> str:
    """Where the median is, at 95 %: between two of the values, whatever their distribution."""
    ordered = sorted(sample.values)
    middle, reach = len(ordered) / 2, 0.98 * math.sqrt(len(ordered))
    low = ordered[max(0, math.floor(middle - reach))]
    high = ordered[min(len(ordered) - 1, math.ceil(middle + reach))]
    return f"{low:.2f}..{high:.2f}"


if __name__ == "__main__":
    run(quick=False)
