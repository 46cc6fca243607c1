"""Records as lanes over time, of bounded size: what a page draws.

A lane has bins.  Of what began in one bin the longest is kept, with the count of all; bins are a
nanosecond wide at first, and twice as wide whenever a lane has too many of them.  So a short
recording is drawn whole, and one of a million records in as much room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..memslots import OpKind
from ..records import (
    Cause,
    CommandRecord,
    Detail,
    GuestFailure,
    GuestReset,
    GuestState,
    MapRecord,
    Record,
    SlotOp,
    StallRecord,
    SteeringRecord,
    TransitionRecord,
)
from ..reports.lengths import KIND_ORDER, kind_text
from ..reports.stalls import stall_cause_text
from ..updates.compare import Round
from .markup import shown

__all__ = ["Drawn", "Lane", "Lanes"]

MOST_BINS = 2000
MOST_LANES = 24
"""Of a group; the others are drawn as one."""

About = Callable[[], str] | None


class Drawn(NamedTuple):
    """One thing in a lane: it lies in `[start, end]` and was at least, at most so long.

    `alike`: how many began in its bin, of which it is the longest.
    """

    start: int
    end: int
    least: int
    most: int
    alike: int
    about: About


class Lane:
    """`count` of everything that was added, `bin_ns` how wide bins are."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self._shift = 0
        self._bins: dict[int, Drawn] = {}

    @property
    def bin_ns(self) -> int:
        return 1 << self._shift

    def add(self, start: int, end: int, least: int, most: int, about: About) -> None:
        self.count += 1
        key = start >> self._shift
        new = Drawn(start, end, least, most, 1, about)
        old = self._bins.get(key)
        self._bins[key] = new if old is None else _longest(old, new)
        while len(self._bins) > MOST_BINS:
            self._shift += 1
            bins: dict[int, Drawn] = {}
            for drawn in self._bins.values():
                key = drawn.start >> self._shift
                known = bins.get(key)
                bins[key] = drawn if known is None else _longest(known, drawn)
            self._bins = bins

    def drawn(self) -> list[Drawn]:
        """In order of their beginning."""
        return sorted(self._bins.values(), key=lambda d: (d.start, d.end))


def _longest(a: Drawn, b: Drawn) -> Drawn:
    longer = b if (b.least, b.most) > (a.least, a.most) else a
    return longer._replace(alike=a.alike + b.alike)


class _Group:
    """Lanes by key, in order of keys; the first MOST_LANES of them by arrival."""

    def __init__(self, name: str, what: str) -> None:
        self.name = name
        self.what = what
        self._lanes: dict[tuple[object, ...], Lane] = {}
        self._rest: Lane | None = None

    def lane(self, key: tuple[object, ...], name: Callable[[], str]) -> Lane:
        lane = self._lanes.get(key)
        if lane is not None:
            return lane
        if len(self._lanes) < MOST_LANES:
            self._lanes[key] = lane = Lane(shown(name()))
            return lane
        if self._rest is None:
            self._rest = Lane("others")
        return self._rest

    def lanes(self) -> list[Lane]:
        ordered = [lane for _, lane in sorted(self._lanes.items(), key=lambda kv: _rank(kv[0]))]
        return [*ordered, *([self._rest] if self._rest else [])]


def _rank(key: tuple[object, ...]) -> tuple[tuple[int, int, str], ...]:
    return tuple((0, k, "") if isinstance(k, int) else (1, 0, str(k)) for k in key)


