"""What probes measured, in words: one line a stall.

Lines begin with the stamp they are given and align with those of `terminal.Narrator`.  Nothing is
printed here, and text that a guest chose is passed on as it is: who prints makes it harmless.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from ..probes import StallKind
from ..records import (
    CommandRecord,
    GuestFailure,
    GuestReset,
    MeasurementRecord,
    PossibleViolation,
    ProbesRecord,
    Record,
    StallCause,
    StallCauseType,
    StallRecord,
    SummaryRecord,
    Violation,
)
from ..text import count_text
from .lengths import bracket_text, duration_text, kind_text
from .summary import summary_lines

__all__ = ["measured_lines", "stall_cause_text"]

_INDENT = " " * 12
_CAUSES = {
    StallCauseType.TRANSITION: "transition #",
    StallCauseType.COMMAND: "command ",
    StallCauseType.AGENT: "agent: ",
    StallCauseType.STOP: "guest stopped: ",
    StallCauseType.SCHEDULER: "no host CPU for it",
}


def stall_cause_text(cause: StallCause | None) -> str:
    """What made a stall: `transition #12`, `command object-add`, `unknown`."""
    if cause is None or cause.type is StallCauseType.UNKNOWN:
        return "unknown"
    if cause.type is StallCauseType.SLOT_OP:
        as_id, colon, slot = str(cause.ref).partition(":")
        if not colon:
            return str(cause.ref)
        return f"slot {slot}" if as_id == "0" else f"as {as_id} slot {slot}"
    lead = _CAUSES.get(cause.type, f"{cause.type} ")
    return lead.rstrip(": ") if cause.ref is None else f"{lead}{cause.ref}"


def measured_lines(
    record: Record, stamp: str, *, width: int = 80, unicode: bool = True
) -> Iterator[str]:
    """The lines for a record of something measured, `stamp` in front; none for other records.

    `width` and `unicode` are for a summary, which has no stamp (see `summary_lines`).
    """
    match record:
        case StallRecord():
            yield f"{stamp}  {_stall(record)}"
        case CommandRecord():
            length = bracket_text(
                record.busy_until_ns - record.start_ns, record.end_ns - record.start_ns
            )
            yield f"{stamp}  command: {record.name}, {length} [{record.probe}]"
        case MeasurementRecord():
            over = duration_text(record.end_ns - record.start_ns)
            yield f"{stamp}  counted by {record.probe} in {over}:"
            yield from _values(record.values)
        case ProbesRecord():
            active = ", ".join(p.name for p in record.probes if p.active)
            yield f"{stamp}  probes: {active or 'none active'}"
            for probe in record.probes:
                if not probe.active:
                    remedy = f"; to get it: {probe.remedy}" if probe.remedy else ""
                    why = probe.reason or "not requested"
                    yield f"{_INDENT}without {probe.name}: {why}{remedy}"
        case GuestReset():
            yield from _reset(record, stamp)
        case GuestFailure(status="reset"):  # of former versions
            yield f"{stamp}  guest reset: {record.what}"
            yield from _failure(record)
        case GuestFailure():
            yield f"{stamp}  GUEST FAILED ({record.status}): {record.what}"
            yield from _failure(record)
        case Violation() | PossibleViolation():
            sure = "VIOLATION" if isinstance(record, Violation) else "possible violation"
            yield f"{stamp}  {sure}: {record.what}{_violation(record)}"
        case SummaryRecord():
            yield ""
            yield from summary_lines(record, width=width, unicode=unicode)


def _stall(s: StallRecord) -> str:
    parts = [stall_cause_text(s.cause)]
    explained = None if s.cause is None else s.cause.explained_ns
    # what is nearly all of it says nothing
    if explained is not None and parts[0] != "unknown" and explained * 10 < s.at_least_ns * 9:
        parts[0] += f" ({duration_text(explained)} of it)"
    others = [n for n in s.during if s.cause is None or n != s.cause.ref]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        parts.append(f"during {', '.join(f'#{n}' for n in others[:3])}{more}")
    if s.thread is not None:
        parts.append(s.thread)
    if s.handoffs:
        parts.append(f"BQL handed over {count_text(s.handoffs, 'time')}")
    # of these the site is a range or an operation, of others a place in QEMU's sources
    link = ", " if s.kind in (StallKind.MISSING, StallKind.SLOT_UPDATE) else " at "
    where = f"{link}{s.site}" if s.site else ""
    length = bracket_text(s.at_least_ns, s.at_most_ns)
    return (
        f"stall: {kind_text(s.kind):<12} {length:>14}  {', '.join(parts)}{where} "
        f"[{', '.join(s.witnesses or [s.probe])}]"
    )


def _violation(v: Violation | PossibleViolation) -> str:
    """What was found, and what is allowed."""
    if v.found_ns is None or v.limit_ns is None:
        return ""
    # in recordings of former versions there is the lower bound alone
    found = (
        duration_text(v.found_ns)
        if v.found_max_ns is None
        else bracket_text(v.found_ns, v.found_max_ns)
    )
    return f": {found}, allowed {duration_text(v.limit_ns).replace('.00 ', ' ')}"


def _values(values: dict[str, int | float | str]) -> Iterator[str]:
    words = []
    for name, value in values.items():
        if isinstance(value, str):
            words.append(f"{name} {value}")
        elif value and name.endswith("_ns"):
            words.append(f"{name.removesuffix('_ns')} {duration_text(int(value))}")
        elif value:
            words.append(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.3g}")
    if not words:
        yield f"{_INDENT}nothing"
        return
    # what belongs together stays on one line
    text = ", ".join(word.replace(" ", "\0") for word in words)
    wrapped = textwrap.wrap(
        text, 80, initial_indent=_INDENT, subsequent_indent=_INDENT,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    yield from (line.replace("\0", " ") for line in wrapped)


def _reset(r: GuestReset, stamp: str) -> Iterator[str]:
    instead = ", and QEMU goes down instead" if r.shutdown else ""
    yield f"{stamp}  guest reset ({r.reason or 'no reason given'}){instead}: {r.what}"
    if r.possible is not None:
        yield f"{_INDENT}possible, not proven: {r.possible}"


def _failure(f: GuestFailure) -> Iterator[str]:
    cpu = f"CPU {f.cpu}" if f.cpu is not None else "a vCPU"
    at = f" at instruction {f.ip:#x}" if f.ip is not None else ""
    if f.gpa is not None:
        yield f"{_INDENT}{cpu}{at} could not reach guest-physical {f.gpa:#x}"
    elif f.cpu is not None:
        yield f"{_INDENT}{cpu} stopped{at}"
    if f.transition is not None:
        yield (
            f"{_INDENT}that RAM had no slot during transition #{f.transition}"
            if f.proven
            else f"{_INDENT}transition #{f.transition} came before; not proven to be the reason"
        )
