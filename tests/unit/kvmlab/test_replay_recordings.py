"""Recordings of ours, by example: the map tells what is behind slots, operations tell the rest."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from qmp_memlistener.errors import InputError, RecordingError
from qmp_memlistener.kvmlab.replay.read import HostBlock, ReplayInput, read_replay
from qmp_memlistener.memslots import LOG_DIRTY_PAGES, READONLY, OpKind, Order, Slot
from qmp_memlistener.records import (
    Lost,
    MapRecord,
    Record,
    RecordingWriter,
    Section,
    SlotOp,
    TransitionRecord,
)
from qmp_memlistener.topology import Kind
from tests.support.records import HEADER, transition
from tests.unit.kvmlab.replay_rendering import check, planned

MIB = 1 << 20
RAM, ROM, DIMM = 0x7F00_0000_0000, 0x7F10_0000_0000, 0x7F20_0000_0000


def ram(start: int, size: int, name: str = "pc.ram", offset: int | None = None) -> Section:
    at = start if offset is None else offset
    return Section(start, size, Kind.RAM, name, at, f"/objects/{name}", memslot=True)


def rom(start: int, size: int) -> Section:
    return Section(start, size, Kind.ROM, "pc.rom", 0, None, memslot=True)


MAP = MapRecord(
    t_ns=1,
    address_space="memory",
    ranges=[
        ram(0, 0xA0000),
        Section(0xA0000, 0x20000, Kind.IO, "vga-lowmem", 0, None, memslot=False),
        rom(0xC0000, 0x20000),
        ram(0xE0000, 15 * MIB),
    ],
    ram_blocks=[],
)


def change(seq: int, removed: list[Section], added: list[Section]) -> TransitionRecord:
    base = transition(seq, seq * 10)
    return msgspec.structs.replace(base, removed=removed, added=added)


def op(
    seq: int | None,
    what: str,
    slot: int,
    gpa: int,
    size: int,
    hva: int | None,
    flags: int = 0,
    **more: int,
) -> SlotOp:
    return SlotOp(
        t_ns=(seq or 0) * 10,
        as_id=more.get("as_id", 0),
        slot=slot,
        op=OpKind(what),
        gpa=gpa,
        size=size,
        flags=flags,
        ret=more.get("ret", 0),
        predicted=hva is None,
        transition=seq,
        hva=hva,
    )


PAM = (
    change(1, [ram(0xE0000, 15 * MIB)], [ram(0xE0000, 0x10000), ram(0xF0000, 15 * MIB - 0x10000)]),
    op(1, "delete", 2, 0xE0000, 15 * MIB, RAM + 0xE0000),
    op(1, "add", 2, 0xE0000, 0x10000, RAM + 0xE0000),
    op(1, "add", 3, 0xF0000, 15 * MIB - 0x10000, RAM + 0xF0000),
)


def write(tmp_path: Path, *records: Record, version: str | None = "10.0.2") -> str:
    path = tmp_path / "r.jsonl"
    path.unlink(missing_ok=True)
    header = msgspec.structs.replace(HEADER, qemu_version=version)
    with RecordingWriter(str(path), header) as writer:
        for record in records:
            writer.write(record)
    return str(path)


def read(tmp_path: Path, *records: Record) -> ReplayInput:
    found = read_replay(write(tmp_path, *records))
    check(found)
    return found


def test_the_map_tells_the_slots_before_the_first_operation(tmp_path: Path) -> None:
    found = read(tmp_path, MAP, *PAM)
    owner = "/objects/pc.ram"
    assert (found.kind, found.qemu_version, found.rules.order) == (
        "recording", "10.0.2", Order.V8_0,
    )  # fmt: skip
    assert found.blocks == (
        HostBlock("pc.ram", owner, 0xE0000 + 15 * MIB),
        HostBlock("pc.rom", None, 0x20000),
    )
    # the first two are never named: 0 and 1 must be in use, because 3 was given out
    assert list(found.initial) == [
        Slot(0, 0, 0, 0xA0000, 0, "pc.ram", owner, 0),
        Slot(0, 1, 0xC0000, 0x20000, READONLY, "pc.rom", None, 0),
        Slot(0, 2, 0xE0000, 15 * MIB, 0, "pc.ram", owner, 0xE0000),
    ]
    (t,) = found.transitions
    assert t.seq == 1
    assert planned(found, t).ops == t.ops
    assert found.notes == ("slots that were there before the first operation: 3",)


def test_ids_of_slots_that_are_never_named_are_those_of_no_operation(tmp_path: Path) -> None:
    found = read(tmp_path, MAP, op(None, "flags", 0, 0xC0000, 0x20000, ROM, READONLY))
    assert [(s.gpa, s.slot) for s in found.initial] == [(0, 1), (0xC0000, 0), (0xE0000, 2)]


def test_dirty_logging_has_no_number(tmp_path: Path) -> None:
    """And it was off before it was switched on, whatever the map made us think."""
    on = op(None, "flags", 2, 0xE0000, 15 * MIB, RAM + 0xE0000, LOG_DIRTY_PAGES)
    off = op(None, "flags", 2, 0xE0000, 15 * MIB, RAM + 0xE0000)
    found = read(tmp_path, MAP, off, on, off, *PAM)
    assert [(t.seq, [str(o.op) for o in t.ops]) for t in found.transitions] == [
        (0, ["flags"]),
        (0, ["flags"]),
        (0, ["flags"]),
        (1, ["delete", "add", "add"]),
    ]
    first = found.initial.get(0, 2)
    assert first is not None
    assert first.flags == LOG_DIRTY_PAGES


def test_host_addresses_find_the_block_that_the_map_names_elsewhere(tmp_path: Path) -> None:
    """An operation on a known range tells where pc.ram is; another shows a part not in the map."""
    alias = op(2, "add", 0, 1 << 32, 0x20000, RAM + 0xC0000, as_id=1)
    found = read(tmp_path, MAP, *PAM, change(2, [], []), alias)
    slot = found.transitions[-1].after.get(1, 0)
    assert slot is not None
    assert (slot.block, slot.offset) == ("pc.ram", 0xC0000)
    assert len(found.blocks) == 2


def test_memory_of_no_known_block_is_a_run_of_addresses(tmp_path: Path) -> None:
    """A slot that came and went before a snapshot could name it."""
    unknown = ram(1 << 32, MIB, "RAM of slot 3", 0)
    found = read(
        tmp_path,
        MAP,
        change(1, [], [unknown]),
        op(1, "add", 3, 1 << 32, MIB, DIMM),
        change(2, [unknown], []),
        op(2, "delete", 3, 1 << 32, MIB, DIMM),
    )
    assert [(b.name, b.size) for b in found.blocks][-1] == ("ram0", MIB)
    assert [t.seq for t in found.transitions] == [1, 2]


def test_a_name_that_is_used_again_is_another_block(tmp_path: Path) -> None:
    """A DIMM goes, and another with the same backend's name comes at another host address."""

    def dimm(seq: int, hva: int) -> tuple[Record, ...]:
        section = ram(1 << 32, MIB, "m0", 0)
        return (
            change(seq, [], [section]),
            op(seq, "add", 3, 1 << 32, MIB, hva),
            change(seq + 1, [section], []),
            op(seq + 1, "delete", 3, 1 << 32, MIB, hva),
        )

    found = read(tmp_path, MAP, *dimm(1, DIMM), *dimm(3, DIMM + 64 * MIB), *dimm(5, DIMM))
    assert [b.name for b in found.blocks][-2:] == ["m0", "m0#2"]
    backing = [t.slots[0].block for t in found.transitions]
    assert backing == ["m0", "m0", "m0#2", "m0#2", "m0", "m0"]


