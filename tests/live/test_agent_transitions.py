"""The agent on guests that change their map: each transition is seen, in order, with its slots.

On every QEMU here, under KVM and TCG.  What hotplug and PCI devices do is in test_agent_hotplug.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from qmp_memlistener import MemoryListener, attach
from qmp_memlistener.guests import (
    PAM_RAM,
    PAM_ROM,
    GuestSpec,
    Pulse,
    QemuBuild,
    boot_args,
    launch,
)
from qmp_memlistener.memslots import ADDRESS_SPACES, Rules, SlotTable, plan
from qmp_memlistener.recording import GuestState, SlotOp, TransitionRecord
from qmp_memlistener.topology import FlatRange, Hole, Kind, Transition, read_maps
from qmp_memlistener.tracking import RawOp, Tracker
from tests.support.live import (
    QEMUS,
    Commits,
    Seen,
    Shape,
    Vm,
    best_accel,
    booted,
    builds,
    cases,
    enabled_events,
    flush_rcu,
    live_views,
    op_shapes,
    planned_shapes,
    qmp,
    silenced,
    skip_without_kvm,
)

pytestmark = pytest.mark.qemu

BIOS_AREA = (0xF0000, 0x10000)
TOGGLES = 200


def planned(
    transition: Transition, table: SlotTable, rules: Rules
) -> tuple[list[Shape], SlotTable]:
    """What `plan` says QEMU does for a transition, and the slots after it."""
    p = plan(transition.before, transition.after, table=table, rules=rules)
    return planned_shapes(p.ops), p.after


def without_ids(ops: list[Shape]) -> list[Shape]:
    return [(op, as_id, -1, gpa, size, flags) for op, as_id, _, gpa, size, flags in ops]


@cases()
@pytest.mark.parametrize("machine", ["pc", "q35"])
@pytest.mark.asyncio
async def test_every_toggle_is_reported_in_order(
    build: QemuBuild, accel: str, machine: str, seen: Seen, tmp_path: Path
) -> None:
    """200 as fast as the guest can, 200 with a period.

    The pc logs to a file of its own that is read in place, the q35's log must be redirected.
    """
    in_place = machine == "pc"
    binary = build if in_place else silenced(build, tmp_path)
    commits = Commits()
    async with (
        booted(build, accel, machine, binary=binary, smp=2 if machine == "pc" else 1) as vm,
        attach(vm.target, on_record=seen) as agent,
    ):
        assert agent.source == "trace"
        assert any("QEMU's own log" in r for r in agent.remarks) == in_place
        agent.register(commits)
        # One at a time, so that both directions and all slot ids are known.
        for step in (vm.open_pam, vm.close_pam):
            await step()
            await agent.settle()
        opened, closed = commits.transitions
        table, rules = agent.slots, agent.rules
        start_ns = time.monotonic_ns()
        for period_ms in (0, 3):
            await vm.toggle(TOGGLES, period_ms)
            await agent.settle()
        end_ns = time.monotonic_ns()
        assert agent.transitions == len(commits.transitions) == 2 + 2 * TOGGLES

    seen.check_nothing_wrong()
    found = seen.transitions
    assert len(found) == 2 + 2 * TOGGLES
    assert [t.detail for t in found[:2]] == ["full", "full"]
    assert all(start_ns <= t.t_ns <= end_ns for t in found[2:])
    ops = seen.ops_by_transition()
    assert None not in ops
    if accel == "tcg":
        assert all(op.predicted for op in seen.of(SlotOp))
        return

    assert not any(op.predicted for op in seen.of(SlotOp))
    to_open, table_open = planned(opened, table, rules)
    to_close, table_closed = planned(closed, table_open, rules)
    assert to_open
    assert to_close
    assert planned(opened, table_closed, rules)[0] == to_open
    for i, t in enumerate(found):
        traced, wanted = op_shapes(ops[t.seq]), to_close if i % 2 else to_open
        if i < 2:  # these told the ids
            traced, wanted = without_ids(traced), without_ids(wanted)
        assert traced == wanted, f"transition {t.seq}"
        holes = t.holes_punched if i % 2 else t.holes_filled
        assert [(h.block, h.start, h.size) for h in holes] == [("pc.ram", *BIOS_AREA)]
        assert (t.holes_filled if i % 2 else t.holes_punched) == []
    # Listeners are told the same maps, also of those that no snapshot shows.
    for i, transition in enumerate(commits.transitions):
        shown = transition.after.lookup(BIOS_AREA[0])
        assert shown is not None
        assert shown.kind is (Kind.ROM if i % 2 else Kind.RAM)


@cases()
@pytest.mark.asyncio
async def test_the_first_transition_after_attaching_is_exact_too(
    build: QemuBuild, accel: str, seen: Seen
) -> None:
    """The slots before it were never seen; what QEMU does follows from the map all the same."""
    commits = Commits()
    async with booted(build, accel) as vm:
        await vm.toggle(7)
        async with attach(vm.target, on_record=seen) as agent:
            agent.register(commits)
            table = agent.slots
            await vm.close_pam()
            await agent.settle()
            (transition,) = commits.transitions
            wanted, _ = planned(transition, table, agent.rules)
    seen.check_nothing_wrong()
    (found,) = seen.transitions
    assert found.detail == "full"
    assert without_ids(op_shapes(seen.ops(1))) == without_ids(wanted)


@cases("kvm")
@pytest.mark.asyncio
async def test_a_change_right_behind_a_snapshot_is_not_read_with_its_map(
    build: QemuBuild, accel: str, seen: Seen
) -> None:
    """The order is too rare to wait for, so a guest's own lines are put into it.

    The map is open when the snapshot is taken; the guest closes it before the text is folded in,
    with a slot of which nothing is known yet.
    """
    async with (
        booted(build, accel) as vm,
        qmp(vm.guest.monitors[1]) as monitor,
        attach(vm.target, on_record=seen) as agent,
    ):
        await vm.open_pam()
        await agent.settle()
        text = await monitor.execute("human-monitor-command", {"command-line": "info mtree -o -D"})
        await vm.close_pam()
        await agent.settle()
        rules = agent.rules
    assert isinstance(text, str)
    maps = {ADDRESS_SPACES[name]: m for name, m in read_maps(text, list(ADDRESS_SPACES)).items()}
    tracker = Tracker(maps, 0, has_slots=True, traced=True, rules=rules)

    def commit(seq: int) -> None:
        tracker.commits.view_rebuilt(0, 1)
        for op in seen.ops(seq):
            size = 0 if op.op == "delete" else op.size
            assert op.hva is not None
            tracker.commits.slot_operation(
                RawOp(0, op.as_id, op.slot, op.gpa, size, op.flags, op.hva, op.ret)
            )

    opens, closes = 1, 2
    for seq in (closes, opens):
        commit(seq)
    tracker.mark()
    commit(closes)
    tracker.snapshot(maps, 1)
    for seq in (opens, closes, opens):
        commit(seq)
    tracker.mark()
    tracker.snapshot(maps, 2)
    records, _ = tracker.take()
    found = [r for r in records if isinstance(r, TransitionRecord)]
    assert len(found) == 6
    for i, t in enumerate(found):
        holes = t.holes_filled if i % 2 else t.holes_punched
        assert [(h.block, h.start, h.size) for h in holes] == [("pc.ram", *BIOS_AREA)], t
        assert t.flips == []


STEPS = {
    "pc": [
        ("pam", PAM_RAM << 4),
        ("pam", PAM_ROM << 4),
        ("pam", 0),
        ("smram", 0x4A),
        ("smram", 0x0A),
    ],
    "q35": [
        ("pam", PAM_RAM << 4),
        ("pam", 0),
        ("smram", 0x4A),
        ("smram", 0x0A),
        ("esmramc", 0x05),
        ("esmramc", 0x00),
        ("pciexbar", 0x1000_0001),
        ("pciexbar", 0x1000_0000),
    ],
}
Step = tuple[str, Transition, TransitionRecord]


async def walk(vm: Vm, machine: str, seen: Seen) -> list[Step]:
    """The steps that change the map: register, transition, its record.

    Goes twice and checks every operation on the way: the first round tells the slot ids, the
    second must be exact with them.
    """
    steps: list[Step] = []
    commits = Commits()
    async with attach(vm.target, on_record=seen) as agent:
        agent.register(commits)
        for turn in range(2):
            for register, value in STEPS[machine]:
                count, table = len(commits.transitions), agent.slots
                width = 8 if register == "pciexbar" else 1
                await vm.write(getattr(vm.bridge, register), value, width)
                await agent.settle()
                new = commits.transitions[count:]
                # An empty one is that of another address space, such as SMRAM.
                changed = [(t, r) for t, r in zip(new, seen.transitions[count:], strict=True) if t]
                assert len(changed) <= 1
                for transition, record in changed:
                    traced = op_shapes(op for op in seen.ops(record.seq) if op.as_id == 0)
                    wanted, _ = planned(transition, table, agent.rules)
                    if turn == 0:
                        traced, wanted = without_ids(traced), without_ids(wanted)
                        steps.append((register, transition, record))
                    assert traced == wanted, (register, hex(value))
    seen.check_nothing_wrong()
    return steps


def hole_of(transition: Transition, start: int) -> Hole:
    (hole,) = (h for h in transition.holes_punched if h.start == start)
    return hole


@cases()
@pytest.mark.asyncio
async def test_smram_over_vga_is_a_hole_with_its_cover(
    build: QemuBuild, accel: str, seen: Seen
) -> None:
    """One vCPU: its slot from 0 on is deleted."""
    async with booted(build, accel, "pc", "-device", "VGA,id=vga0") as vm:
        steps = await walk(vm, "pc", seen)
    assert [register for register, *_ in steps] == ["pam", "pam", "pam", "smram", "smram"]
    filled, punched = steps[3][1], steps[4][1]
    (hole,) = filled.holes_filled
    assert hole == hole_of(punched, 0xA0000)
    assert (hole.block, hole.size, hole.offset) == ("pc.ram", 0x20000, 0xA0000)
    assert hole.covered_by == "vga-lowmem"
    assert hole.owner is not None
    assert "vga0" in hole.owner
    # Read-only is no hole: the same bytes, shown with another kind.
    (flip,) = steps[1][1].flips
    assert (flip.start, flip.size, flip.name) == (*BIOS_AREA, "pc.ram")
    assert (flip.before, flip.after) == (Kind.RAM, Kind.ROM)
    cause = steps[3][2].cause
    assert (cause.type, cause.regions, cause.owner) == ("region", ["vga-lowmem"], hole.owner)


@cases()
@pytest.mark.asyncio
async def test_tseg_and_mmconfig_are_holes_with_their_cover(
    build: QemuBuild, accel: str, seen: Seen
) -> None:
    memory = 512 << 20  # MMCONFIG is 256 MiB large and lies over the upper half
    async with booted(build, accel, "q35", memory=memory) as vm:
        assert vm.bridge.esmramc is not None
        steps = await walk(vm, "q35", seen)
    by_register: dict[str, list[Transition]] = {}
    for register, transition, _ in steps:
        by_register.setdefault(register, []).append(transition)
    # Without SMM (KVM of QEMU 10 and later here) Q35 has neither SMRAM nor TSEG.
    if "esmramc" in by_register:
        gone, back = by_register["esmramc"]
        hole = hole_of(gone, memory - (8 << 20))
        assert (hole.block, hole.size, hole.covered_by) == ("pc.ram", 8 << 20, "tseg-blackhole")
        assert hole.owner is not None
        assert hole in back.holes_filled
    else:
        assert accel == "kvm"
    gone, back = by_register["pciexbar"]
    hole = hole_of(gone, 0x1000_0000)
    assert (hole.block, hole.size, hole.covered_by) == ("pc.ram", 256 << 20, "pcie-mmcfg-mmio")
    assert hole.owner is not None
    assert "q35" in hole.owner
    assert hole in back.holes_filled


@cases(of=[*QEMUS[:1], *QEMUS[1:][-1:]])
@pytest.mark.asyncio
async def test_a_boot_through_the_bios_is_followed(
    build: QemuBuild, accel: str, seen: Seen, tmp_path: Path
) -> None:
    """From before the first instruction: firmware is the busiest time of a memory map.

    On the oldest and the newest QEMU: under software KVM this takes seconds.
    """
    skip_without_kvm(build, accel)
    spec = GuestSpec(machine="q35", accel=accel, args=(*boot_args("disk"), "-S", "-device", "VGA"))
    async with (
        launch(spec.on(silenced(build, tmp_path))) as guest,
        attach(f"unix:{guest.monitors[0]}", on_record=seen) as agent,
        qmp(guest.monitors[1]) as monitor,
    ):
        await monitor.execute("cont")
        assert guest.ram is not None
        with Pulse(guest.ram) as pulse:
            await pulse.wait_ready()
        await agent.settle()
        shown = agent.map.view.lookup(0xF0000)
        assert shown is not None
        assert (shown.kind, shown.name) == (Kind.ROM, "pc.ram")
    seen.check_nothing_wrong()
    assert len(seen.transitions) >= 5
    assert next(s.status for s in seen.of(GuestState)) == "running"
    assert {op.predicted for op in seen.of(SlotOp)} == {accel == "tcg"}
    assert {c.cause.type for c in seen.transitions} >= {"pci_bar", "region"}


@cases()
@pytest.mark.asyncio
async def test_views_are_freed_as_without_the_agent(
    build: QemuBuild, accel: str, seen: Seen, tmp_path: Path
) -> None:
    """FlatViews created minus destroyed: what the agent does must not keep any alive."""
    log = tmp_path / "qemu.log"
    args = ("-D", str(log), "-trace", "flatview_new", "-trace", "flatview_destroy")
    async with booted(build, accel, "pc", *args) as vm, qmp(vm.guest.monitors[1]) as monitor:

        async def count() -> tuple[int, int]:
            await flush_rcu(monitor)
            return live_views(log)

        at_first, alive = await count()
        await vm.toggle(20)
        without, alive_without = await count()
        async with attach(vm.target, on_record=seen) as agent:
            await vm.toggle(20)
            await agent.settle()
            for _ in range(5):
                await agent.settle()
            assert agent.transitions == 20
            assert agent.snapshots[0] >= 2
        after, alive_after = await count()
        assert after - without == without - at_first >= 20
        assert alive_after == alive_without == alive
        # The events were on before, and are.
        assert {"flatview_new", "flatview_destroy"} <= await enabled_events(monitor)
        # This would have been seen: `info mtree -f` leaks a reference to each view it prints.
        await monitor.execute("human-monitor-command", {"command-line": "info mtree -f"})
        await vm.toggle(2)
        assert (await count())[1] > alive


# -- listeners -----------------------------------------------------------------------------------


class Diary(MemoryListener):
    """Writes down every callback."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def begin(self) -> None:
        self.calls.append(("begin", None))

    def region_del(self, section: FlatRange) -> None:
        self.calls.append(("region_del", section))

    def region_add(self, section: FlatRange) -> None:
        self.calls.append(("region_add", section))

    def region_nop(self, section: FlatRange) -> None:
        self.calls.append(("region_nop", section))

    def log_start(self, section: FlatRange) -> None:
        self.calls.append(("log_start", section))

    def log_stop(self, section: FlatRange) -> None:
        self.calls.append(("log_stop", section))

    def hole_punched(self, hole: Hole) -> None:
        self.calls.append(("hole_punched", hole))

    def hole_filled(self, hole: Hole) -> None:
        self.calls.append(("hole_filled", hole))

    def slot_changed(self, op: SlotOp) -> None:
        self.calls.append(("slot_changed", op))

    def commit(self, transition: Transition) -> None:
        self.calls.append(("commit", transition))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def of(self, name: str) -> list[object]:
        return [what for called, what in self.calls if called == name]