class Lanes:
    """Records of one guest, in any order of time that a recording has.

    `late_ns`: how late the time of a transition or an operation may be.  `causes` counts
    transitions by the type of their cause, `vague` those whose holes are not fully known.
    """

    def __init__(self, start_ns: int, late_ns: int = 0) -> None:
        self.start_ns = start_ns
        self.causes: dict[str, int] = {}
        self.vague = 0
        self.predicted = 0
        self._late_ns = late_ns
        self._map = _Group("Map", "RAM blocks and the holes in them")
        self._slots = _Group("Slots", "KVM's slots that an operation touched")
        self._rounds = _Group("Rounds", "rounds of the comparison")
        self._state = _Group("Guest", "its state, failures, resets and the strategy applied")
        self._changes = _Group("Transitions", "changes of the map, by what made them")
        self._ops = _Group("Slot operations", "what KVM was told")
        self._commands = _Group("Commands", "QMP and HMP commands that QEMU carried out")
        self._stalls = _Group("Stalls", "by kind and thread")
        self._open: dict[tuple[object, ...], tuple[int, Lane, str]] = {}

    def take(self, record: Record) -> None:
        """One more record; what is not drawn is ignored."""
        if isinstance(record, StallRecord):  # most are
            self._stall(record)
            return
        match record:
            case SlotOp():
                self._slot_op(record)
            case TransitionRecord():
                self._transition(record)
            case CommandRecord(start_ns=start, end_ns=end):
                lane = self._commands.lane((record.probe,), lambda: f"seen by {record.probe}")
                least = max(0, record.busy_until_ns - start)
                lane.add(start, end, least, max(least, end - start), lambda: record.name)
            case MapRecord():
                self._whole_map(record)
            case GuestState():
                self._change((self._state, "status"), record.t_ns, record.status, "guest")
            case SteeringRecord():
                strict = ", strict" if record.strict else ""
                name = f"{record.strategy}{strict}"
                self._change((self._state, "strategy"), record.t_ns, name, "strategy")
            case GuestReset() | GuestFailure():
                kind = "reset" if isinstance(record, GuestReset) else "failure"
                lane = self._state.lane((1, kind), lambda: kind)
                lane.add(record.t_ns, record.t_ns, 0, 0, lambda: record.what)

    def take_round(self, done: Round, window_ns: int) -> None:
        """A round of a comparison, with its stalls."""
        end = done.start_ns + (window_ns or done.took_ns)
        lane = self._rounds.lane((done.strategy,), lambda: done.strategy)
        length = end - done.start_ns
        lane.add(done.start_ns, end, length, length, lambda: f"round {done.order}: {done.outcome}")
        for stall in done.stalls:
            self._stall(stall)

    def transition_text(self, seq: object) -> str | None:
        """What is drawn of a transition, if it is."""
        for lane in self._changes.lanes():
            for drawn in lane.drawn():
                text = drawn.about() if drawn.about else ""
                if text.startswith(f"#{seq} "):
                    return text
        return None

    def groups(self, end_ns: int) -> Iterator[tuple[str, str, list[Lane]]]:
        """Name, what it is, lanes, of each group that has some; what goes on ends at `end_ns`."""
        for since, lane, about in self._open.values():
            _span(lane, since, max(since, end_ns), f"{about}, until the end")
        self._open.clear()
        for group in (
            self._rounds, self._map, self._slots, self._state,
            self._changes, self._ops, self._commands, self._stalls,
        ):  # fmt: skip
            if lanes := group.lanes():
                yield group.name, group.what, lanes

    def _stall(self, s: StallRecord) -> None:
        key = (KIND_ORDER.get(s.kind, 99), s.kind, s.thread or "")
        lane = self._stalls.lane(
            key, lambda: f"{kind_text(s.kind)}{f', {s.thread}' if s.thread else ''}"
        )
        lane.add(
            s.start_ns, s.end_ns, s.at_least_ns, s.at_most_ns,
            lambda: f"{kind_text(s.kind)} by {stall_cause_text(s.cause)}"
            f"{f', at {s.site}' if s.site else ''} [{', '.join(s.witnesses or [s.probe])}]",
        )  # fmt: skip

    def _slot_op(self, op: SlotOp) -> None:
        late = max(self._late_ns, op.late_ns or 0)
        self.predicted += op.predicted
        lane = self._ops.lane((str(op.op),), lambda: str(op.op))
        failed = f", error {op.ret}" if op.ret else ""
        shade = ", predicted, not seen" if op.predicted else ""
        lane.add(op.t_ns - late, op.t_ns, 0, 0, lambda: f"{op}{failed}{shade}")
        if op.ret or op.op is OpKind.FLAGS:
            return
        key: tuple[object, ...] = ("slot", op.as_id, op.slot)
        slot = self._slots.lane(
            (op.as_id, op.slot), lambda: f"slot {op.slot}{f' of as {op.as_id}' * bool(op.as_id)}"
        )
        since = self._open.pop(key, None)
        if since is not None:
            _span(slot, since[0], op.t_ns, since[2])
        elif op.op is OpKind.DELETE and not slot.count:
            _span(slot, self.start_ns, op.t_ns, f"{op.gpa:#x}+{op.size:#x}, from the beginning")
        if op.op is OpKind.ADD:
            self._open[key] = op.t_ns, slot, f"{op.gpa:#x}+{op.size:#x}"

    def _transition(self, t: TransitionRecord) -> None:
        self.causes[t.cause.type] = self.causes.get(t.cause.type, 0) + 1
        self.vague += t.detail is not Detail.FULL
        late = max(self._late_ns, t.late_ns or 0)
        lane = self._changes.lane((str(t.cause.type),), lambda: _cause_type(t.cause.type))
        lane.add(t.t_ns - late, t.t_ns, 0, 0, lambda: _transition_text(t))
        for filled in t.holes_filled:
            self._close(("hole", filled.block, filled.start, filled.size), t.t_ns)
        for ram in t.ram_vanished:
            self._close(("ram", ram.name, ram.start, ram.size), t.t_ns)
        for ram in t.ram_appeared:
            self._ram(ram.name, ram.start, ram.size, t.t_ns)
        for hole in t.holes_punched:
            self._hole(hole.block, hole.start, hole.size, hole.covered_by, t.t_ns)

    def _whole_map(self, m: MapRecord) -> None:
        there: set[tuple[object, ...]] = set()
        for block in m.ram_blocks:
            for part in block.mapped:
                there.add(self._ram(block.name, part.start, part.size, m.t_ns))
            for hole in block.holes:
                there.add(self._hole(hole.block, hole.start, hole.size, hole.covered_by, m.t_ns))
        for key in [k for k in self._open if k[0] in ("ram", "hole") and k not in there]:
            self._close(key, m.t_ns)

    def _ram(self, name: str, start: int, size: int, t_ns: int) -> tuple[object, ...]:
        key = ("ram", name, start, size)
        if key not in self._open:
            lane = self._map.lane((0, start, name, size), lambda: f"RAM {name} {start:#x}")
            self._open[key] = t_ns, lane, f"RAM {name} at {start:#x}+{size:#x}"
        return key

    def _hole(
        self, block: str, start: int, size: int, by: str | None, t_ns: int
    ) -> tuple[object, ...]:
        key = ("hole", block, start, size)
        if key not in self._open:
            lane = self._map.lane(
                (1, start, block, size), lambda: f"hole {start:#x}+{size:#x} in {block}"
            )
            self._open[key] = t_ns, lane, f"hole in {block}, {f'under {by}' if by else 'nothing'}"
        return key

    def _close(self, key: tuple[object, ...], t_ns: int) -> None:
        found = self._open.pop(key, None)
        if found is not None:
            since, lane, about = found
            _span(lane, since, t_ns, about)

    def _change(self, key: tuple[_Group, str], t_ns: int, value: str, what: str) -> None:
        group, name = key
        self._close(("state", name), t_ns)
        lane = group.lane((0, what, value), lambda: f"{what}: {value}")
        self._open["state", name] = t_ns, lane, value


def _span(lane: Lane, start: int, end: int, about: str) -> None:
    end = max(start, end)
    lane.add(start, end, end - start, end - start, lambda: about)


def _cause_type(name: str) -> str:
    return {"unknown": "cause unknown", "region": "regions came or went"}.get(
        name, name.replace("_", " ")
    )


def _transition_text(t: TransitionRecord) -> str:
    counts = (
        (len(t.holes_punched), "punched"),
        (len(t.holes_filled), "filled"),
        (len(t.ram_appeared), "RAM more"),
        (len(t.ram_vanished), "RAM less"),
        (t.slot_ops, "slot operations"),
    )
    told = "".join(f", {n} {what}" for n, what in counts if n)
    return f"#{t.seq} {_cause_text(t.cause)}{told}"


def _cause_text(cause: Cause) -> str:
    named = " ".join(word for word in (cause.device or cause.owner, cause.detail) if word)
    regions = ", ".join((cause.regions or [])[:3])
    return f"{_cause_type(cause.type)} {named or regions}".rstrip()