def test_two_blocks_at_one_host_address_at_different_times(tmp_path: Path) -> None:
    one, two = ram(1 << 32, MIB, "m0", 0), ram(1 << 32, MIB, "m1", 0)
    found = read(
        tmp_path,
        MAP,
        change(1, [], [one]),
        op(1, "add", 3, 1 << 32, MIB, DIMM),
        change(2, [one], []),
        op(2, "delete", 3, 1 << 32, MIB, DIMM),
        change(3, [], [two]),
        op(3, "add", 3, 1 << 32, MIB, DIMM),
    )
    assert [t.slots[0].block for t in found.transitions] == ["m0", "m0", "m1"]


def test_memory_that_is_freed_leaves_its_address_to_other_memory(tmp_path: Path) -> None:
    """The map names one DIMM; another one that nobody named lies where that was."""
    section = ram(1 << 32, 4 * MIB, "m0", 0)
    first = (
        change(1, [], [section]),
        op(1, "add", 3, 1 << 32, 4 * MIB, DIMM),
        change(2, [section], []),
        op(2, "delete", 3, 1 << 32, 4 * MIB, DIMM),
    )
    for size, at, blocks in (
        (MIB, 3 * MIB, ["m0", "m0", "ram0"]),  # part of it, when it was gone
        (8 * MIB, 0, ["m0", "m0", "ram0"]),  # more than it
        (4 * MIB, 0, ["m0", "m0", "m0"]),  # all of it: may as well be the same again
    ):
        second = op(3, "add", 3, 1 << 33, size, DIMM + at)
        found = read(tmp_path, MAP, *first, change(3, [], []), second)
        assert [t.slots[0].block for t in found.transitions] == blocks


