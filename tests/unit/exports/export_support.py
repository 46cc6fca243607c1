"""Recordings for the tests of exports, and what their lines hold as plain JSON."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import msgspec

from qmp_memlistener.records import RecordingWriter
from tests.support.records import HEADER

__all__ = ["ODD", "RECORDED", "documents", "exported", "odd_recording", "unpacked"]

REPLAY = Path(__file__).parents[2] / "conformance" / "replay"
RECORDED = [
    REPLAY / "7.2" / "pc-traced.jsonl.gz",
    REPLAY / "10.0" / "q35-paced.jsonl.gz",
    REPLAY / "11.1" / "pc-polled.jsonl.gz",
    REPLAY / "7.2" / "q35-tcg.jsonl.gz",
]

MOST = (1 << 64) - 1
# what no guest of the conformance tier did; keys are left out as former versions did
ODD: list[dict[str, Any]] = [
    {"type": "slot_op", "t_ns": 5, "as_id": 1, "slot": 3, "op": "add", "gpa": MOST, "size": MOST,
     "flags": 4294967295},
    {"type": "slot_op", "schema": 1, "t_ns": 6, "as_id": 0, "slot": 3, "op": "from the future",
     "gpa": 0, "size": 0, "flags": 0, "ret": -22, "predicted": True, "hva": None},
    {"type": "stall", "kind": "commit", "start_ns": 10, "end_ns": 30, "at_least_ns": 0,
     "at_most_ns": 20, "probe": "p", "witnesses": [], "thread": "", "site": 'a "b", c\nd é',
     "cause": {"type": "command", "ref": "device_add"}, "incident": 1},
    {"type": "stall", "kind": "commit", "start_ns": 20, "end_ns": 40, "at_least_ns": 20,
     "at_most_ns": 20, "probe": "p", "witnesses": ["p"], "thread": "", "site": "null",
     "cause": None, "incident": 2, "new_key": 1},
    {"type": "stall", "kind": "commit", "start_ns": 15, "end_ns": 15, "at_least_ns": 0,
     "at_most_ns": 0, "probe": "p", "witnesses": ["p"], "thread": "", "site": None,
     "cause": {"type": "transition", "ref": 7}, "incident": 3},
    {"type": "transition", "seq": 7, "t_ns": 12, "cause": {"type": "unknown"}, "removed": [],
     "added": [{"start": 0, "size": 1 << 64, "kind": "i/o", "name": "x", "offset": 0,
                "owner": None, "memslot": False}],
     "holes_punched": [], "holes_filled": [], "detail": "full"},
    {"type": "of the future", "t_ns": 50},
    {"type": "measurement", "probe": "kvmstats", "start_ns": 1, "end_ns": 60,
     "values": {"exits": 3, "ratio": 0.25, "word": "é"}},
    {"type": "command", "name": "device_add", "start_ns": 8, "busy_until_ns": 9, "end_ns": 41,
     "probe": "trace"},
    {"t_ns": 61, "type": "lost", "what": "lines", "count": None},
    {"type": "guest_reset", "t_ns": 62, "reason": None, "guest": None, "what": "why"},
]  # fmt: skip


def odd_recording(path: Path) -> Path:
    """A header, and the records of ODD."""
    with RecordingWriter(str(path), HEADER):
        pass
    with path.open("ab") as file:
        file.writelines(msgspec.json.encode(document) + b"\n" for document in ODD)
    return path


def unpacked(path: Path) -> list[bytes]:
    """The lines of a recording."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines(keepends=True)


def documents(path: Path) -> dict[int, dict[str, Any]]:
    """By line number, without what is of no type of this version."""
    lines = enumerate(map(json.loads, unpacked(path)), 1)
    return {number: doc for number, doc in lines if doc["type"] != "of the future"}


def exported(tag: str, docs: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Those of one type."""
    return {number: doc for number, doc in docs.items() if doc["type"] == tag}
