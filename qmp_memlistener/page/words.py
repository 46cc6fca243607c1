"""What a recording says, in a few sentences for a person who has not seen it."""

from __future__ import annotations

from collections.abc import Iterator

from ..records import (
    CauseType,
    Header,
    ProbeState,
    StallCauseType,
    StallKind,
    StallRecord,
    StallStatistics,
    SummaryRecord,
)
from ..reports.lengths import bracket_text, duration_text, kind_text
from ..reports.recording import Contents
from ..reports.stalls import stall_cause_text
from ..text import count_text
from .lanes import Lanes

__all__ = ["guest_text", "limits", "recording_words", "unmeasured"]

_CAUSES = {
    "pci_bar": "PCI BARs that were mapped or unmapped",
    "memory_device": "memory devices that came or went",
    "several": "several causes together",
    "region": "regions that came or went",
}
_MADE = {
    "transition": "transitions of the map",
    "slot_op": "slot operations without a transition",
    "command": "commands",
    "agent": "commands of the agent itself",
    "stop": "stops of the guest",
    "unknown": "something that was not seen",
}


def guest_text(header: Header) -> str:
    """Which guest that was."""
    name = f"guest {header.guest_name}" if header.guest_name else "a guest"
    version = f"QEMU {header.qemu_version}" if header.qemu_version else "a QEMU of unknown version"
    kind = ", ".join(word for word in (header.machine, header.accel) if word)
    return f"{name} on {version}{f' ({kind})' if kind else ''}"


def recording_words(contents: Contents, lanes: Lanes) -> list[str]:
    """At most ten sentences, the most important first."""
    return list(_sentences(contents, lanes))[:10]


def _sentences(contents: Contents, lanes: Lanes) -> Iterator[str]:
    header, tally, summary = contents.recording.header, contents.tally, contents.summary()
    lasted = duration_text(contents.end_ns - header.monotonic_ns)
    guest = guest_text(header)
    yield f"{guest[:1].upper()}{guest[1:]} was watched for {lasted}."
    yield from _trouble(contents)
    made = ""
    if lanes.causes:
        name, most = max(lanes.causes.items(), key=lambda item: item[1])
        made = (
            f"; the cause of {most:,} was not seen"
            if name == CauseType.UNKNOWN
            else f"; {most:,} of them by {_CAUSES.get(name, name)}"
        )
    yield (
        f"Its memory map changed {count_text(tally.transitions, 'time')}, in "
        f"{count_text(tally.slot_ops, 'slot operation')}{made}."
    )
    yield from _stalls(contents, summary, lanes)
    steered = {name: n for name, n in contents.strategies().items() if name != "unknown"}
    if steered:
        told = ", ".join(f"{n:,} under {name}" for name, n in steered.items())
        yield f"Strategies applied to transitions: {told}."
    yield "Strategies were not compared in this recording."
    measured = {s.kind for s in summary.statistics}
    missing = [k for k in unmeasured(list(tally.probes.values())) if k not in measured]
    if missing:
        yield f"Not measured: {', '.join(map(kind_text, missing))}."
    if contents.lost:
        yield f"Something was missed {count_text(len(contents.lost), 'time')}; see the limits."


def _trouble(contents: Contents) -> Iterator[str]:
    for failure in contents.failures[:1]:
        sure = "" if failure.proven else " (not proven)"
        yield f"The guest failed: {failure.what}{sure}."
    if contents.violations:
        yield f"Limits were exceeded {count_text(len(contents.violations), 'time')} for certain."
    if contents.resets:
        yield f"The machine was reset {count_text(len(contents.resets), 'time')}."


def _stalls(contents: Contents, summary: SummaryRecord, lanes: Lanes) -> Iterator[str]:
    if not summary.statistics:
        active = any(p.active and p.measures for p in contents.tally.probes.values())
        yield "No stall was seen." if active else "Stalls were not measured."
        return
    if contents.longest:
        worst = contents.longest[0]
        certain = "The longest stall" if worst.at_least_ns else "A stall that may be the longest"
        yield f"{certain}: {_worst_text(worst, summary.start_ns, lanes)}."
        other = max(summary.statistics, key=lambda s: s.max_ns)
        if other.max_ns > worst.at_most_ns:
            yield (
                f"Another may have been longer: {kind_text(other.kind)}, at most "
                f"{duration_text(other.max_ns)}."
            )
    top = max(summary.statistics, key=_certain)
    yield (
        f"Most time was lost to {kind_text(top.kind)} by {_MADE.get(top.cause, top.cause)}: "
        f"{_total(top)} in {count_text(top.count, 'stall')}."
    )
    gaps = [s for s in summary.statistics if s.kind == StallKind.MISSING]
    if gaps:
        count, longest = sum(s.count for s in gaps), max(s.max_ns for s in gaps)
        yield (
            f"RAM that stays had no slot {count_text(count, 'time')}, "
            f"for at most {duration_text(longest)}."
        )
    unknown = sum(s.count for s in summary.statistics if s.cause == "unknown")
    if unknown:
        yield f"What made {unknown:,} of {summary.stalls:,} stalls is not known."


def _worst_text(s: StallRecord, start_ns: int, lanes: Lanes) -> str:
    """A stall with its bounds, its cause and its place in time."""
    cause = stall_cause_text(s.cause)
    if s.cause is not None and s.cause.type is StallCauseType.TRANSITION:
        change = lanes.transition_text(s.cause.ref)
        cause = f"transition {change}" if change else cause
    return (
        f"{kind_text(s.kind)}, {bracket_text(s.at_least_ns, s.at_most_ns)}, cause "
        f"{cause}, {duration_text(max(0, s.start_ns - start_ns))} after the "
        "beginning"
    )


def _certain(s: StallStatistics) -> tuple[int, int]:
    return s.total_min_ns or 0, s.total_ns


def _total(s: StallStatistics) -> str:
    if s.total_min_ns is None:
        return f"at most {duration_text(s.total_ns)}"
    return bracket_text(s.total_min_ns, s.total_ns)


def unmeasured(probes: list[ProbeState]) -> list[StallKind]:
    """Kinds of stall that no active probe measures; all of them where no probe is named."""
    seen = {kind for probe in probes if probe.active for kind in probe.measures}
    return [kind for kind in StallKind if kind not in seen]


def limits(contents: Contents, lanes: Lanes) -> Iterator[str]:
    """What the recording cannot say."""
    bound = contents.recording.header.stamp_bound_ns
    if bound is not None:
        yield f"Times of transitions and operations may be late by {duration_text(bound)}."
    else:
        yield "How late times of transitions may be is not recorded."
    if lanes.vague:
        changes = count_text(lanes.vague, "transition")
        yield f"Of {changes} the holes are not fully known: no map was read between."
    if lanes.predicted:
        ops = count_text(lanes.predicted, "slot operation")
        yield f"{ops} were predicted by QEMU's rules and not seen."
    yield "Slots that no operation touched are not drawn."
    if contents.recording.truncated:
        yield "The last line is cut off: it was still being written, or its writer was killed."
    if contents.recording.skipped:
        records = count_text(contents.recording.skipped, "record")
        yield f"{records} of types that this version does not know were left out."
    for lost in contents.lost[:20]:
        count = f" ({lost.count:,})" if lost.count is not None else ""
        yield f"Missed: {lost.what}{count}."
    if len(contents.lost) > 20:
        yield f"And {len(contents.lost) - 20:,} more losses."
    if not contents.tally.compared:
        yield "Traced slots were not compared with predicted ones."
    elif contents.tally.differences:
        times = count_text(contents.tally.differences, "time")
        yield f"Traced slots differed from predicted ones: {times}."