def test_predicted_operations_have_the_maps_blocks(tmp_path: Path) -> None:
    """Of a guest under TCG, or polled: no host address anywhere."""
    predicted = [msgspec.structs.replace(r, hva=None, predicted=True) for r in PAM[1:]]
    smram = op(1, "add", 0, 0, 0xA0000, None, as_id=1)
    found = read(tmp_path, MAP, PAM[0], *predicted, smram)
    assert [b.name for b in found.blocks] == ["pc.ram", "pc.rom"]
    assert [s.offset for s in found.transitions[0].slots] == [0xE0000, 0xE0000, 0xF0000, 0]
    assert found.notes[0] == "the operations are predicted: the guest's own were not seen"
    strange = op(1, "add", 1, 1 << 40, MIB, None, as_id=1)
    found = read(tmp_path, MAP, PAM[0], *predicted, strange)
    assert found.blocks[-1].name == "address space 1"


def test_slots_of_smm_from_before_have_the_size_that_the_recorder_knew(tmp_path: Path) -> None:
    gone = op(1, "delete", 4, 0, 0x80000, RAM, as_id=1)
    found = read(tmp_path, MAP, change(1, [], []), gone)
    assert found.initial.slots(1) == [Slot(1, 4, 0, 0x80000, 0, "ram0", None, 0)]


def test_what_the_recorder_lost_is_put_in(tmp_path: Path) -> None:
    found = read(tmp_path, MAP, Lost(t_ns=5, what="lines"), PAM[0], *PAM[2:])
    (t,) = found.transitions
    assert [op.op for op in t.ops] == ["delete", "add", "add"]
    assert any(note.startswith("the deletion of a slot is missing") for note in found.notes)
    assert [s.gpa for s in t.after] == [0, 0xC0000, 0xE0000, 0xF0000]
    assert "operations may be missing: the recorder lost something" in found.notes


def test_refusals_are_kept(tmp_path: Path) -> None:
    refused = op(2, "add", 4, 0x1000, MIB, DIMM, ret=-17)
    found = read(tmp_path, MAP, *PAM, change(2, [], []), refused)
    assert found.transitions[1].rets == (-17,)
    assert found.transitions[1].before == found.transitions[1].after


def test_a_second_map_begins_anew(tmp_path: Path) -> None:
    found = read(tmp_path, MAP, *PAM, msgspec.structs.replace(MAP, ranges=[]))
    assert any("started again" in note for note in found.notes)
    assert len(found.transitions) == 1


def test_other_versions(tmp_path: Path) -> None:
    for version, order in (("7.2.22", Order.V7_2), ("11.1.3", Order.V8_0), (None, Order.V8_0)):
        found = read_replay(write(tmp_path, MAP, *PAM, version=version))
        assert (found.qemu_version, found.rules.order) == (version, order)
    assert "8.0 or later is assumed" in found.notes[0]
    assert read_replay(write(tmp_path, MAP, *PAM, version="x")).rules.order is Order.V8_0


def test_a_last_line_that_is_cut_off(tmp_path: Path) -> None:
    path = Path(write(tmp_path, MAP, *PAM))
    path.write_bytes(path.read_bytes()[:-5])
    found = read_replay(str(path))
    assert len(found.transitions[0].ops) == 2
    assert "the last line is cut off" in found.notes


def test_a_recording_in_which_nothing_happened(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="no slot operations") as caught:
        read_replay(write(tmp_path, MAP, transition(1, 10)))
    assert caught.value.exit_code == 2
    assert caught.value.remedy is not None


@pytest.mark.parametrize(
    "record",
    [
        msgspec.structs.replace(op(1, "add", 2, 0xE0000, MIB, RAM), op="toggle"),
        op(1, "park", 2, 0xE0000, MIB, RAM),
        op(1, "add", 2, 0xE0000, 0, RAM),
        op(1, "add", -1, 0xE0000, MIB, RAM),
        op(1, "add", 2, -4096, MIB, RAM),
        op(1, "add", 2, 0, MIB, -1),
        op(1, "delete", 1 << 16, 0, MIB, RAM),
        change(1, [], [ram(-4096, 4096)]),
        change(1, [], [ram(0, 0)]),
        change(1, [], [ram((1 << 63), 1 << 63), ram(1 << 63, 1 << 64)]),
        change(1, [], [ram(0, 4096, offset=-1)]),
        msgspec.structs.replace(MAP, ranges=[ram(0, MIB), ram(0x1000, MIB)]),
        msgspec.structs.replace(MAP, ranges=[ram(0, MIB, offset=0x123)]),
        msgspec.structs.replace(MAP, ranges=[msgspec.structs.replace(ram(0, MIB), kind="flying")]),
    ],
)
def test_records_of_no_guest_are_refused(tmp_path: Path, record: Record) -> None:
    first = () if isinstance(record, MapRecord) else (MAP,)
    with pytest.raises(InputError) as caught:
        read_replay(write(tmp_path, *first, record, *PAM))
    assert caught.value.exit_code == 2
    assert caught.value.remedy is not None
