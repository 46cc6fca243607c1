"""A guest that changes its map without a pause: the agent's work per transition, by their number.

    python -m tools.bench.bench_burst

Made-up lines of QEMU's log (a PAM toggle: two FlatViews, four slot operations), the uprobes'
windows of the same commits and the guest's gaps go through what the agent does with them:
decoding, the tracker, the timeline, and the JSON of a recording.  `in step` releases stalls every
50 ms of the guest's time, `all at once` when everything has come in, as after a time in which the
agent got no CPU.  A thousand transitions come in a second of the guest's time.
"""

from __future__ import annotations

from functools import partial

import msgspec

from qmp_memlistener.memslots import OpKind, Rules
from qmp_memlistener.probes import Observation, StallKind
from qmp_memlistener.qmp import TraceDecoder
from qmp_memlistener.qmp.trace_records import FlatViewEvent
from qmp_memlistener.records import Record, SlotOp, StallRecord, TransitionRecord
from qmp_memlistener.timeline import Timeline
from qmp_memlistener.topology import FlatRange, FlatView, MemoryMap, ram_blocks
from qmp_memlistener.topology import Kind as RangeKind
from qmp_memlistener.tracking import Tracker
from tools.bench.growth import Figure, Sample, interleaved, print_growth, sizes

__all__ = ["Agent", "fold"]

PERIOD_NS = 1_000_000
_BOUND_NS = 200_000
_STEP = 50  # transitions between two releases
_HVA = 0x7F00_0000_0000
_SIZE = 64 << 20
_START_NS = 1_000_000_000_000
# slot, gpa and size of what a toggle takes away and gives back
_SPLIT = ((3, 0xE0000, 0x10000), (4, 0xF0000, 0x10000), (5, 0x100000, _SIZE - 0x100000))
_WHOLE = (3, 0xE0000, _SIZE - 0xE0000)


class Agent:
    """Tracker and timeline, fed and emptied as the agent does it."""

    def __init__(self) -> None:
        maps = {0: _map()}
        self.tracker = Tracker(maps, 0, has_slots=True, traced=True, rules=Rules.parse("7.2"))
        self.timeline = Timeline(stamp_bound_ns=_BOUND_NS)
        for probe in ("trace", "uprobes", "pulse"):
            self.timeline.expect(probe, 0)
        self.transitions = 0
        self.stalls = 0
        self.written = 0
        self._decoder = TraceDecoder()
        self._encode = msgspec.json.Encoder().encode

    def lines(self, first: int, count: int) -> None:
        """The lines of `count` transitions, the snapshot that covers them, and their windows."""
        commits = self.tracker.commits
        at = _START_NS + first * PERIOD_NS
        for line in self._decoder.feed(_log(first, count), at + count * PERIOD_NS):
            match line:
                case FlatViewEvent():
                    commits.view_rebuilt(line.t_ns, line.root)
                case SlotOp():
                    commits.slot_operation(line)
        self.tracker.mark()
        self.tracker.snapshot({0: _map()}, at + count * PERIOD_NS)
        records, _ = self.tracker.take()
        self._publish(records)

    def windows(self, first: int, count: int) -> None:
        """What uprobes and the pulse saw of them."""
        for i in range(first, first + count):
            self.timeline.observe(_observations(i))

    def release(self, upto: int | None) -> None:
        """Hand out what is decided when all has come in up to transition `upto`; None: the end."""
        if upto is None:
            self._publish(self.timeline.finish())
            while self.timeline.more:
                self._publish(self.timeline.finish())
            return
        now = _START_NS + upto * PERIOD_NS
        for probe in ("trace", "uprobes", "pulse"):
            self.timeline.advance(probe, now)
        self._publish(self.timeline.release(now))
        while self.timeline.more:
            self._publish(self.timeline.release(now))

    def _publish(self, records: list[Record]) -> None:
        for record in records:
            self.written += len(self._encode(record))
            self.timeline.record(record)
            self.transitions += isinstance(record, TransitionRecord)
            self.stalls += isinstance(record, StallRecord)


def fold(count: int, step: int | None) -> Agent:
    """`count` transitions, released every `step` of them, or all at once."""
    agent = Agent()
    for first in range(0, count, _STEP):
        some = min(_STEP, count - first)
        agent.lines(first, some)
        agent.windows(first, some)
        if step is not None and first % step == 0:
            agent.release(first + some)
    agent.release(None)
    assert agent.transitions == count
    return agent


