"""Costs of slot operations on real KVM: what was done, not how long it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from qmp_memlistener.errors import InputError, MissingPrerequisite, OperationFailed
from qmp_memlistener.kvmlab.abi import Cap
from qmp_memlistener.kvmlab.vm import Kvm
from tools.bench.bench_lab_cost import CProgram
from tools.bench.slot_costs.access import AccessVm
from tools.bench.slot_costs.costs import (
    Costs,
    cost_document,
    default_shapes,
    default_slots,
    measure_costs,
    one_at_a_time,
)
from tools.bench.slot_costs.lookup_native import build
from tools.bench.slot_costs.tables import cost_lines, cost_tables
from tools.bench.slot_costs.vm import SLOT_GPA, CostVm, Op, Shape

pytestmark = [pytest.mark.kvm, pytest.mark.full]

PAGE = 4096
MIB = 1 << 20
FEW = Shape(size=2 * MIB, slots=4, vcpus=1)


@pytest.fixture(scope="module")
def kvm() -> Iterator[Kvm]:
    try:
        kvm = Kvm()
    except MissingPrerequisite as exc:
        pytest.skip(exc.message)
    with kvm:
        yield kvm


@pytest.fixture(scope="module")
def costs(kvm: Kvm) -> Costs:
    shapes = one_at_a_time(sizes=(2 * MIB, PAGE), slots=(4, 40), vcpus=(1, 0, 2))
    return measure_costs(kvm, shapes, rounds=2, cycles=3, access_slots=(3, 40))


def left_behind() -> tuple[set[str], int, set[int]]:
    """What a VM that is gone must not leave: threads, open files, CPUs taken away."""
    return (
        {thread.name for thread in threading.enumerate()},
        len(os.listdir("/proc/self/fd")),
        os.sched_getaffinity(0),
    )


def test_every_operation_of_every_shape_was_timed(costs: Costs) -> None:
    assert [(s.size, s.slots, s.vcpus) for s in costs.shapes] == [
        (2 * MIB, 4, 1),
        (2 * MIB, 4, 0),
        (2 * MIB, 4, 2),
        (PAGE, 4, 1),
        (2 * MIB, 40, 1),
    ]
    for shape in costs.shapes:
        assert shape.cycles == 6
        assert list(shape.ops) == [str(op) for op in Op]
        for took in shape.ops.values():
            assert took.n == 6
            assert 0 < took.p50_ns <= took.p90_ns <= took.p99_ns <= took.max_ns


def test_guests_wrote_where_the_slot_was(costs: Costs) -> None:
    """Each page that the guest wrote after logging began is in the dirty log."""
    assert [s.touched_pages for s in costs.shapes] == [16, 0, 16, 1, 16]
    assert [s.logged_pages for s in costs.shapes] == [16, 0, 16, 1, 16]


def test_reads_in_many_slots_and_in_one(costs: Costs) -> None:
    assert [(a.slots, a.spread) for a in costs.accesses] == [(3, 1), (40, 38)]
    for access in costs.accesses:
        assert access.pages > access.spread
        assert access.one.n == access.many.n == 2
        assert access.one.p50_ns > 0
        assert access.many.p50_ns > 0


def test_document_is_json_with_stable_keys(costs: Costs) -> None:
    document = json.loads(msgspec.json.encode(cost_document(costs)))
    assert set(document) == {"kvm", "cpus_apart", "seed", "shapes", "accesses"}
    assert set(document["shapes"][0]) == {
        *("size", "slots", "vcpus", "cycles", "touched_pages", "logged_pages", "ops")
    }
    assert set(document["accesses"][0]) == {"slots", "pages", "spread", "many", "one"}
    assert set(document["shapes"][0]["ops"]["add"]) == {"n", "p50_ns", "p90_ns", "p99_ns", "max_ns"}


def test_tables_have_a_row_for_each_shape_and_fit(costs: Costs) -> None:
    median, high, accesses = cost_tables(costs)
    assert len(median.rows) == len(high.rows) == len(costs.shapes)
    assert len(accesses.rows) == 2
    for table in (median, high, accesses):
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert all(len(line) <= 80 for line in cost_lines(costs))


def test_progress_is_told(kvm: Kvm) -> None:
    told: list[tuple[int, int]] = []
    measure_costs(
        kvm, [FEW], rounds=3, cycles=1, access_slots=(), progress=lambda *at: told.append(at)
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_default_shapes_are_within_what_this_kvm_takes(kvm: Kvm) -> None:
    most = kvm.capability(Cap.NR_MEMSLOTS)
    shapes = default_shapes(kvm)
    assert len(set(shapes)) == len(shapes)
    assert {s.vcpus for s in shapes} == {0, 1, 2, 4}
    assert all(s.slots <= most for s in shapes)
    assert default_slots(kvm)[-1] == min(most, 32_764)
    for shape in shapes:
        shape.check()


def test_nothing_is_left_behind(kvm: Kvm) -> None:
    before = left_behind()
    with CostVm(kvm, Shape(2 * MIB, 4, 2)) as vm:
        vm.cycles(1)
        assert left_behind() != before
    with AccessVm(kvm, 4) as access:
        access.access_ns()
    assert left_behind() == before


def test_whoever_changes_slots_may_use_all_cpus_again(kvm: Kvm) -> None:
    before = os.sched_getaffinity(0)
    with CostVm(kvm, FEW) as vm:
        assert os.sched_getaffinity(0) == before
        assert vm.cpus.own <= before
        assert vm.cpus.apart == (len(before) > 1)
        vm.cycles(1)
        assert os.sched_getaffinity(0) == before


def test_a_guest_that_meets_missing_memory_is_an_error(kvm: Kvm) -> None:
    """Figures of a guest that left all the time would be worth nothing."""
    before = left_behind()
    with CostVm(kvm, FEW) as vm:
        vm.machine.private.set_table(0, [SLOT_GPA])  # no cycle has begun, nothing is there
        with pytest.raises(OperationFailed) as caught:
            vm.cycles(1)
        assert "left the guest" in caught.value.message
    assert left_behind() == before


@pytest.mark.parametrize(
    "shape",
    [
        Shape(PAGE + 1, 4, 1),
        Shape(0, 4, 1),
        Shape(PAGE, 1, 1),
        Shape(PAGE, 1 << 20, 1),
        Shape(PAGE, 4, -1),
        Shape(PAGE, 4, 17),
        Shape(1 << 45, 4, 1),
    ],
)
def test_shapes_that_cannot_be_are_bad_input(kvm: Kvm, shape: Shape) -> None:
    before = left_behind()
    with pytest.raises(InputError) as caught:
        measure_costs(kvm, [FEW, shape], rounds=1, cycles=1, access_slots=())
    assert caught.value.remedy is not None
    assert left_behind() == before


@pytest.mark.parametrize("slots", [2, 1 << 20])
def test_numbers_of_slots_to_read_in_that_cannot_be_are_bad_input(kvm: Kvm, slots: int) -> None:
    before = left_behind()
    with pytest.raises(InputError):
        measure_costs(kvm, [FEW], rounds=1, cycles=1, access_slots=(slots,))
    assert left_behind() == before


@pytest.mark.parametrize("shape", [FEW, Shape(2 * MIB, 40, 0), Shape(PAGE, 4, 2)])
def test_the_c_program_does_the_same(kvm: Kvm, shape: Shape, tmp_path: Path) -> None:
    del kvm  # a VM can be made here
    program = tmp_path / "lab_cost"
    source = Path(__file__).resolve().parents[2] / "tools" / "bench" / "lab_cost.c"
    try:
        build(source, program)
    except MissingPrerequisite as exc:
        pytest.skip(exc.message)
    with CProgram(program, shape, tmp_path) as c:
        for _ in range(2):
            took, logged = c.cycles(3)
            assert logged == shape.touched
            assert list(took) == list(Op)
            assert all(len(ns) == 3 and min(ns) > 0 for ns in took.values())
        c._process.kill()
        with pytest.raises(OperationFailed):
            c.cycles(1)


def test_the_command_prints_one_document(kvm: Kvm) -> None:
    del kvm
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.slot_costs",
         "--slot-sizes", "2M", "--slots", "4", "--rounds", "1", "--no-lookup", "--json"],
        cwd=Path(__file__).resolve().parents[2], capture_output=True, check=True, timeout=120,
    )  # fmt: skip
    document = json.loads(done.stdout)
    assert [(s["size"], s["slots"], s["vcpus"]) for s in document["shapes"]] == [(2 * MIB, 4, 1)]
    assert document["lookup"] is None
