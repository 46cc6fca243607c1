"""Lines and snapshots become transitions: nothing missed, nothing invented, in order."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.memslots import OpKind, Rules
from qmp_memlistener.records import (
    Cause,
    CauseType,
    MapRecord,
    Reconciled,
    Record,
    SlotOp,
    TransitionRecord,
)
from qmp_memlistener.topology import FlatRange, FlatView, Kind, MemoryMap, ram_blocks
from qmp_memlistener.tracking import Tracker

MIB = 1 << 20
BASE = 0x7F00_0000_0000  # where the host has the RAM block
HOLES = (0xA0000, 0xC0000, 0xE0000)


def make_map(*holes: int) -> MemoryMap:
    """64 MiB of RAM with 64 KiB MMIO holes."""
    ranges, at = [], 0
    for start in sorted(holes):
        ranges.append(FlatRange(at, start - at, Kind.RAM, "ram", at, None, Kind.RAM))
        ranges.append(FlatRange(start, 0x10000, Kind.IO, f"dev-{start:x}", owner=f"d{start:x}"))
        at = start + 0x10000
    ranges.append(FlatRange(at, 64 * MIB - at, Kind.RAM, "ram", at, None, Kind.RAM))
    view = FlatView(ranges)
    return MemoryMap(view, ram_blocks(view), rendered=True)


def slot_op(t_ns: int, slot: int, gpa: int, size: int, flags: int, ret: int = 0) -> SlotOp:
    """An operation as the decoder makes it of a line."""
    kind = OpKind.ADD if size else OpKind.DELETE
    return SlotOp(
        t_ns=t_ns, as_id=0, slot=slot, op=kind, gpa=gpa, size=size, flags=flags, ret=ret,
        hva=BASE + gpa,
    )  # fmt: skip


class Kvm:
    """The slots of a pretended QEMU: turns a change of holes into its operations, 7.2's order."""

    def __init__(self, *holes: int) -> None:
        self.slots: dict[int, tuple[int, int]] = {}  # gpa: (id, size)
        self.t_ns = 0
        self.apply(make_map(*holes))

    def apply(self, m: MemoryMap) -> list[SlotOp]:
        wanted = {r.start: r.size for r in m.view if r.kind is Kind.RAM}
        ops = []
        for gpa in sorted(self.slots):
            slot, size = self.slots[gpa]
            if wanted.get(gpa) != size:
                ops.append(self._op(slot, gpa, 0))
                del self.slots[gpa]
        for gpa in sorted(wanted):
            if gpa not in self.slots:
                used = {s for s, _ in self.slots.values()}
                slot = next(i for i in range(99) if i not in used)
                self.slots[gpa] = (slot, wanted[gpa])
                ops.append(self._op(slot, gpa, wanted[gpa]))
        return ops

    def _op(self, slot: int, gpa: int, size: int, flags: int = 0) -> SlotOp:
        self.t_ns += 10
        return slot_op(self.t_ns, slot, gpa, size, flags)


def tracker(*holes: int, has_slots: bool = True, traced: bool = True) -> Tracker:
    t = Tracker(
        {0: make_map(*holes)}, 0, has_slots=has_slots, traced=traced, rules=Rules.parse("7.2")
    )
    records, changes = t.take()
    assert [type(r) for r in records] == [MapRecord]
    assert changes == []
    return t


def commit(t: Tracker, ops: list[SlotOp], t_ns: int = 1) -> None:
    for root in (0x10, 0x20):
        t.commits.view_rebuilt(t_ns, root)
    for op in ops:
        t.commits.slot_operation(op)


def taken(t: Tracker) -> tuple[list[TransitionRecord], list[SlotOp], list[Record]]:
    records, _ = t.take()
    return (
        [r for r in records if isinstance(r, TransitionRecord)],
        [r for r in records if isinstance(r, SlotOp)],
        [r for r in records if not isinstance(r, TransitionRecord | SlotOp)],
    )


