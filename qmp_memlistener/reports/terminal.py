"""Records in words, one or a few lines each: what `watch`, `record` and `demo` print."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..records import (
    Cause,
    CauseType,
    CommandRecord,
    Detail,
    GuestState,
    Header,
    Lost,
    MapRecord,
    Mode,
    Note,
    QmpEvent,
    Reconciled,
    Record,
    Section,
    SlotOp,
    StallCauseType,
    StallRecord,
    SteeringRecord,
    TransitionRecord,
)
from ..text import count_text, quoted
from ..topology import Hole
from .stalls import measured_lines

__all__ = ["Narrator", "cause_text", "flags_text", "size_text"]

MINOR_NS = 5_000_000
"""Shorter stalls that nobody made in QEMU, and shorter commands, have no line of their own."""
_MINOR = (StallCauseType.UNKNOWN, StallCauseType.SCHEDULER)
_INDENT = " " * 12


def size_text(size: int) -> str:
    """A size as people write it: `4 KiB`, `511.94 MiB`."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << shift:
            text = f"{size / (1 << shift):.2f}"
            if size % (1 << shift) == 0:
                return f"{size >> shift} {unit}"
            if not text.endswith(".00"):  # else it would look exact: say it in a smaller unit
                return f"{text} {unit}"
    return f"{size} B"


def flags_text(flags: int) -> str:
    """KVM_MEM_* bits by name."""
    names = [n for bit, n in ((1, "LOG_DIRTY"), (2, "READONLY"), (4, "GUEST_MEMFD")) if flags & bit]
    rest = flags & ~7
    return "|".join([*names, f"{rest:#x}"] if rest else names)


def cause_text(cause: Cause) -> str:
    """Why, as far as it was seen."""
    match cause.type:
        case CauseType.PCI_BAR:
            return f"PCI {cause.device}: {cause.detail}"
        case CauseType.MEMORY_DEVICE:
            return f"memory device {cause.device or '(no id)'} {cause.detail}"
        case CauseType.SEVERAL:
            causes = cause.causes or []
            more = f"; and {len(causes) - 3} more" if len(causes) > 3 else ""
            return "; ".join(cause_text(c) for c in causes[:3]) + more
        case CauseType.REGION:
            who = f" of {cause.owner}" if cause.owner else ""
            names = list(cause.regions or ())
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            return f"{', '.join(names[:4])}{more}{who}"
        case _:
            return "cause not seen"