def run(quick: bool) -> list[Figure]:
    """Print a table a case; the cost per transition at the ends is the figure."""
    runs = 1 if quick else 2
    figures = []
    for name, step in (("in step", _STEP), ("all at once", None)):
        cases = {str(n): partial(fold, n, step) for n in sizes(quick)}
        found = {int(n): sample for n, sample in interleaved(cases, runs).items()}
        print_growth(f"a burst, {name}", found, each="transition", wanted="flat")
        small, large = min(found), max(found)
        seen = f"{_each(found, small):.0f} to {_each(found, large):.0f} µs"
        wanted = f"flat from {small:,} to {large:,}"
        figures.append(Figure(f"a transition in a burst, {name}", wanted, seen))
    return figures


def _each(found: dict[int, Sample], n: int) -> float:
    return found[n].median * 1e6 / n


def _map() -> MemoryMap:
    """64 MiB of RAM as a pc has it, with the BIOS in front of 0xf0000."""
    ram, io, rom = RangeKind.RAM, RangeKind.IO, RangeKind.ROM
    ranges = [
        FlatRange(0, 0xA0000, ram, "pc.ram", 0, None, ram),
        FlatRange(0xA0000, 0x20000, io, "vga-lowmem"),
        *(FlatRange(0xC0000 + i, 0x1000, io, f"dev-{i:x}") for i in range(0, 0x10000, 0x1000)),
        FlatRange(0xE0000, 0x10000, ram, "pc.ram", 0xE0000, None, ram),
        FlatRange(0xF0000, 0x10000, rom, "pc.bios", 0, None, rom),
        FlatRange(0x100000, _SIZE - 0x100000, ram, "pc.ram", 0x100000, None, ram),
        FlatRange(0xFEC00000, 0x1000, io, "ioapic"),
        FlatRange(0xFED00000, 0x400, io, "hpet"),
        FlatRange(0xFEE00000, 0x100000, io, "apic-msi"),
        FlatRange(0xFFFF0000, 0x10000, rom, "pc.bios", 0, None, rom),
    ]
    view = FlatView(ranges)
    return MemoryMap(view, ram_blocks(view), rendered=True)


def _ops(i: int) -> list[tuple[int, int, int, int]]:
    """Slot, gpa, flags and size of the operations of toggle `i`; size 0 deletes."""
    split = [(slot, gpa, 2 if gpa == 0xF0000 else 0, size) for slot, gpa, size in _SPLIT]
    whole = (_WHOLE[0], _WHOLE[1], 0, _WHOLE[2])
    if i % 2 == 0:
        return [*((slot, gpa, 0, 0) for slot, gpa, _, _ in split), whole]
    return [(whole[0], whole[1], 0, 0), *split]


def _hva(gpa: int) -> int:
    return _HVA + gpa if gpa != 0xF0000 else _HVA + (1 << 32)


def _log(first: int, count: int) -> bytes:
    out = []
    for i in range(first, first + count):
        t_us = (_START_NS + i * PERIOD_NS) // 1000
        stamp = f"{t_us // 1_000_000}.{t_us % 1_000_000:06d}"
        out += [
            f"9@{stamp}:flatview_new 0x{i:x}{root:x} (root 0x{root:x})\n" for root in (0x10, 0x20)
        ]
        for slot, gpa, flags, size in _ops(i):
            out.append(
                f"9@{stamp}:kvm_set_user_memory Slot#{slot} flags=0x{flags:x} gpa=0x{gpa:x} "
                f"size=0x{size:x} ua=0x{_hva(gpa):x} ret=0\n"
            )
    return "".join(out).encode()


def _observations(i: int) -> list[Observation]:
    begin = _START_NS + i * PERIOD_NS - 350_000
    found = [_window(StallKind.COMMIT, begin, 400_000)]
    for n, (slot, gpa, flags, size) in enumerate(_ops(i)):
        update = SlotOp(
            t_ns=begin + 80_000 + n * 80_000,
            as_id=0,
            slot=slot,
            op=OpKind.ADD if size else OpKind.DELETE,
            gpa=gpa,
            size=size,
            flags=flags,
            hva=_hva(gpa),
        )
        found.append(
            _window(StallKind.SLOT_UPDATE, begin + 20_000 + n * 80_000, 60_000, update=update)
        )
    found.append(_window(StallKind.VCPU_GAP, begin - 30_000, 450_000, probe="pulse"))
    return found


def _window(
    kind: StallKind,
    start_ns: int,
    length: int,
    *,
    probe: str = "uprobes",
    update: SlotOp | None = None,
) -> Observation:
    return Observation(
        kind,
        start_ns,
        start_ns + length,
        length,
        length,
        probe,
        thread="CPU 0",
        tid=9 if probe == "uprobes" else None,
        update=update,
    )


if __name__ == "__main__":
    run(quick=False)
