"""A trace, read back by the published classes, agrees with the recording event by event."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from qmp_memlistener.exports import Format, export
from tests.unit.exports.export_support import documents

pb = pytest.importorskip(
    "perfetto.protos.perfetto.trace.perfetto_trace_pb2",
    reason="needs pip install perfetto protobuf",
)
BEGIN, END, INSTANT, COUNTER = 1, 2, 3, 4
SPANS = {"stall", "transition", "command", "measurement"}


class Read:
    """A trace, by what is in its packets."""

    def __init__(self, path: Path) -> None:
        self.trace: Any = pb.Trace()
        self.trace.ParseFromString(path.read_bytes())
        packets = list(self.trace.packet)
        self.tracks = {
            p.track_descriptor.uuid: p.track_descriptor
            for p in packets
            if p.HasField("track_descriptor")
        }
        self.events = [p for p in packets if p.HasField("track_event")]

    def name(self, uuid: int) -> str:
        name: str = self.tracks[uuid].name
        return name

    def counter(self, name: str) -> list[tuple[int, int]]:
        return [
            (p.timestamp, p.track_event.counter_value)
            for p in self.events
            if p.track_event.type == COUNTER and self.name(p.track_event.track_uuid) == name
        ]


def arguments(packet: Any) -> dict[str, Any]:  # noqa: ANN401 - a class made at run time
    found: dict[str, Any] = {}
    for annotation in packet.track_event.debug_annotations:
        if annotation.HasField("legacy_json_value"):
            found[annotation.name] = json.loads(annotation.legacy_json_value)
        else:
            found[annotation.name] = annotation.int_value
    return found


@pytest.fixture
def read(source: Path, tmp_path: Path) -> Read:
    export(str(source), Format.PERFETTO, str(tmp_path / "t.pftrace"))
    return Read(tmp_path / "t.pftrace")


def begins(read: Read) -> list[Any]:
    return [p for p in read.events if p.track_event.type in (BEGIN, INSTANT)]


def test_every_record_is_one_event_with_its_line(source: Path, read: Read) -> None:
    assert [arguments(p)["record"] for p in begins(read)] == list(documents(source).values())


def test_events_are_where_the_records_say(source: Path, read: Read) -> None:
    ends = iter([p for p in read.events if p.track_event.type == END])
    bound = documents(source)[1].get("stamp_bound_ns") or 0
    for packet in begins(read):
        record = arguments(packet)["record"]
        tag = record["type"]
        assert (packet.track_event.type == BEGIN) == (tag in SPANS)
        if tag not in SPANS:
            times = (record[k] for k in ("t_ns", "monotonic_ns", "end_ns") if k in record)
            assert packet.timestamp == next(times)
            continue
        end = next(ends)
        assert end.track_event.track_uuid == packet.track_event.track_uuid
        if tag == "transition":
            late = record.get("late_ns")
            start = max(0, record["t_ns"] - (bound if late is None else late))
            assert (packet.timestamp, end.timestamp) == (start, record["t_ns"])
        else:
            assert (packet.timestamp, end.timestamp) == (record["start_ns"], record["end_ns"])
    assert next(ends, None) is None


def test_a_stall_has_its_thread_kind_and_bounds(read: Read) -> None:
    for packet in begins(read):
        found = arguments(packet)
        record = found["record"]
        if record["type"] != "stall":
            continue
        assert (found["at_least_ns"], found["at_most_ns"]) == (
            record["at_least_ns"],
            record["at_most_ns"],
        )
        exact = (record["end_ns"] - record["start_ns"]) * 10 <= record["at_least_ns"] * 11
        assert packet.track_event.name == record["kind"] + ("" if exact else " (within)")
        track = read.tracks[packet.track_event.track_uuid]
        assert track.name == record["kind"]
        parent = read.tracks[track.parent_uuid]
        if record["thread"] is None:
            assert parent.uuid == 1
        else:
            assert parent.name == f"thread {record['thread']}"
            assert parent.parent_uuid == 1


def test_slices_of_a_track_never_overlap(read: Read) -> None:
    """Else an end would close another slice than its own."""
    by_track: dict[int, list[Any]] = defaultdict(list)
    for packet in read.events:
        if packet.track_event.type in (BEGIN, END):
            by_track[packet.track_event.track_uuid].append(packet)
    assert by_track
    for uuid, packets in by_track.items():
        packets.sort(key=lambda p: p.timestamp)  # stable, as Perfetto sorts
        kinds = [p.track_event.type for p in packets]
        assert kinds == [BEGIN, END] * (len(kinds) // 2), read.name(uuid)


def test_a_flow_leads_from_a_transition_to_its_stalls(read: Read) -> None:
    transitions: dict[int, list[int]] = {}
    stalls: dict[int, list[int]] = defaultdict(list)
    for packet in begins(read):
        record, flows = arguments(packet)["record"], list(packet.track_event.flow_ids)
        cause = record.get("cause") or {}
        if record["type"] == "transition":
            transitions[record["seq"]] = flows
        elif record["type"] == "stall" and cause.get("type") == "transition":
            stalls[cause["ref"]] += flows
        else:
            assert not flows, record
    ids = [flow for flows in transitions.values() for flow in flows]
    assert len(ids) == len(set(ids)) == len(transitions)
    for seq, flows in stalls.items():
        assert set(flows) == set(transitions[seq])


def test_counters_follow_the_map(source: Path, read: Read) -> None:
    slots, holes = None, None
    seen: list[tuple[str, int, int]] = []
    for record in documents(source).values():
        if record["type"] == "map":
            slots = sum(r["memslot"] for r in record["ranges"])
            holes = sum(len(b["holes"]) for b in record["ram_blocks"])
            seen += [("slots", record["t_ns"], slots), ("holes", record["t_ns"], holes)]
        elif record["type"] == "slot_op" and slots is not None and not record["as_id"]:
            step = {"add": 1, "delete": -1}.get(record["op"], 0)
            if record["ret"] == 0 and step:
                slots += step
                seen.append(("slots", record["t_ns"], slots))
        elif record["type"] == "transition" and holes is not None:
            step = len(record["holes_punched"]) - len(record["holes_filled"])
            if step:
                holes += step
                seen.append(("holes", record["t_ns"], holes))
    for name in ("slots", "holes"):
        assert read.counter(name) == [(t, v) for n, t, v in seen if n == name]


def test_the_clocks_are_those_of_the_header(source: Path, read: Read) -> None:
    header = documents(source)[1]
    first = read.trace.packet[0]
    assert {c.clock_id: c.timestamp for c in first.clock_snapshot.clocks} == {
        3: header["monotonic_ns"],
        1: header["realtime_ns"],
    }
    assert first.clock_snapshot.primary_trace_clock == 3
    assert first.trace_packet_defaults.timestamp_clock_id == 3
    assert first.sequence_flags == 1
    assert {p.trusted_packet_sequence_id for p in read.trace.packet} == {1}
    assert all(p.sequence_flags == 2 for p in read.events)
    assert read.tracks[1].process.pid == header["pid"]


def test_every_track_is_described_before_it_is_used(read: Read) -> None:
    known: set[int] = set()
    for packet in read.trace.packet:
        if packet.HasField("track_descriptor"):
            track = packet.track_descriptor
            assert track.uuid not in known
            assert track.uuid == 1 or track.parent_uuid in known
            known.add(track.uuid)
        elif packet.HasField("track_event"):
            assert packet.track_event.track_uuid in known
