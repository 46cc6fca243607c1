"""A recording as a Perfetto trace, by the published protobuf classes (package `perfetto`).

A track for each thread and kind of stall, and for each kind of record; counters of slots and holes;
a flow from a transition to the stalls that it caused.  Times are CLOCK_MONOTONIC, a clock snapshot
maps them to the wall clock.  Each event carries its line of the recording as the argument
`record`, so nothing is lost or made up.

A slice shows where something lies, not how long it was, when its bounds are apart: a stall is named
`KIND (within)` then, and `at_least_ns` and `at_most_ns` say how long.  A transition is drawn from
the earliest moment it may have been at.  Slices that overlap are on tracks side by side, because
slices of one track must nest.

Messages are made once and filled again: setting fields and serializing is all that an event costs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import BinaryIO

import msgspec

from ..errors import RecordingError
from ..records import Recording
from .counts import MapCounts
from .extras import Package, needed
from .fields import DECODERS, Recorded, cause_of

__all__ = ["Perfetto"]

_MODULE = "perfetto.protos.perfetto.trace.perfetto_trace_pb2"
_REALTIME, _MONOTONIC = 1, 3  # BuiltinClock
_STATE_CLEARED, _NEEDS_STATE = 1, 2  # TracePacket.SequenceFlags
_BEGIN, _END, _INSTANT, _COUNTER = 1, 2, 3, 4  # TrackEvent.Type
_SEQUENCE = 1
_ROOT = 1
_MOST_ARGUMENTS = 1 << 16
_BUFFER = 1 << 20

# tracks of what is no stall, and the field that names an event there; else its type does
_TRACKS: dict[str, tuple[str, str | None]] = {
    "guest_state": ("guest state", "status"),
    "qmp_event": ("QMP events", "event"),
    "steering": ("steering", "strategy"),
    "violation": ("violations", "kind"),
    "possible_violation": ("possible violations", "kind"),
    "guest_failure": ("guest failures", "status"),
    "guest_reset": ("guest resets", "reason"),
    "lost": ("losses", None),
    "note": ("notes", None),
}
_RECORDING = "recording"


@dataclass(slots=True)
class _Lane:
    """A track, and the end of its last slice."""

    uuid: int
    until_ns: int = 0


class Perfetto:
    """Writes traces; raises MissingPrerequisite where the package is not installed."""

    def __init__(self) -> None:
        self._pb = needed(_MODULE, "the format perfetto", "perfetto")

    def write(self, recording: Recording, file: BinaryIO) -> Counter[str]:
        """The trace; how many records of each type are in it."""
        rows: Counter[str] = Counter()
        trace = _Trace(self._pb, file, recording)
        for number, line, record in recording.read_as(DECODERS):
            tag = record.__class__.__name__
            try:
                trace.take(tag, line, record)
            except (ValueError, msgspec.DecodeError) as exc:  # also of protobuf and of UTF-8
                raise RecordingError(
                    f"{recording.path}, line {number}: a value that cannot be ({exc})",
                    remedy="give a file that `qmp-memlistener record` wrote, unchanged",
                ) from None
            rows[tag] += 1
        trace.flush()
        return rows


class _Event:
    """Packets that are filled again and again: one, the two of a slice, or one and a counter."""

    def __init__(self, pb: Package, types: tuple[int, ...], category: str, numbers: int) -> None:
        self.trace = pb.Trace()
        for kind in types:
            packet = self.trace.packet.add()
            packet.trusted_packet_sequence_id = _SEQUENCE
            packet.sequence_flags = _NEEDS_STATE
            packet.track_event.type = kind
        self.first, self.last = self.trace.packet[0], self.trace.packet[-1]
        self.event, self.end = self.first.track_event, self.last.track_event
        self.event.categories.append(category)
        self.numbers = [self.event.debug_annotations.add() for _ in range(numbers)]
        self.line = self.event.debug_annotations.add()
        self.line.name = "record"


class _Trace:
    """The state of one trace that is being written."""

    def __init__(self, pb: Package, file: BinaryIO, recording: Recording) -> None:
        self._pb = pb
        self._file = file
        self._parts: list[bytes] = []
        self._size = 0
        self._next = _ROOT + 1
        self._tracks: dict[tuple[int, str], int] = {}
        self._lanes: dict[tuple[str | None, str], list[_Lane]] = {}
        self._bound_ns = recording.header.stamp_bound_ns or 0
        self._counts = MapCounts()
        self._renew()
        self._begin(recording)

    def take(self, tag: str, line: bytes, record: Recorded) -> None:
        """One record, and the line that it is in."""
        if tag == "stall":
            self._take_stall(line, record)
        elif tag == "transition":
            self._take_transition(line, record)
        elif tag == "slot_op":
            self._take_operation(line, record)
        elif tag == "command":
            self._span("commands", record.name, record.start_ns, record.end_ns, line)
        elif tag == "measurement":
            track = f"measurements of {record.probe}"
            self._span(track, record.probe, record.start_ns, record.end_ns, line)
        elif tag == "header":
            self._point(self._track(_RECORDING), tag, record.monotonic_ns, line)
        elif tag == "summary":
            self._point(self._track(_RECORDING), tag, record.end_ns, line)
        else:
            name, field = _TRACKS.get(tag, (_RECORDING, None))
            word = None if field is None else getattr(record, field)
            self._point(self._track(name), word or tag, record.t_ns, line)
            if tag == "map":
                self._counts.map(record)
                self._count("slots", self._counts.slots, record.t_ns)
                self._count("holes", self._counts.holes, record.t_ns)
        if self._size > _BUFFER:
            self.flush()

    def flush(self) -> None:
        self._file.write(b"".join(self._parts))
        self._parts.clear()
        self._size = 0
        self._renew()

    def _renew(self) -> None:
        """New messages: one keeps the memory of every text that was ever put into it."""
        self._instant = _Event(self._pb, (_INSTANT,), "record", 0)
        self._slice = _Event(self._pb, (_BEGIN, _END), "record", 0)
        self._change = _Event(self._pb, (_BEGIN, _END), "transition", 0)
        self._change.event.flow_ids.append(0)
        self._stall = _Event(self._pb, (_BEGIN, _END), "stall", 2)
        for annotation, name in zip(
            self._stall.numbers, ("at_least_ns", "at_most_ns"), strict=True
        ):
            annotation.name = name
        self._operation = _Event(self._pb, (_INSTANT, _COUNTER), "record", 0)
        self._counter = self._pb.Trace()
        packet = self._counter.packet.add()
        packet.trusted_packet_sequence_id, packet.sequence_flags = _SEQUENCE, _NEEDS_STATE
        packet.track_event.type = _COUNTER
        self._counted = packet

    def _begin(self, recording: Recording) -> None:
        header = recording.header
        trace = self._pb.Trace()
        packet = trace.packet.add()
        packet.trusted_packet_sequence_id = _SEQUENCE
        packet.sequence_flags = _STATE_CLEARED
        packet.trace_packet_defaults.timestamp_clock_id = _MONOTONIC
        packet.clock_snapshot.primary_trace_clock = _MONOTONIC
        for clock_id, now in (
            (_MONOTONIC, header.monotonic_ns),
            (_REALTIME, header.realtime_ns),
        ):
            clock = packet.clock_snapshot.clocks.add()
            clock.clock_id, clock.timestamp = clock_id, now
        root = trace.packet.add()
        root.trusted_packet_sequence_id = _SEQUENCE
        root.track_descriptor.uuid = _ROOT
        name = header.guest_name or header.target
        if header.pid is None:
            root.track_descriptor.name = name
        else:
            root.track_descriptor.process.pid = header.pid
            root.track_descriptor.process.process_name = name
        self._put(trace)

    def _take_stall(self, line: bytes, record: Recorded) -> None:
        event = self._stall
        cause = cause_of(record.cause)
        flows = event.event.flow_ids
        if cause is not None and cause.type == "transition" and isinstance(cause.ref, int):
            flows[:] = (_flow(cause.ref),)
        elif flows:
            del flows[:]
        event.numbers[0].int_value = least = record.at_least_ns
        event.numbers[1].int_value = record.at_most_ns
        start, end = record.start_ns, record.end_ns
        # as in reports: bounds more than 10 % apart are not one number
        name = record.kind if (end - start) * 10 <= least * 11 else f"{record.kind} (within)"
        self._fill(event, record.thread, record.kind, name, start, end, line)

    def _take_transition(self, line: bytes, record: Recorded) -> None:
        cause = cause_of(record.cause)
        name = (cause and cause.type) or "transition"
        late = record.late_ns
        late = self._bound_ns if late is None or late is msgspec.UNSET else late
        event = self._change
        event.event.flow_ids[0] = _flow(record.seq)
        start = max(0, record.t_ns - late)
        self._fill(event, None, "transitions", name, start, record.t_ns, line)
        if self._counts.transition(record):
            self._count("holes", self._counts.holes, record.t_ns)

    def _take_operation(self, line: bytes, record: Recorded) -> None:
        changed = self._counts.slot_op(record)
        event = self._operation if changed else self._instant
        at = record.t_ns
        if changed:
            event.last.timestamp = at
            event.end.track_uuid = self._track("slots", counter=True)
            event.end.counter_value = self._counts.slots
        self._point(self._track("slot operations"), record.op, at, line, event)

    def _span(self, track: str, name: str, start: int, end: int, line: bytes) -> None:
        self._fill(self._slice, None, track, name, start, end, line)

    def _fill(
        self,
        slice_: _Event,
        thread: str | None,
        track: str,
        name: str,
        start: int,
        end: int,
        line: bytes,
    ) -> None:
        lanes = self._lanes.get((thread, track))
        if lanes is None:
            lanes = self._lanes[thread, track] = []
        for lane in lanes:
            if lane.until_ns <= start:
                break
        else:
            parent = _ROOT if thread is None else self._track(f"thread {thread}")
            lane = _Lane(self._describe(parent, track))
            lanes.append(lane)
        lane.until_ns = end
        event = slice_.event
        event.name = name
        event.track_uuid = slice_.end.track_uuid = lane.uuid
        slice_.first.timestamp, slice_.last.timestamp = start, end
        slice_.line.legacy_json_value = _argument(line)
        self._put(slice_.trace)

    def _point(
        self, uuid: int, name: str, at: int, line: bytes, event: _Event | None = None
    ) -> None:
        event = event or self._instant
        event.event.name = name
        event.event.track_uuid = uuid
        event.first.timestamp = at
        event.line.legacy_json_value = _argument(line)
        self._put(event.trace)

    def _count(self, name: str, value: int | None, at: int) -> None:
        if value is None:
            return
        packet = self._counted
        packet.timestamp = at
        packet.track_event.track_uuid = self._track(name, counter=True)
        packet.track_event.counter_value = value
        self._put(self._counter)

    def _track(self, name: str, *, counter: bool = False) -> int:
        """The one track of that name right below the guest."""
        uuid = self._tracks.get((_ROOT, name))
        if uuid is None:
            uuid = self._tracks[_ROOT, name] = self._describe(_ROOT, name, counter=counter)
        return uuid

    def _describe(self, parent: int, name: str, *, counter: bool = False) -> int:
        uuid, self._next = self._next, self._next + 1
        trace = self._pb.Trace()
        packet = trace.packet.add()
        packet.trusted_packet_sequence_id = _SEQUENCE
        packet.track_descriptor.uuid = uuid
        packet.track_descriptor.parent_uuid = parent
        packet.track_descriptor.name = name
        if counter:
            packet.track_descriptor.counter.unit_name = name
        self._put(trace)
        return uuid

    def _put(self, trace: Package) -> None:
        data: bytes = trace.SerializeToString()
        self._parts.append(data)
        self._size += len(data)


def _flow(seq: int) -> int:
    return seq + 1  # 0 is no flow


def _argument(line: bytes) -> str:
    """The record as an argument; of a map with thousands of ranges only how long it is."""
    if len(line) > _MOST_ARGUMENTS:
        return f'{{"left_out_bytes":{len(line)}}}'
    return line[:-1].decode()