def test_one_commit_between_two_snapshots_is_known_in_full() -> None:
    t, kvm = tracker(), Kvm()
    commit(t, kvm.apply(make_map(0xA0000)))
    t.snapshot({0: make_map(0xA0000)}, 100)
    (transition,), ops, rest = taken(t)
    assert transition.detail == "full"
    (hole,) = transition.holes_punched
    assert (hole.block, hole.start, hole.size) == ("ram", 0xA0000, 0x10000)
    assert (hole.covered_by, hole.owner) == ("dev-a0000", "da0000")
    assert transition.cause == Cause(CauseType.REGION, owner="da0000", regions=["dev-a0000"])
    assert [(o.op, o.slot, o.gpa, o.size) for o in ops] == [
        ("delete", 0, 0, 64 * MIB),
        ("add", 0, 0, 0xA0000),
        ("add", 1, 0xB0000, 64 * MIB - 0xB0000),
    ]
    assert {o.transition for o in ops} == {1}
    assert not any(o.predicted for o in ops)
    assert rest == [Reconciled(t_ns=100, slots=2, equal=True, differences=[])]


def test_that_traced_slots_are_as_predicted_is_said_once() -> None:
    """So that "equal" differs from "never compared"."""
    t, kvm = tracker(), Kvm()
    for number, holes in enumerate(((0xA0000,), (), (0xC0000,))):
        commit(t, kvm.apply(make_map(*holes)))
        t.snapshot({0: make_map(*holes)}, 100 * (number + 1))
    _, _, rest = taken(t)
    assert [(r.t_ns, r.equal) for r in rest if isinstance(r, Reconciled)] == [(100, True)]


def test_several_commits_between_two_snapshots_keep_their_own_operations() -> None:
    t, kvm = tracker(), Kvm()
    for holes in ((0xA0000,), (), (0xC0000,)):
        commit(t, kvm.apply(make_map(*holes)))
    t.snapshot({0: make_map(0xC0000)}, 100)
    transitions, ops, _ = taken(t)
    assert [x.detail for x in transitions] == ["slots", "slots", "net"]
    assert [[h.start for h in x.holes_punched] for x in transitions] == [[0xA0000], [], [0xC0000]]
    assert [[h.start for h in x.holes_filled] for x in transitions] == [[], [0xA0000], []]
    assert transitions[0].holes_punched[0].covered_by is None  # no snapshot saw it
    assert transitions[2].holes_punched[0].covered_by == "dev-c0000"
    assert [o.transition for o in ops] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_lines_behind_the_mark_wait_for_the_next_snapshot() -> None:
    t, kvm = tracker(), Kvm()
    commit(t, kvm.apply(make_map(0xA0000)))
    t.mark()
    commit(t, kvm.apply(make_map()))
    t.snapshot({0: make_map(0xA0000)}, 100)
    transitions, _, rest = taken(t)
    assert [x.detail for x in transitions] == ["full"]
    # compared with the slots at the mark, not with those of now
    assert rest == [Reconciled(t_ns=100, slots=2, equal=True, differences=[])]
    assert t.pending == 1
    t.snapshot({0: make_map()}, 200)
    (transition,), _, rest = taken(t)
    assert transition.detail == "full"
    assert [h.start for h in transition.holes_filled] == [0xA0000]
    assert rest == []


def test_a_root_that_comes_again_begins_the_next_commit() -> None:
    t = tracker(has_slots=False)
    for _ in range(3):
        commit(t, [])
    assert t.pending == 3
    t.snapshot({0: make_map(0xA0000)}, 100)
    transitions, ops, _ = taken(t)
    assert [x.detail for x in transitions] == ["none", "none", "net"]
    assert transitions[-1].merged == 3
    assert ops
    assert all(o.predicted for o in ops)


def test_commits_in_other_address_spaces_are_no_transitions() -> None:
    t = tracker()
    commit(t, [])
    t.snapshot({0: make_map()}, 100)
    assert taken(t) == ([], [], [])
    assert t.elsewhere == 1


def test_dirty_logging_is_reported_without_a_transition() -> None:
    t = tracker()
    t.commits.view_rebuilt(1, 0x10)
    t.commits.slot_operation(slot_op(2, 0, 0, 64 * MIB, 1))
    t.snapshot({0: make_map()}, 100)
    transitions, ops, _ = taken(t)
    assert transitions == []
    assert [(o.op, o.flags, o.transition) for o in ops] == [("flags", 1, None)]


