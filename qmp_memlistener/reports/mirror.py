"""What became of a mirror beside a watch, in words.

Nothing is printed here, and text that a guest chose is passed on as it is: who prints makes it
harmless.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from ..records import LabMirror, MirrorDifference, MirrorRecord, MirrorTimes
from ..text import count_text
from .lengths import duration_text

__all__ = ["mirror_lines"]

_SHOWN = 8  # of differences, and of notes


def mirror_lines(m: MirrorRecord, *, width: int = 80) -> Iterator[str]:
    """Lines without line ends, an empty one first; at most `width` long."""
    where = "on /dev/kvm" if m.backend == "kvm" else "in memory"
    yield ""
    state = "in step" if m.in_step else "OUT OF STEP"
    yield f"mirror {where}, strategy {m.strategy}: {state}"
    for text in _texts(m):
        yield from textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ")


def _texts(m: MirrorRecord) -> Iterator[str]:
    if m.why_not is not None:
        yield m.why_not
    if not m.compared:
        yield "not compared with the guest's map at the end"
    elif not m.differences:
        yield "compared with the guest's map at the end: no difference"
    else:
        yield f"{count_text(len(m.differences), 'difference')} from the guest's map at the end:"
        yield from _differences(m.differences)
    done = (
        (m.slots_added, "slot added", "slots added"),
        (m.slots_deleted, "deleted", "deleted"),
        (m.flags_changed, "change of flags", "changes of flags"),
        (m.holes_marked, "hole marked", "holes marked"),
        (m.holes_unmarked, "unmarked", "unmarked"),
    )
    parts = ", ".join(count_text(count, *words) for count, *words in done if count)
    yield (
        f"{count_text(m.transitions, 'map')} received, {count_text(m.operations, 'operation')}"
        + (f": {parts}" if parts else "")
    )
    yield from _durations(m)
    if m.exposed:
        updates = count_text(m.exposed, "update")
        yield f"{updates} with memory missing that is there before and after"
    if m.rebuilt:
        yield f"recreated {count_text(m.rebuilt, 'time')}"
    if m.dropped:
        yield f"{count_text(m.dropped, 'change')} dropped because it was too slow"
    if m.unpaused:
        yield f"{count_text(m.unpaused, 'update')} during which the guest ran, wholly or in part"
    if m.already_paused:
        yield f"{count_text(m.already_paused, 'update')} of a guest that was paused already"
    if m.lab is not None:
        yield from _lab(m.lab)
    for note in m.notes[-_SHOWN:]:
        yield f"note: {note}"


def _durations(m: MirrorRecord) -> Iterator[str]:
    for times, words in (
        (m.updates, "an update took"),
        (m.lag, "behind the guest for"),
        (m.pauses, "the guest was paused for"),
    ):
        if times.count:
            yield f"{words} {_average(times)}"


def _lab(lab: LabMirror) -> Iterator[str]:
    text = (
        f"lab: {count_text(lab.slots, 'slot')} of KVM's, "
        f"{count_text(lab.slot_ioctls, 'slot ioctl')}, "
        f"{count_text(lab.mappings, 'host mapping')} made"
    )
    for count, words in (
        (lab.placed, "placed in another's hole"),
        (lab.grown, "recreated, larger"),
    ):
        if count:
            text += f"; {count_text(count, 'slot')} {words}"
    yield text
    if lab.moved:
        yield f"lab: its own slot was moved {count_text(lab.moved, 'time')}"
    if lab.vcpus:
        held = f", paused for {_average(lab.holds)}" if lab.holds.count else ""
        yield f"lab: {count_text(lab.vcpus, 'vCPU')} running{held}"
    read = f"lab: its guest read {count_text(lab.reads, 'word')}, "
    if not lab.differences:
        yield f"{read}each from where it should be" if lab.reads else "lab: its guest read nothing"
    else:
        yield f"{read}{len(lab.differences):,} not from where they should be:"
        yield from _differences(lab.differences)
    yield from (f"lab: {text}" for text in lab.wrong_logs)


def _average(times: MirrorTimes) -> str:
    mean = duration_text(times.total_ns // times.count)
    return f"{mean} on average, {duration_text(times.longest_ns or 0)} at most"


def _differences(differences: list[MirrorDifference]) -> Iterator[str]:
    for d in differences[:_SHOWN]:
        yield f"- {d}"
    if len(differences) > _SHOWN:
        yield f"- and {len(differences) - _SHOWN:,} more"
