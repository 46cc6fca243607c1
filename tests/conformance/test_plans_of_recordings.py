"""`plan` of a recording says what the recording's own slot operations say, flags included.

The recordings are made by the tracker from the samples of `slots`.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from qmp_memlistener.memslots import ADDRESS_SPACES, OpKind, Rules
from qmp_memlistener.records import Header, Reconciled, Record, RecordingWriter, SlotOp
from qmp_memlistener.topology import MemoryMap, read_maps
from qmp_memlistener.tracking import Tracker
from tests.unit.cli.cli_support import run

SAMPLES = sorted((Path(__file__).parent / "slots").rglob("pc-logged.json.gz"))


def maps(text: str) -> dict[int, MemoryMap]:
    return {ADDRESS_SPACES[n]: m for n, m in read_maps(text, list(ADDRESS_SPACES)).items()}


def recorded(sample: dict[str, Any]) -> list[Record]:
    """What the agent records from the start of the measurement on."""
    names = [s["name"] for s in sample["steps"]]
    steps = sample["steps"][names.index("measure") :]
    t = Tracker(
        maps(steps[0]["mtree_before"]),
        0,
        has_slots=True,
        traced=True,
        rules=Rules.parse(sample["version"], sample["page_size"]),
    )
    now = 0
    for step in steps:
        t.commits.view_rebuilt(now := now + 1, 0x10)
        t.commits.view_rebuilt(now, 0x20)
        for op in step["ops"]:
            values = {k: op[k] for k in ("as_id", "slot", "gpa", "size", "flags", "ret")}
            kind = OpKind.ADD if op["size"] else OpKind.DELETE
            t.commits.slot_operation(SlotOp(t_ns=(now := now + 1), op=kind, hva=op["ua"], **values))
        t.snapshot(maps(step["mtree_after"]), now := now + 1)
    return t.take()[0]


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.parent.name)
def test_flags_of_what_is_plugged_while_ram_is_logged(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with gzip.open(path) as file:
        sample = json.load(file)
    records = recorded(sample)
    assert all(r.equal for r in records if isinstance(r, Reconciled))
    told: dict[int, list[tuple[str, int, int]]] = {}
    for r in records:
        if isinstance(r, SlotOp) and r.transition is not None:
            told.setdefault(r.transition, []).append((r.op, r.gpa, r.flags))
    header = Header(
        tool_version="0",
        monotonic_ns=0,
        realtime_ns=0,
        host_kernel="",
        target="",
        qemu_version=sample["version"],
        machine=None,
        accel="kvm",
        guest_name=None,
        pid=None,
        source="",
    )
    file_name = tmp_path / "recording.jsonl"
    with RecordingWriter(str(file_name), header) as writer:
        for r in records:
            writer.write(r)
    ran = run(capsys, "plan", file_name, "--strategy", "qemu", "--json")
    planned = {
        t["seq"]: [(op["op"], op["gpa"], op["flags"]) for op in t["plans"][0]["ops"]]
        for t in json.loads(ran.out)["transitions"]
    }
    assert planned == told
    assert sum(op == "add" and not flags & 1 for ops in told.values() for op, _, flags in ops) == 5
