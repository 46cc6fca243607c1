"""One strategy in a race: its machine, its slots, its guest, its updates, and its dirty bitmap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec

from ..errors import OperationFailed
from ..memslots import Plan, Rules, SlotTable, follow_blocks, plan
from ..topology import FlatView
from .arenas import Arena, arenas_of
from .executor import ExecutionResult, Executor, nothing
from .layout import RAM, Layout
from .machine import Machine
from .measuring import Update, measure
from .memory import PAGE, HostMemories, HostMemory
from .programs import DATA, GAP, SIZE, WRITER, GuestKind, code
from .strategies import LabStrategy
from .system import Closing
from .vm import Kvm, Log, most_slots

__all__ = ["Competitor", "keeps_bitmap", "repeated_plans"]

_ALIASES = 2  # GiB of pages of 2 MiB: more than a TLB holds
_BITMAP_SIZE = 1 << 20


class Competitor(Closing):
    """A machine under one strategy.  Its vCPUs are held between updates."""

    def __init__(
        self,
        kvm: Kvm,
        strategy: LabStrategy,
        layout: Layout,
        guest: GuestKind,
        *,
        vcpus: int = 1,
        populate: bool = False,
        touch_hole: bool = False,
        rings: bool = False,
    ) -> None:
        """Raises InputError, OperationFailed, MissingPrerequisite."""
        self.strategy = strategy
        self.updates: list[Update] = []
        self._layout = layout
        self._guest = guest
        self._faults = 0  # of vCPUs that wait at the hole
        self._closers: list[Callable[[], None]] = []
        self._full, self._holed = layout.views(strategy.chunk)
        try:
            self._memory = HostMemory(layout.size, RAM)
            self._closers.append(self._memory.close)
            if populate:
                self._memory.populate()
            most = most_slots(kvm)
            self._rules = Rules(strategy.order, PAGE, slots=most - 1 - layout.extra)
            self.machine = Machine(
                kvm,
                vcpus=vcpus,
                private_slot=most - 1,
                private_gpa=layout.private_gpa,
                reach=layout.private_gpa,
                rings=rings,
                vm_type=strategy.vm_type,
            )
            self._closers.append(self.machine.close)
            self.machine.touched = touch_hole
            self._add_filler(most - 2)
            regions = {(r.name, r.owner) for r in self._full}
            self._memories: HostMemories = dict.fromkeys(regions, self._memory)
            self._executor = self._executor_of()
            self._closers.append(self._executor.close)
            first = self._first_table(self._full)
            self._plans = repeated_plans(strategy, layout, self._rules, first)
            self._executor.install(self._plans[0].before)
            self._load(touch_hole)
        except BaseException:
            self.close()
            raise

    # -- making --------------------------------------------------------------------------------

    def _add_filler(self, top: int) -> None:
        """Their ids count down from `top`, where those of plans do not come."""
        filler = HostMemory(PAGE, "filler")
        self._closers.append(filler.close)
        for i in range(self._layout.extra):
            self.machine.vm.set_region(top - i, self._layout.extra_gpa(i), PAGE, filler.hva)

    def _executor_of(self) -> Executor:
        strategy = self.strategy
        arenas: tuple[Arena, ...] = ()
        if strategy.hole is not None:
            arenas = arenas_of(self._first_table(view) for view in (self._full, self._holed))
        return Executor(
            self.machine, self._memories, hole=strategy.hole, arenas=arenas, sync=strategy.sync
        )

    def _first_table(self, view: FlatView) -> SlotTable:
        """The slots of a map that the executor begins with."""
        table = self._layout.table(view, self._rules)
        if self.strategy.hole is None:
            return table
        return follow_blocks(table, [{0: self._full}, {0: self._holed}], self._rules, None)

    def _load(self, touch_hole: bool) -> None:
        machine, layout = self.machine, self._layout
        vcpus = len(machine.threads)
        private = machine.private
        tables = [[private.scratch_gpa(i)] for i in range(vcpus)]
        cr3, code_at = private.cr3, private.code_gpa
        program = {GuestKind.GAP: GAP, GuestKind.WRITER: WRITER}.get(self._guest, DATA)
        if self._guest is GuestKind.DATA:
            tables = [layout.edges(i) for i in range(vcpus)]
        if touch_hole:
            tables = [[*t, layout.touching(i)] for i, t in enumerate(tables)]
        if self._guest is GuestKind.CODE:
            code_at = layout.inside(SIZE)
            self._memory.write(code_at - layout.start, code())
        if self._guest is GuestKind.PAGETABLE:
            cr3 = layout.inside(len(private.page_tables(0, _ALIASES)))
            self._memory.write(cr3 - layout.start, private.page_tables(cr3, _ALIASES))
            tables = [private.scratch_aliases(i, _ALIASES) for i in range(vcpus)]

        def begin(i: int) -> tuple[int, int, dict[str, int]]:
            more = {}
            if self._guest is GuestKind.WRITER:
                more = dict(zip(("r8", "r9", "r10", "r11"), layout.share(i, vcpus), strict=True))
            return code_at + program, cr3, machine.registers(i, **more)

        machine.set_tables(tables)
        machine.load(begin)

    # -- racing ----------------------------------------------------------------------------------

    def round(self) -> None:
        """Punch and fill; vCPUs run meanwhile.

        Raises OperationFailed, SlotRefused; then it can only be closed.
        """
        self.machine.release()
        self._update(self._plans[0], self._layout.lost)
        self._update(self._plans[1], (0, 0))
        self.machine.hold()

    def _update(self, what: Plan, hole: tuple[int, int]) -> None:
        machine = self.machine
        ledger = self._begin_ledger()

        def act() -> ExecutionResult:
            if hole != (0, 0):
                machine.hole = hole
            return self._carry_out(what)

        update, executed = measure(
            machine,
            act,
            ids_changed=bool(what.exposure.slot_ids_changed),
            unless=self._stopped,
        )
        if hole == (0, 0):
            machine.hole = hole
        changes = {"hole": update.hole + self._faults}
        if hole == (0, 0):
            self._faults = 0
        if ledger is not None:
            changes["pages_changed"], changes["pages_lost"] = self._end_ledger(
                ledger, executed.logs
            )
        self.updates.append(msgspec.structs.replace(update, **changes))

    def _stopped(self, vcpu: int) -> bool:
        """The vCPU waits at the hole, which its table has, until that is filled."""
        if not self.machine.touched or self.machine.hole == (0, 0):
            return False
        self._faults += len(self._executor.waiting_at())
        return bool(self._faults) or self.machine.threads[vcpu].waits

    def _carry_out(self, what: Plan) -> ExecutionResult:
        if self.strategy.idle:
            return nothing(self.machine)
        executed = self._executor.carry_out(what)
        executed.check(what.ops)
        return executed

    # -- dirty pages -----------------------------------------------------------------------------

    def _begin_ledger(self) -> list[int] | None:
        """What the guest's pages say now, all dirty logs empty; None when nothing is logged."""
        if not self._layout.logged or self._guest is not GuestKind.WRITER:
            return None
        self.machine.hold()
        self._executor.fetch_logs()
        pages = self._generations()
        self.machine.release()
        return pages

    def _end_ledger(self, before: list[int], logs: list[Log]) -> tuple[int, int]:
        """How many pages the guest changed since, and how many of them are in no log."""
        self.machine.hold()
        logs = [*logs, *self._executor.fetch_logs()]
        after = self._generations()
        self.machine.release()
        low, high = self._layout.lost
        changed = lost = 0
        for page, (was, now) in enumerate(zip(before, after, strict=True)):
            gpa = self._layout.start + page * PAGE
            if was == now or low <= gpa < high:
                continue
            changed += 1
            lost += not any(log.dirty(gpa) for log in logs)
        return changed, lost

    def write_every_page(self) -> list[int]:
        """Let a writer sweep all of its pages, which gives their gpas, and then only beat."""
        machine, layout = self.machine, self._layout
        pages = [layout.start + i * PAGE for i in range(layout.size // PAGE)]
        machine.release()
        machine.wait_beats(len(pages) + 1)
        machine.hold()
        machine.load(lambda i: (machine.entry(GAP), machine.private.cr3, machine.registers(i)))
        generations = self._generations()
        return [gpa for gpa, now in zip(pages, generations, strict=True) if now]

    def punch_at_rest(self) -> list[Log]:
        """Punch once while the guest touches nothing of the slot; the dirty logs afterwards."""
        self.machine.release()
        if not self.strategy.idle:
            self._carry_out(self._plans[0])
        self.machine.hold()
        return self._executor.fetch_logs()

    def _generations(self) -> list[int]:
        """The first word of each page."""
        return self._memory.words[:: PAGE // 8].tolist()

    # -- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        while self._closers:
            self._closers.pop()()


def repeated_plans(
    strategy: LabStrategy, layout: Layout, rules: Rules, table: SlotTable
) -> tuple[Plan, Plan]:
    """Punch and fill such that they can be repeated for ever, from `table` or what it comes to.

    So a slot that stays split is split before.  Raises OperationFailed.
    """
    full, holed = layout.views(strategy.chunk)
    for _ in range(3):
        punch = plan(full, holed, strategy.plan, table=table, rules=rules, max_holes=None)
        fill = plan(holed, full, strategy.plan, table=punch.after, rules=rules, max_holes=None)
        if fill.after == punch.before:
            return punch, fill
        table = fill.after
    raise OperationFailed(f"the plans of {strategy.name} do not come back to where they began")


def keeps_bitmap(kvm: Kvm, strategy: LabStrategy) -> bool:
    """Every dirty bit of RAM that stays is in KVM's bitmaps after a punch.

    A guest writes every page of a logged slot, then only counts heartbeats elsewhere: a bit outside
    the hole that is gone after the punch was lost by the update.  Logs are not fetched on the way,
    whatever the strategy does otherwise: that saves bits from being lost, it does not keep them.
    Raises OperationFailed.
    """
    layout = Layout(size=_BITMAP_SIZE, logged=True)
    still = replace(strategy, sync=False)
    with Competitor(kvm, still, layout, GuestKind.WRITER, populate=True) as competitor:
        written = competitor.write_every_page()
        logs = competitor.punch_at_rest()
        low, high = layout.lost
        stay = [gpa for gpa in written if not low <= gpa < high]
        assert len(stay) == (layout.size - (high - low)) // PAGE, "the guest wrote every page"
        return all(any(log.dirty(gpa) for log in logs) for gpa in stay)
