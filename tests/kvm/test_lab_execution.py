"""Plans on real KVM: after each of many random maps, every page shows what it should."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from qmp_memlistener.kvmlab import Kvm, Machine
from qmp_memlistener.kvmlab.arenas import arenas_of
from qmp_memlistener.kvmlab.executor import Executor
from qmp_memlistener.kvmlab.memory import BlockName, HostMemory
from qmp_memlistener.kvmlab.programs import DATA
from qmp_memlistener.kvmlab.strategies import HoleKind
from qmp_memlistener.memslots import (
    Plan,
    PlanStrategy,
    Rules,
    SlotTable,
    follow_blocks,
    plan,
    slot_table,
)
from qmp_memlistener.topology.model import FlatRange, FlatView, Kind
from tests.unit.memslots.memslots_model import content_of

pytestmark = pytest.mark.kvm

PAGE = 4096
PAGES = 24
BLOCKS = {"pc.ram": Kind.RAM, "dimm": Kind.RAM, "pc.rom": Kind.ROM, "mmio": Kind.IO}
RULES = Rules()


def random_view(dice: random.Random) -> FlatView:
    """RAM, ROM and MMIO in random places; blocks lie at their offsets or moved by 8 pages."""
    cuts = sorted(dice.sample(range(PAGES + 1), dice.randint(2, 10)))
    ranges = []
    for low, high in itertools.pairwise(cuts):
        name = dice.choice([*BLOCKS, "pc.ram", "pc.ram", ""])
        if name:
            offset = (low + dice.choice([0, 0, 0, 8])) * PAGE
            kind = BLOCKS[name]
            ranges.append(
                FlatRange(low * PAGE, (high - low) * PAGE, kind, name, offset, region_kind=kind)
            )
    return FlatView(ranges)


class Rig:
    """A machine whose guest goes through one word of every page that should be there."""

    def __init__(self, kvm: Kvm) -> None:
        self.memory: dict[BlockName, HostMemory] = {
            (n, None): HostMemory(2 * PAGES * PAGE) for n in BLOCKS
        }
        self.machine = Machine(kvm, vcpus=1, private_slot=99, private_gpa=1 << 30, reach=1 << 30)
        machine = self.machine
        machine.set_tables([[machine.private.scratch_gpa(0)]])
        machine.load(lambda i: (machine.entry(DATA), machine.private.cr3, machine.registers(i)))

    def check(self, view: FlatView) -> None:
        """The guest adds to each word of RAM, reads each of ROM, and meets nothing else."""
        content = content_of(view)
        words = [p * PAGE + 8 + (BLOCKS[content[p][0]] is Kind.ROM) for p in sorted(content)]
        before = {name: bytes(m.bytes) for name, m in self.memory.items()}
        harm = self.machine.exits().harm
        self.machine.set_tables([words or [self.machine.private.scratch_gpa(0)]])
        self.machine.wait_beats(2 * len(words) + 2)
        self.machine.set_tables([[self.machine.private.scratch_gpa(0)]])
        assert self.machine.exits().harm == harm
        written = {
            (name[0], at - at % PAGE)
            for name, m in self.memory.items()
            for at in range(8, len(m.bytes), PAGE)
            if bytes(m.bytes[at : at + 8]) != before[name][at : at + 8]
        }
        ram = {(n, at) for n, at in content.values() if BLOCKS[n] is Kind.RAM}
        assert written == ram

    def close(self) -> None:
        self.machine.close()
        for memory in self.memory.values():
            memory.close()


def slots(rig: Rig, _tables: list[SlotTable]) -> Executor:
    return Executor(rig.machine, rig.memory, sync=True)


def holes(kind: HoleKind) -> Callable[[Rig, list[SlotTable]], Executor]:
    return lambda rig, tables: Executor(
        rig.machine, rig.memory, hole=kind, arenas=arenas_of(tables)
    )


def chain(views: list[FlatView], strategy: PlanStrategy) -> list[Plan]:
    table = slot_table(views[0], RULES)
    if strategy is PlanStrategy.HOLE:
        table = follow_blocks(table, [{0: v} for v in views], RULES, None)
    out: list[Plan] = []
    for before, after in itertools.pairwise(views):
        out.append(plan(before, after, strategy, table=table, rules=RULES, max_holes=None))
        table = out[-1].after
    return out


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("strategy", "make"),
    [
        pytest.param(PlanStrategy.QEMU, slots, id="qemu"),
        pytest.param(PlanStrategy.PAUSE, slots, id="pause"),
        pytest.param(PlanStrategy.BATCH_INCREMENTAL, slots, id="batch"),
        pytest.param(PlanStrategy.BATCH_FULL, slots, id="batch-full"),
        pytest.param(PlanStrategy.HOLE_SPLIT, slots, id="hole-split"),
        pytest.param(PlanStrategy.HOLE, holes(HoleKind.MPROTECT), id="hole"),
        pytest.param(PlanStrategy.HOLE, holes(HoleKind.MUNMAP), id="hole-munmap"),
        pytest.param(PlanStrategy.HOLE, holes(HoleKind.USERFAULT), id="hole-userfault"),
    ],
)
def test_every_map_is_what_the_guest_finds(
    kvm: Kvm, seed: int, strategy: PlanStrategy, make: Callable[[Rig, list[SlotTable]], Executor]
) -> None:
    dice = random.Random(seed)
    views = [random_view(dice) for _ in range(30)]
    plans = chain(views, strategy)
    rig = Rig(kvm)
    executor = make(rig, [t for p in plans for t in (p.before, p.after)])
    try:
        executor.install(plans[0].before)
        rig.machine.release()
        rig.check(views[0])
        for done, view in zip(plans, views[1:], strict=True):
            carried = executor.carry_out(done)
            carried.check(done.ops)
            assert carried.took_ns >= carried.calls_ns
            rig.check(view)
    finally:
        executor.close()
        rig.close()


def test_a_plan_for_other_slots_is_refused(kvm: Kvm) -> None:
    from qmp_memlistener.errors import OperationFailed

    dice = random.Random(3)
    views = [random_view(dice) for _ in range(3)]
    plans = chain(views, PlanStrategy.QEMU)
    rig = Rig(kvm)
    try:
        executor = Executor(rig.machine, rig.memory)
        executor.install(plans[0].before)
        with pytest.raises(OperationFailed, match="other slots"):
            executor.carry_out(plans[1])
    finally:
        rig.close()
