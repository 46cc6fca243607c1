"""Recordings, comparisons and races for pages, with names that would like to be markup."""

from __future__ import annotations

from pathlib import Path

import msgspec

from qmp_memlistener.distribution import Distribution
from qmp_memlistener.kvmlab.measuring import Totals
from qmp_memlistener.kvmlab.race import Model, RaceOptions, RaceReport, StrategyResult
from qmp_memlistener.memslots import OpKind
from qmp_memlistener.page import Lanes, recording_page
from qmp_memlistener.records import (
    Cause,
    CauseType,
    CommandRecord,
    GuestFailure,
    GuestState,
    Lost,
    MapRecord,
    ProbesRecord,
    ProbeState,
    Record,
    Recording,
    RecordingWriter,
    SlotOp,
    StallCause,
    StallCauseType,
    StallKind,
    StallRecord,
)
from qmp_memlistener.reports.recording import Contents
from qmp_memlistener.topology import Hole, RamBlock
from qmp_memlistener.updates.compare import Comparison, Round
from qmp_memlistener.updates.compare.stats import differences, summaries
from qmp_memlistener.updates.model import Result
from tests.support.records import HEADER, transition

OWNED = "document.title='owned'"
EVIL = f'</script><script>{OWNED}</script><img src=x onerror="{OWNED}">'
START = HEADER.monotonic_ns
MS = 1_000_000


def stall(
    start: int, least: int, most: int, kind: str = "bql_hold", thread: str | None = None
) -> StallRecord:
    return StallRecord(
        kind=StallKind(kind), start_ns=START + start, end_ns=START + start + most + MS,
        at_least_ns=least, at_most_ns=most, probe="uprobes", witnesses=["uprobes"], thread=thread,
        site=EVIL, cause=StallCause(StallCauseType.TRANSITION, 1), incident=1,
    )  # fmt: skip


def records() -> list[Record]:
    """Two transitions, a hole that comes and goes, stalls with wide bounds, a probe that is off."""
    hole = Hole(EVIL, 0xA0000, 0x20000, 0xA0000, "vga", EVIL)
    first = msgspec.structs.replace(
        transition(1, START + 10 * MS, 1),
        cause=Cause(CauseType.PCI_BAR, device=EVIL),
        holes_punched=[hole],
    )
    second = msgspec.structs.replace(transition(2, START + 40 * MS), holes_filled=[hole])
    probes = [
        ProbeState("uprobes", [StallKind.BQL_HOLD], True, None, None, 1000, "little"),
        ProbeState("pulse", [StallKind.VCPU_GAP], False, EVIL, "use the image", 1, "-"),
    ]
    return [
        ProbesRecord(t_ns=START, probes=probes),
        MapRecord(
            t_ns=START, address_space="memory", ranges=[], ram_blocks=[RamBlock(EVIL, None, (), ())]
        ),
        GuestState(t_ns=START, status="running", running=True),
        first,
        SlotOp(t_ns=START + 10 * MS, as_id=0, slot=3, op=OpKind.ADD, gpa=0, size=4096, flags=0),
        stall(10 * MS, 2 * MS, 9 * MS, thread=EVIL),
        CommandRecord(
            name=EVIL, start_ns=START + 20 * MS, busy_until_ns=START + 21 * MS,
            end_ns=START + 25 * MS, probe="ping",
        ),
        second,
        Lost(t_ns=START + 50 * MS, what=EVIL, count=3),
        GuestFailure(
            t_ns=START + 60 * MS, status="internal-error", what=EVIL, proven=False, transition=1
        ),
    ]  # fmt: skip


def write_recording(path: Path, found: list[Record] | None = None) -> Path:
    header = msgspec.structs.replace(HEADER, guest_name=EVIL)
    with RecordingWriter(str(path), header) as writer:
        writer.write_all(records() if found is None else found)
    return path


def page_of(path: Path) -> str:
    recording = Recording(str(path))
    lanes = Lanes(recording.header.monotonic_ns)
    return recording_page(Contents(recording, 20, lanes.take), lanes)


def comparison() -> Comparison:
    """A pause costs 2 ms, the others nothing of it; the BQL is held a little under each."""
    each = {
        name: [
            Round(
                name, i, Result.DONE, None, START + i * 100 * MS,
                [
                    *([stall(i * 100 * MS, 2 * MS + i, 2 * MS + i, "vcpu_pause")]
                      if name == "pause" else []),
                    stall(i * 100 * MS, 10_000 + i % 3, 40_000 + i % 3),
                ],
                3, 2, 1, 5 * MS, [StallKind.VCPU_PAUSE, StallKind.BQL_HOLD],
            )
            for i in range(10)
        ]
        for name in ("direct", "pause", "hole", "control")
    }  # fmt: skip
    return Comparison(
        seed=3, window_ns=50 * MS, rounds=[r for own in each.values() for r in own],
        summary=summaries(each), differences=differences(each), skipped=[], ended_early=None,
        remedy=None,
    )  # fmt: skip


def race() -> RaceReport:
    """Two ran, one did not."""
    model = Model(3, 4096, False, True, 0)
    times = Distribution.of([1000, 2000, 30_000])
    hurt = Totals(updates=400, hit=12, internal_errors=2, spurious=10, guest_gap=times)
    return RaceReport(
        {"kernel": "6.1", "machine": "x86_64", "kvm": "vmx", "cpus": 2, "capabilities": {}},
        RaceOptions(),
        (
            StrategyResult("naive", EVIL, model, None, hurt),
            StrategyResult("pause", "it stops", model, None, Totals(updates=400, guest_gap=times)),
            StrategyResult("batch", "a patch", model, "the kernel has no such call"),
        ),
        0,
    )