class AsyncDiary(MemoryListener):
    """The same with coroutines that let others run."""

    def __init__(self) -> None:
        self.sections: list[tuple[str, FlatRange]] = []
        self.commits: list[Transition] = []

    async def region_del(self, section: FlatRange) -> None:
        await asyncio.sleep(0)
        self.sections.append(("region_del", section))

    async def region_add(self, section: FlatRange) -> None:
        await asyncio.sleep(0)
        self.sections.append(("region_add", section))

    async def commit(self, transition: Transition) -> None:
        await asyncio.sleep(0)
        self.commits.append(transition)


class Raising(MemoryListener):
    """Fails in one callback, works in the others."""

    def __init__(self) -> None:
        self.commits = 0

    def region_del(self, section: FlatRange) -> None:
        raise KeyError(section.name)

    async def commit(self, transition: Transition) -> None:  # noqa: ARG002
        self.commits += 1
        await asyncio.sleep(0)
        raise ValueError("commit of a test")


class Hanging(MemoryListener):
    """Never returns from its first callback until it is let go."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.hung = asyncio.Event()
        self.commits = 0

    async def begin(self) -> None:
        self.hung.set()
        await self.release.wait()

    def commit(self, transition: Transition) -> None:  # noqa: ARG002
        self.commits += 1


@cases()
@pytest.mark.asyncio
async def test_a_listener_is_told_in_qemus_order(build: QemuBuild, accel: str, seen: Seen) -> None:
    diary, other = Diary(), AsyncDiary()
    async with booted(build, accel) as vm, attach(vm.target, on_record=seen) as agent:
        agent.register(diary)
        agent.register(other)
        with pytest.raises(ValueError, match="registered already"):
            agent.register(diary)
        await agent.settle()
        # First the present map, as QEMU tells a new listener.
        present = agent.map.view
        assert diary.names == ["begin", *["region_add"] * len(present), "commit"]
        assert diary.of("region_add") == list(present)
        diary.calls.clear()
        other.sections.clear()

        await vm.open_pam()
        await agent.settle()
        (transition,) = diary.of("commit")
        assert isinstance(transition, Transition)
        assert (transition.before, transition.after) == (present, agent.map.view)
        # begin, the del pass, the add pass with what stays in between, both ascending; commit.
        dels, adds = len(transition.removed), len(transition.after)
        assert diary.names[: 1 + dels] == ["begin", *["region_del"] * dels]
        passed = diary.names[1 + dels : 1 + dels + adds]
        assert set(passed) == {"region_add", "region_nop"}
        assert diary.names[-1] == "commit"
        assert diary.names.count("begin") == diary.names.count("commit") == 1
        assert diary.of("region_del") == list(transition.removed)
        second_pass = [what for _, what in diary.calls[1 + dels : 1 + dels + adds]]
        assert second_pass == list(transition.after)
        assert diary.of("region_add") == list(transition.added)
        assert diary.of("region_nop") == list(transition.kept)
        assert diary.of("slot_changed") == seen.ops(1) != []
        assert diary.of("hole_filled") == list(transition.holes_filled) != []
        assert diary.of("hole_punched") == []
        assert other.sections == [
            *(("region_del", s) for s in transition.removed),
            *(("region_add", s) for s in transition.added),
        ]
        assert other.commits[-1] is transition

        await agent.unregister(diary)
        diary.calls.clear()
        await vm.close_pam()
        await agent.settle()
        assert diary.calls == []
        assert len(other.commits) == 3
        with pytest.raises(ValueError, match="not registered"):
            await agent.unregister(diary)


@builds(QEMUS[:1])
@pytest.mark.asyncio
async def test_a_listener_that_raises_or_hangs_harms_no_other(build: QemuBuild, seen: Seen) -> None:
    raising, good, hanging = Raising(), Commits(), Hanging()
    async with booted(build, best_accel(build)) as vm:
        async with attach(vm.target, on_record=seen) as agent:
            for listener in (raising, good):
                agent.register(listener)
            for step in (vm.open_pam, vm.close_pam):
                await step()
                await agent.settle()
            assert len(good.transitions) == len(seen.transitions) == 2
            assert raising.commits == 3
            failures = [n for n in seen.notes if "Raising" in n]
            assert any("region_del" in n and "KeyError" in n for n in failures)
            assert sum("commit of a test" in n for n in failures) == 3

            agent.register(hanging)
            await asyncio.wait_for(hanging.hung.wait(), 5)
            await vm.toggle(20)
            await seen.wait_for(lambda: len(seen.transitions) == 22)
            async with asyncio.timeout(5):
                while len(good.transitions) < 22:  # noqa: ASYNC110 (its queue is its own)
                    await asyncio.sleep(0)
            assert hanging.commits == 0
            start = time.monotonic()
        # Leaving does not wait for it for ever.
        assert time.monotonic() - start < 4
        seen.check_nothing_wrong()


@builds(QEMUS[:1])
@pytest.mark.asyncio
async def test_settling_does_not_wait_for_ever_for_a_listener_that_hangs(
    build: QemuBuild, seen: Seen
) -> None:
    hanging = Hanging()
    async with booted(build, best_accel(build)) as vm, attach(vm.target, on_record=seen) as agent:
        agent.register(hanging)
        await asyncio.wait_for(hanging.hung.wait(), 5)
        try:
            await vm.open_pam()
            async with asyncio.timeout(6):
                await agent.settle()
            assert len(seen.transitions) == 1
        finally:
            hanging.release.set()


@cases(of=QEMUS[:1])
@pytest.mark.asyncio
async def test_a_subscriber_that_raises_harms_nobody(
    build: QemuBuild, accel: str, seen: Seen
) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("subscriber of a test")

    async with booted(build, accel) as vm, attach(vm.target) as agent:
        agent.subscribe(broken)
        unsubscribe = agent.subscribe(seen)
        await vm.toggle(4)
        async with asyncio.timeout(5):
            await agent.settle()
        assert len(seen.transitions) == 4
        unsubscribe()
        await vm.toggle(2)
        await agent.settle()
        assert len(seen.transitions) == 4
        assert agent.transitions == 6


@cases("kvm")
@pytest.mark.asyncio
async def test_dirty_logging_is_told(build: QemuBuild, accel: str, seen: Seen) -> None:
    """A migration logs every slot: flag changes and no transition."""
    diary = Diary()
    async with (
        booted(build, accel) as vm,
        attach(vm.target, on_record=seen) as agent,
        qmp(vm.guest.monitors[1]) as monitor,
    ):
        agent.register(diary)
        await agent.settle()
        view = agent.map.view
        slots = list(agent.slots)
        await monitor.execute("migrate-set-parameters", {"max-bandwidth": 4096})
        await monitor.execute("migrate", {"uri": "exec:cat >/dev/null"})
        await seen.wait_for(lambda: len(seen.of(SlotOp)) >= len(slots))
        await monitor.execute("migrate_cancel")
        await seen.wait_for(lambda: len(seen.of(SlotOp)) >= 2 * len(slots))
        await agent.settle()
        ops = seen.of(SlotOp)
        assert {op.op for op in ops} == {"flags"}
        assert {op.transition for op in ops} == {None}
        assert [op.flags & 1 for op in ops] == [1] * len(slots) + [0] * len(slots)
        writable = [r for r in view if r.memslot]
        assert diary.of("log_start") == diary.of("log_stop") == writable
        assert agent.map.view == view
    assert seen.transitions == []
    seen.check_nothing_wrong()


# -- polling -------------------------------------------------------------------------------------


@cases()
@pytest.mark.asyncio
async def test_polling_sees_what_stays_and_says_what_it_cannot(
    build: QemuBuild, accel: str, seen: Seen
) -> None:
    async with booted(build, accel) as vm, qmp(vm.guest.monitors[1]) as monitor:
        before = await enabled_events(monitor)
        commits = Commits()
        async with attach(vm.target, trace=False, on_record=seen) as agent:
            assert agent.source == "polling"
            assert "short-lived holes may be missed" in seen.header.source
            assert any("not seen" in note for note in seen.notes)
            assert seen.header.stamp_bound_ns is None
            agent.register(commits)
            table = agent.slots
            for i, step in enumerate((vm.open_pam, vm.close_pam), 1):
                await step()
                await seen.wait_for(lambda i=i: len(seen.transitions) >= i)  # type: ignore[misc]
            await agent.settle()
            ops = seen.of(SlotOp)
            assert ops
            assert all(op.predicted for op in ops)
            wanted, _ = planned(commits.transitions[0], table, agent.rules)
            assert op_shapes(seen.ops(1)) == wanted

            for command, event, status, running in (
                ("stop", "STOP", "paused", False),
                ("cont", "RESUME", "running", True),
                ("system_reset", "RESET", "running", True),
            ):
                count = len(seen.of(GuestState))
                await monitor.execute(command)
                await seen.wait_for(lambda n=count: len(seen.of(GuestState)) > n)  # type: ignore[misc]
                state = seen.of(GuestState)[-1]
                assert (state.event, state.status, state.running) == (event, status, running)
            assert await enabled_events(monitor) == before
        assert [t.detail for t in seen.transitions] == ["full", "full"]
        seen.check_nothing_wrong()


@cases()
@pytest.mark.asyncio
async def test_with_a_trace_the_guests_state_is_told_too(
    build: QemuBuild, accel: str, seen: Seen
) -> None:
    async with (
        booted(build, accel) as vm,
        attach(vm.target, on_record=seen) as agent,
        qmp(vm.guest.monitors[1]) as monitor,
    ):
        assert "every slot operation" in seen.header.source
        for command in ("stop", "cont", "system_reset"):
            await monitor.execute(command)
        await seen.wait_for(lambda: any(s.event == "RESET" for s in seen.of(GuestState)))
        await agent.settle()
        states = [(s.status, s.running) for s in seen.of(GuestState) if s.event != "RESET"]
        assert states[:2] == [("paused", False), ("running", True)]
