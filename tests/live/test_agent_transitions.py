"""The agent on guests that change their map: each transition is seen, in order, with its slots.

On every QEMU here, under KVM and TCG.  What hotplug and PCI devices do is in test_agent_hotplug.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from qmp_memlistener.guests import (
    PAM_RAM,
    PAM_ROM,
    GuestSpec,
    Pulse,
    QemuBuild,
    boot_args,
    launch,
)
from qmp_memlistener.memslots import ADDRESS_SPACES
from qmp_memlistener.records import GuestState, SlotOp, TransitionRecord
from qmp_memlistener.topology import Hole, Kind, Transition, read_maps
from qmp_memlistener.tracking import Tracker
from tests.support.host import patience
from tests.support.leftovers import enabled_events, flush_rcu, live_views
from tests.support.live import (
    QEMUS,
    Commits,
    Seen,
    Shape,
    Vm,
    attach_bare,
    booted,
    cases,
    op_shapes,
    planned,
    qmp,
    silenced,
    skip_without_kvm,
)

pytestmark = pytest.mark.qemu

BIOS_AREA = (0xF0000, 0x10000)
TOGGLES = 200


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
        attach_bare(vm.target, on_record=seen) as agent,
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
        async with attach_bare(vm.target, on_record=seen) as agent:
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
        attach_bare(vm.target, on_record=seen) as agent,
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
            tracker.commits.slot_operation(op)

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
    async with attach_bare(vm.target, on_record=seen) as agent:
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
        attach_bare(f"unix:{guest.monitors[0]}", on_record=seen) as agent,
        qmp(guest.monitors[1]) as monitor,
    ):
        await monitor.execute("cont")
        assert guest.ram is not None
        with Pulse(guest.ram) as pulse:
            await pulse.wait_ready(timeout=patience(30.0))
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
        async with attach_bare(vm.target, on_record=seen) as agent:
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