def test_slots_that_differ_from_the_rules_are_reported_once() -> None:
    t, kvm = tracker(), Kvm()
    ops = kvm.apply(make_map(0xA0000))
    commit(t, ops[:-1])  # KVM was never given the upper part
    t.snapshot({0: make_map(0xA0000)}, 100)
    _, _, rest = taken(t)
    (difference,) = rest
    assert isinstance(difference, Reconciled)
    assert not difference.equal
    assert any("0xb0000" in d for d in difference.differences)
    commit(t, [])
    t.snapshot({0: make_map(0xA0000)}, 200)
    _, _, again = taken(t)
    assert again == [] or isinstance(again[0], Reconciled)


def test_another_order_than_planned_is_reported() -> None:
    t, kvm = tracker(0xA0000, 0xC0000), Kvm(0xA0000, 0xC0000)
    ops = kvm.apply(make_map())
    commit(t, [ops[1], ops[0], *ops[2:]])
    t.snapshot({0: make_map()}, 100)
    _, _, (difference,) = taken(t)
    assert isinstance(difference, Reconciled)
    assert "order" in difference.differences[0]


def test_a_guest_that_goes_leaves_what_the_lines_tell() -> None:
    t, kvm = tracker(), Kvm()
    commit(t, kvm.apply(make_map(0xA0000)))
    t.flush()
    (transition,), ops, _ = taken(t)
    assert transition.detail == "slots"
    assert [h.start for h in transition.holes_punched] == [0xA0000]
    assert len(ops) == 3


def test_causes_go_to_the_commit_they_stand_at() -> None:
    t, kvm = tracker(), Kvm()
    bar = Cause(CauseType.PCI_BAR, device="d", detail="BAR 0 mapped")
    plug = Cause(CauseType.MEMORY_DEVICE, device="m0", detail="plugged")
    t.commits.cause(bar)
    commit(t, kvm.apply(make_map(0xA0000)))
    commit(t, kvm.apply(make_map()))
    t.commits.cause(plug, after=True)
    t.snapshot({0: make_map()}, 100)
    transitions, _, _ = taken(t)
    assert [x.cause for x in transitions] == [bar, plug]


def test_bars_that_come_and_go_between_two_snapshots_are_reported_one_by_one() -> None:
    """No slot changes for them, and afterwards the map is as it was."""
    t = tracker()
    bars = [
        Cause(CauseType.PCI_BAR, device="d", detail=detail) for detail in ("mapped", "unmapped") * 2
    ]
    for bar in bars:
        t.commits.cause(bar, moves_bar=True)
        commit(t, [])
    t.snapshot({0: make_map()}, 100)
    transitions, ops, rest = taken(t)
    assert [x.cause for x in transitions] == bars
    assert {x.detail for x in transitions} == {"none"}
    assert (ops, rest) == ([], [])


def test_a_bar_that_nothing_shows_is_no_transition() -> None:
    t = tracker()
    t.commits.cause(Cause(CauseType.PCI_BAR, device="d", detail="mapped"), moves_bar=True)
    commit(t, [])
    t.snapshot({0: make_map()}, 100)
    assert taken(t) == ([], [], [])


def test_without_a_trace_the_operations_are_predicted() -> None:
    t = tracker(traced=False)
    t.snapshot({0: make_map(0xA0000)}, 100)
    (transition,), ops, _ = taken(t)
    assert transition.detail == "full"
    assert [(o.op, o.predicted) for o in ops] == [("delete", True), ("add", True), ("add", True)]
    t.snapshot({0: make_map(0xA0000)}, 200)
    assert taken(t) == ([], [], [])


def test_an_operation_that_kvm_refused_changes_nothing() -> None:
    t = tracker()
    t.commits.view_rebuilt(1, 0x10)
    t.commits.slot_operation(slot_op(2, 0, 0, 0, 0, ret=-22))
    t.snapshot({0: make_map()}, 100)
    _, ops, rest = taken(t)
    assert [(o.op, o.ret) for o in ops] == [("delete", -22)]
    assert not [r for r in rest if isinstance(r, Reconciled) and "traced none" in str(r)]


def bar(detail: str) -> Cause:
    return Cause(CauseType.PCI_BAR, device="d", detail=detail)


