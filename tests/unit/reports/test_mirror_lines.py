"""What became of a mirror: its record, read back from a file, and the same in words."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.kvmlab.backend_probe import Misread
from qmp_memlistener.memslots.slots import Backing
from qmp_memlistener.records import (
    Header,
    LabMirror,
    MemoryShown,
    MirrorDifference,
    MirrorRecord,
    MirrorTimes,
    Recording,
    RecordingWriter,
)
from qmp_memlistener.reports.mirror import mirror_lines

RAM = MemoryShown("pc.ram", "/objects/pc.ram", 0xF0000, readonly=False)
BIOS = MemoryShown("pc.bios", None, 0x30000, readonly=True)
REPORT = MirrorRecord(
    t_ns=5,
    backend="",
    strategy="hole",
    compared=True,
    in_step=True,
    why_not=None,
    transitions=21,
    operations=44,
    slots_added=14,
    slots_deleted=10,
    flags_changed=0,
    holes_marked=10,
    holes_unmarked=10,
    slots_touched=40,
    exposed=0,
    bitmaps_dropped=0,
    updates=MirrorTimes(21, 42_000_000, 5_000_000),
    pauses=MirrorTimes(),
    already_paused=0,
    unpaused=0,
    lag=MirrorTimes(20, 60_000_000, 9_000_000),
    rebuilt=0,
    dropped=0,
    checks=1,
    differences=[],
    notes=[],
)
LAB = LabMirror(
    vcpus=0,
    slots=2,
    slot_ioctls=4,
    mappings=46,
    placed=12,
    grown=1,
    moved=0,
    holds=MirrorTimes(),
    reads=21,
    differences=[],
    wrong_logs=[],
)
replaced = msgspec.structs.replace


def mirror_record(report: MirrorRecord, backend: str, lab: LabMirror | None = None) -> MirrorRecord:
    return replaced(report, backend=backend, lab=lab)


def words(record: MirrorRecord) -> str:
    """All of it in one line."""
    return " ".join(" ".join(mirror_lines(record)).split())


def test_a_good_mirror_in_words() -> None:
    record = mirror_record(REPORT, "kvm", LAB)
    assert record.faults == 0
    assert list(mirror_lines(record)) == [
        "",
        "mirror on /dev/kvm, strategy hole: in step",
        "  compared with the guest's map at the end: no difference",
        "  21 maps received, 44 operations: 14 slots added, 10 deleted, 10 holes marked,",
        "    10 unmarked",
        "  an update took 2.00 ms on average, 5.00 ms at most",
        "  behind the guest for 3.00 ms on average, 9.00 ms at most",
        "  lab: 2 slots of KVM's, 4 slot ioctls, 46 host mappings made; 12 slots placed",
        "    in another's hole; 1 slot recreated, larger",
        "  lab: its guest read 21 words, each from where it should be",
    ]


def test_differences_and_trouble_are_said() -> None:
    differences = [
        MirrorDifference(0xF0000, 0x100000, RAM, BIOS),
        MirrorDifference(
            1 << 32, (1 << 32) + 4096, None, MemoryShown(None, None, None, readonly=False)
        ),
        MirrorDifference(0, 4096, RAM, None),
    ]
    report = replaced(
        REPORT,
        in_step=False,
        why_not="0xf0000-0xfffff has something else",
        differences=differences,
        exposed=3,
        rebuilt=1,
        dropped=2,
        unpaused=4,
        already_paused=5,
        pauses=MirrorTimes(2, 4_000_000, 3_000_000),
        notes=["a note"],
    )
    record = mirror_record(report, "model")
    assert record.faults == 3
    assert record.lab is None
    text = words(record)
    for said in (
        "mirror in memory, strategy hole: OUT OF STEP 0xf0000-0xfffff has something else",
        "3 differences from the guest's map at the end:",
        "- 0xf0000-0xfffff has pc.bios @0x30000 (read-only) instead of pc.ram @0xf0000",
        "- 0x100000000-0x100000fff has unknown memory instead of no memory",
        "- 0x0-0xfff has no memory instead of pc.ram @0xf0000",
        "3 updates with memory missing that is there before and after",
        "recreated 1 time",
        "2 changes dropped because it was too slow",
        "4 updates during which the guest ran, wholly or in part",
        "5 updates of a guest that was paused already",
        "the guest was paused for 2.00 ms on average, 3.00 ms at most",
        "note: a note",
    ):
        assert said in text
    assert "lab" not in text


def test_what_the_lab_found_is_said() -> None:
    ram = Backing("pc.ram", None, 4096)
    misread = (
        Misread(4096, ram, None, None),
        Misread(8192, None, ram, b"12345678"),
        Misread(12288, ram, None, b"12345678"),
    )
    lab = replaced(
        LAB,
        vcpus=2,
        holds=MirrorTimes(4, 8_000_000, 3_000_000),
        moved=1,
        reads=9,
        differences=[m.difference for m in misread],
        wrong_logs=["KVM's slot 0 at 0x0+0x1000 has no dirty log"],
    )
    record = mirror_record(REPORT, "kvm", lab)
    assert record.faults == 4
    assert record.lab is not None
    assert record.lab.differences == [
        MirrorDifference(4096, 4104, MemoryShown("pc.ram", None, 4096, None), None),
        MirrorDifference(8192, 8200, None, MemoryShown("pc.ram", None, 4096, None)),
        MirrorDifference(
            12288,
            12296,
            MemoryShown("pc.ram", None, 4096, None),
            MemoryShown(None, None, None, None),
        ),
    ]
    text = words(record)
    for said in (
        "lab: its own slot was moved 1 time",
        "lab: 2 vCPUs running, paused for 2.00 ms on average, 3.00 ms at most",
        "lab: its guest read 9 words, 3 not from where they should be:",
        "- 0x1000-0x1007 has no memory instead of pc.ram @0x1000",
        "- 0x2000-0x2007 has pc.ram @0x1000 instead of no memory",
        "- 0x3000-0x3007 has unknown memory instead of pc.ram @0x1000",
        "lab: KVM's slot 0 at 0x0+0x1000 has no dirty log",
    ):
        assert said in text


def test_many_differences_are_told_in_part() -> None:
    many = [MirrorDifference(n << 16, (n << 16) + 4096, RAM, None) for n in range(30)]
    text = words(mirror_record(replaced(REPORT, differences=many), "model"))
    assert text.count(" instead of ") == 8
    assert "- and 22 more" in text


def test_a_mirror_that_was_not_compared() -> None:
    record = mirror_record(replaced(REPORT, checks=0, compared=False), "model")
    assert not record.compared
    assert "not compared with the guest's map at the end" in words(record)


@given(
    st.integers(48, 120),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=300),
    st.integers(0, 1 << 62),
)
def test_no_line_is_wider_than_it_may_be(width: int, text: str, number: int) -> None:
    """Whatever a guest calls its memory."""
    shown = MemoryShown(text, text, number, readonly=True)
    report = replaced(
        REPORT,
        why_not=text,
        operations=number,
        updates=MirrorTimes(1, number, number),
        differences=[MirrorDifference(0, number + 1, shown, None)],
        notes=[text],
    )
    lab = replaced(LAB, vcpus=1, slot_ioctls=number)
    assert max(
        len(line) for line in mirror_lines(mirror_record(report, "kvm", lab), width=width)
    ) <= (width)


@pytest.mark.parametrize("lab", [None, LAB])
def test_the_record_is_read_back(tmp_path: Path, lab: LabMirror | None) -> None:
    header = Header(
        tool_version="0",
        monotonic_ns=1,
        realtime_ns=2,
        host_kernel="6",
        target="x",
        qemu_version=None,
        machine=None,
        accel=None,
        guest_name=None,
        pid=None,
        source="x",
    )
    report = replaced(REPORT, differences=[MirrorDifference(0, 4096, RAM, BIOS)])
    record = mirror_record(report, "kvm" if lab else "model", lab)
    path = str(tmp_path / "r.jsonl")
    with RecordingWriter(path, header) as writer:
        writer.write(record)
    read = Recording(path)
    assert list(read) == [record]
    assert read.skipped == 0