class Narrator:
    """Turns records into lines, with times relative to the first one it sees.

    `width` and `unicode` are what the output bears, for the summary's table and charts.
    """

    def __init__(self, *, width: int = 80, unicode: bool = True) -> None:
        self._width = width
        self._unicode = unicode
        self._zero_ns: int | None = None
        self._steered = False

    def lines(self, record: Record) -> Iterator[str]:
        """The lines for one record; none for those that say nothing to a person."""
        match record:
            case Header():
                yield from _header(record)
            case MapRecord():
                self._stamp(record.t_ns)
                holes = sum(len(b.holes) for b in record.ram_blocks)
                yield (
                    f"{self._stamp(record.t_ns)}  map: {count_text(len(record.ranges), 'range')}, "
                    f"{count_text(len(record.ram_blocks), 'RAM block')}, "
                    f"{count_text(holes, 'hole')} in them"
                )
            case TransitionRecord():
                yield from self._transition(record)
            case SlotOp():
                yield _slot_op(record)
            case GuestState():
                by = f" ({record.event})" if record.event else ""
                yield f"{self._stamp(record.t_ns)}  guest: {record.status}{by}"
            case QmpEvent():
                details = ", ".join(f"{k}={v}" for k, v in record.data.items())
                yield f"{self._stamp(record.t_ns)}  event: {record.event} {details}".rstrip()
            case Reconciled(equal=True):
                yield (
                    f"{self._stamp(record.t_ns)}  slots: {record.slots}, as QEMU's rules predict"
                )
            case Reconciled():
                yield f"{self._stamp(record.t_ns)}  slots differ from what QEMU's rules predict:"
                yield from (f"{_INDENT}{d}" for d in record.differences)
            case SteeringRecord():
                yield from self._steering(record)
            case Lost():
                count = f" ({record.count})" if record.count is not None else ""
                yield f"{self._stamp(record.t_ns)}  LOST: {record.what}{count}"
            case Note():
                yield f"{self._stamp(record.t_ns)}  note: {record.text}"
            case StallRecord() if _is_minor(record):
                pass  # the summary counts it
            case CommandRecord() if record.end_ns - record.start_ns < MINOR_NS:
                pass
            case _:
                stamp = self._stamp(_time_of(record))
                yield from measured_lines(record, stamp, width=self._width, unicode=self._unicode)

    def _stamp(self, t_ns: int) -> str:
        if self._zero_ns is None:
            self._zero_ns = t_ns
        return f"{(t_ns - self._zero_ns) / 1e9:10.6f}"

    def _steering(self, s: SteeringRecord) -> Iterator[str]:
        """Nothing at the beginning of a guest that is not steered."""
        if s.strategy is not Mode.OFF or self._steered:
            strict = ", strict" if s.strict else ""
            why = f" ({s.reason})" if s.reason else ""
            yield f"{self._stamp(s.t_ns)}  strategy: {s.strategy}{strict}{why}"
        self._steered |= s.strategy is not Mode.OFF

    def _transition(self, t: TransitionRecord) -> Iterator[str]:
        merged = f", {t.merged} changes in one" if t.merged > 1 else ""
        yield f"{self._stamp(t.t_ns)}  #{t.seq} {cause_text(t.cause)}{merged}"
        for h in t.holes_punched:
            yield f"{_INDENT}hole punched  {_hole(h, known=t.detail is not Detail.SLOTS)}"
        for h in t.holes_filled:
            yield f"{_INDENT}hole filled   {_hole(h, known=t.detail is not Detail.SLOTS)}"
        for f in t.flips:
            yield (f"{_INDENT}{f.before} to {f.after:<7} {f.name} {f.start:#x}+{size_text(f.size)}")
        for c in t.ram_appeared:
            yield f"{_INDENT}RAM appeared  {c.name} {c.start:#x}+{size_text(c.size)}"
        for c in t.ram_vanished:
            yield f"{_INDENT}RAM vanished  {c.name} {c.start:#x}+{size_text(c.size)}"
        for m in t.mmio_moved:
            yield f"{_INDENT}MMIO moved    {m.name} {m.before:#x} to {m.after:#x}"
        told = t.holes_punched or t.holes_filled or t.flips or t.ram_appeared or t.ram_vanished
        if not told and not t.mmio_moved:
            yield from _sections("removed", t.removed)
            yield from _sections("added", t.added)
            if not t.removed and not t.added:
                yield f"{_INDENT}QEMU rebuilt its map; what changed was not seen"


def _is_minor(stall: StallRecord) -> bool:
    """A short stall that nothing explains, or the host's load."""
    minor = stall.cause is None or stall.cause.type in _MINOR
    return minor and stall.at_most_ns < MINOR_NS


def _time_of(record: Record) -> int:
    """When it was, or when it began."""
    t_ns = getattr(record, "t_ns", None) or getattr(record, "start_ns", None)
    return t_ns if isinstance(t_ns, int) else 0


def _header(h: Header) -> Iterator[str]:
    name = f" {quoted(h.guest_name)}" if h.guest_name else ""
    yield (
        f"QEMU {h.qemu_version or '(unknown version)'}{name}, machine {h.machine or 'unknown'}, "
        f"accelerator {h.accel or 'unknown'}, pid {h.pid if h.pid is not None else 'unknown'}"
    )
    yield f"source: {h.source}"


def _hole(h: Hole, *, known: bool) -> str:
    behind = h.covered_by or ("nothing" if known else "unknown so far")
    owner = f" ({h.owner})" if h.owner else ""
    return f"{h.block} {h.start:#x}+{size_text(h.size)} behind {behind}{owner}"


def _sections(what: str, sections: Sequence[Section]) -> Iterator[str]:
    for s in sections[:8]:
        yield f"{_INDENT}{what:<9} {s.start:#x}+{size_text(s.size)} {s.kind} {s.name}"
    if len(sections) > 8:
        yield f"{_INDENT}{what:<9} and {len(sections) - 8} more"


def _slot_op(op: SlotOp) -> str:
    flags = flags_text(op.flags)
    space = f"as {op.as_id} " if op.as_id else ""
    tail = f" {flags}" if flags else ""
    failed = f" FAILED: {op.ret}" if op.ret else ""
    mark = " (predicted)" if op.predicted else ""
    return (
        f"{_INDENT}  {op.op:<6} {space}slot {op.slot}: "
        f"{op.gpa:#x}+{size_text(op.size)}{tail}{failed}{mark}"
    )