def causes_of(transition: TransitionRecord) -> list[str | None]:
    cause = transition.cause
    return [c.detail for c in cause.causes or (cause,)]


def test_when_too_many_commits_wait_the_lines_are_told_and_nothing_is_lost() -> None:
    """Those that changed no slot are told with the next one, their causes too."""
    t, kvm = tracker(), Kvm()
    commit(t, kvm.apply(make_map(0xA0000)))
    for detail in ("one", "two"):
        t.commits.cause(bar(detail))
        commit(t, [])
    commit(t, kvm.apply(make_map()))
    t.relieve(4)
    assert t.pending == 4
    t.relieve(3)
    assert t.pending == 1
    (early,), ops, _ = taken(t)
    assert (early.detail, len(ops), early.cause.type) == ("slots", 3, "unknown")
    t.snapshot({0: make_map()}, 100)
    (late,), _, rest = taken(t)
    assert (late.detail, late.merged, causes_of(late)) == ("net", 3, ["one", "two"])
    assert [r for r in rest if isinstance(r, Reconciled) and not r.equal] == []
    commit(t, kvm.apply(make_map(0xC0000)))
    t.snapshot({0: make_map(0xC0000)}, 200)
    assert [x.detail for x in taken(t)[0]] == ["full"]


def test_silent_commits_before_a_transition_are_counted_with_it() -> None:
    t, kvm = tracker(), Kvm()
    t.commits.cause(bar("silent"))
    commit(t, [])
    commit(t, [])
    commit(t, kvm.apply(make_map(0xA0000)))
    t.snapshot({0: make_map(0xA0000)}, 100)
    (transition,), _, _ = taken(t)
    assert (transition.merged, transition.cause) == (3, bar("silent"))


def test_slots_are_those_that_were_traced_or_else_predicted() -> None:
    for traced in (True, False):
        t, kvm = tracker(traced=traced), Kvm()
        assert [(s.gpa, s.size) for s in t.slots] == [(0, 64 * MIB)]
        if traced:
            commit(t, kvm.apply(make_map(0xA0000)))
            assert [s.gpa for s in t.slots] == [0, 0xB0000]
        t.snapshot({0: make_map(0xA0000)}, 100)
        assert [s.gpa for s in t.slots] == [0, 0xB0000]


def test_each_transition_comes_with_its_change_of_the_map() -> None:
    t, kvm = tracker(), Kvm()
    commit(t, kvm.apply(make_map(0xA0000)))
    t.snapshot({0: make_map(0xA0000)}, 100)
    records, (change,) = t.take()
    assert change.view == make_map(0xA0000).view
    assert change.transition is not None
    assert [h.start for h in change.transition.holes_punched] == [0xA0000]
    assert list(change.slot_ops) == [r for r in records if isinstance(r, SlotOp)]


holes = st.sets(st.sampled_from(HOLES), max_size=3)


@given(st.lists(st.tuples(holes, st.booleans()), max_size=12))
def test_every_changing_commit_is_one_transition_in_order(
    steps: list[tuple[set[int], bool]],
) -> None:
    """Whenever snapshots come, each commit that changed slots is reported once, with its own."""
    t, kvm = tracker(), Kvm()
    expected: list[list[tuple[int, int, int]]] = []
    current: Mapping[int, MemoryMap] = {0: make_map()}
    for wanted, snapshot in steps:
        current = {0: make_map(*wanted)}
        ops = kvm.apply(current[0])
        commit(t, ops)
        if ops:
            expected.append([(o.slot, o.gpa, o.size) for o in ops])
        if snapshot:
            t.snapshot(current, 100)
    t.snapshot(current, 1000)
    transitions, ops_seen, rest = taken(t)
    assert [x.seq for x in transitions] == list(range(1, len(expected) + 1))
    got: dict[int | None, list[tuple[int, int, int]]] = {}
    for op in ops_seen:
        size = 0 if op.op == "delete" else op.size
        got.setdefault(op.transition, []).append((op.slot, op.gpa, size))
    assert list(got.values()) == expected
    assert [r for r in rest if isinstance(r, Reconciled) and not r.equal] == []
    assert t.map.view == current[0].view
