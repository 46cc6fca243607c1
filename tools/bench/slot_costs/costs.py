"""What slot operations cost: by operation, slot size, number of slots, and vCPUs that run.

Every shape is a VM of its own (`cost_vm`); all of them are there at once and take turns in random
order, so that a slow minute of the machine hits all of them.  Beside it, what many slots cost
whoever looks one up: a guest that reads pages in many slots, or as many pages in one
(`cost_access`).  How KVM finds a slot is counted and timed in `lookup`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import msgspec

from qmp_memlistener.distribution import Distribution
from qmp_memlistener.kvmlab.abi import Cap
from qmp_memlistener.kvmlab.vm import Kvm, flavour

from .access import AccessVm
from .lookup import MOST_SLOTS
from .vm import CostVm, Op, Shape

__all__ = [
    "AccessCost",
    "Costs",
    "ShapeCost",
    "cost_document",
    "default_shapes",
    "default_slots",
    "measure_costs",
    "one_at_a_time",
]

_MIB = 1 << 20


class ShapeCost(msgspec.Struct, frozen=True):
    """A VM with `slots` slots in all and `vcpus` that run: operations on one slot of `size` bytes.

    `ops` by name (`Op`), in the order of a cycle, each done `cycles` times.  Before memory was
    taken away the guest wrote `touched_pages` of the slot; the dirty log then had `logged_pages` of
    them, in the worst block.
    """

    size: int
    slots: int
    vcpus: int
    cycles: int
    touched_pages: int
    logged_pages: int
    ops: dict[str, Distribution]


class AccessCost(msgspec.Struct, frozen=True):
    """A guest's read of a page in a VM with `slots` slots, the pages in `spread` of them or in one.

    `many` and `one` are what a read took, means of many reads.
    """

    slots: int
    pages: int
    spread: int
    many: Distribution
    one: Distribution


class Costs(msgspec.Struct, frozen=True):
    """What `measure_costs` found.

    `kvm` is `vmx`, `svm`, `software` or `unknown`; `cpus_apart` says that whoever changed slots had
    a CPU to himself.
    """

    kvm: str
    cpus_apart: bool
    seed: int
    shapes: tuple[ShapeCost, ...]
    accesses: tuple[AccessCost, ...]


def one_at_a_time(
    sizes: Sequence[int], slots: Sequence[int], vcpus: Sequence[int]
) -> tuple[Shape, ...]:
    """The first of each, then each of the others with the first of the rest."""
    first = Shape(sizes[0], slots[0], vcpus[0])
    found = [first]
    found += [Shape(first.size, first.slots, n) for n in vcpus[1:]]
    found += [Shape(size, first.slots, first.vcpus) for size in sizes[1:]]
    found += [Shape(first.size, n, first.vcpus) for n in slots[1:]]
    return tuple(dict.fromkeys(found))


def default_shapes(kvm: Kvm) -> tuple[Shape, ...]:
    """Around 16 MiB, 8 slots and one vCPU; no more slots than this KVM takes."""
    return one_at_a_time(
        sizes=(16 * _MIB, 2 * _MIB, 128 * _MIB, 1024 * _MIB),
        slots=default_slots(kvm),
        vcpus=(1, 0, 2, 4),
    )


def default_slots(kvm: Kvm) -> tuple[int, ...]:
    """From few slots to as many as this KVM takes, at most 32,764."""
    most = kvm.capability(Cap.NR_MEMSLOTS)
    return tuple(dict.fromkeys(min(n, most) for n in (8, 509, 4096, MOST_SLOTS)))


def measure_costs(
    kvm: Kvm,
    shapes: Sequence[Shape],
    *,
    rounds: int = 10,
    cycles: int = 5,
    access_slots: Sequence[int] = (),
    seed: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Costs:
    """`rounds` over all of them, each shape `cycles` times in a row; a round more as warm-up.

    `progress` is told how many rounds are done and how many there are.  Raises InputError for a
    shape that cannot be, MissingPrerequisite, OperationFailed; VMs are gone then too.
    """
    chance = random.Random(seed)
    for shape in shapes:
        shape.check()
    with ExitStack() as stack:
        costs = [_Cost(stack.enter_context(CostVm(kvm, shape)), cycles) for shape in shapes]
        accesses = [_Access(stack.enter_context(AccessVm(kvm, n, seed)), n) for n in access_slots]
        turns: list[_Cost | _Access] = [*costs, *accesses]
        for done in range(-1, rounds):
            chance.shuffle(turns)
            for turn in turns:
                turn.take(keep=done >= 0)
            if progress is not None and done >= 0:
                progress(done + 1, rounds)
        return Costs(
            kvm=flavour(),
            cpus_apart=all(cost.vm.cpus.apart for cost in costs),
            seed=seed,
            shapes=tuple(cost.found() for cost in costs),
            accesses=tuple(access.found() for access in accesses),
        )


class _Cost:
    """A shape's VM and what was timed in it so far."""

    def __init__(self, vm: CostVm, cycles: int) -> None:
        self.vm = vm
        self._cycles = cycles
        self._took: dict[Op, list[int]] = {op: [] for op in Op}
        self._logged = vm.shape.touched

    def take(self, *, keep: bool) -> None:
        took, logged = self.vm.cycles(self._cycles)
        self._logged = min(self._logged, logged)
        if keep:
            for op, ns in took.items():
                self._took[op] += ns

    def found(self) -> ShapeCost:
        shape = self.vm.shape
        return ShapeCost(
            shape.size,
            shape.slots,
            shape.vcpus,
            len(self._took[Op.ADD]),
            shape.touched,
            self._logged,
            {str(op): Distribution.of(ns) for op, ns in self._took.items()},
        )


class _Access:
    """The same for reads."""

    def __init__(self, vm: AccessVm, slots: int) -> None:
        self._vm = vm
        self._slots = slots
        self._one: list[int] = []
        self._many: list[int] = []

    def take(self, *, keep: bool) -> None:
        one, many = self._vm.access_ns()
        if keep:
            self._one.append(one)
            self._many.append(many)

    def found(self) -> AccessCost:
        return AccessCost(
            self._slots,
            self._vm.pages,
            self._vm.spread,
            Distribution.of(self._many),
            Distribution.of(self._one),
        )


def cost_document(found: Costs) -> dict[str, object]:
    """For JSON: sizes are bytes, times ns, all integers.

    Keys: `kvm`, `cpus_apart`, `seed`; `shapes`: a list of `size`, `slots`, `vcpus`, `cycles`,
    `touched_pages`, `logged_pages` and `ops`, which has `add`, `same`, `punch`, `fill`, `log_on`,
    `log_off`, `move` and `delete`; `accesses`: a list of `slots`, `pages`, `spread`, `many` and
    `one`.  Each op, `many` and `one` have `n`, `p50_ns`, `p90_ns`, `p99_ns` and `max_ns`.  See
    `ShapeCost`, `AccessCost` and `cost_vm.Op`.
    """
    document: dict[str, object] = msgspec.to_builtins(found)
    return document
