"""Logs of QEMU, by example: what is told, what is put together, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmp_memlistener.errors import InputError
from qmp_memlistener.kvmlab.replay import read as reading
from qmp_memlistener.kvmlab.replay.read import HostBlock, read_replay
from qmp_memlistener.memslots import (
    GUEST_MEMFD,
    LOG_DIRTY_PAGES,
    READONLY,
    LogChange,
    Op,
    OpKind,
    Order,
    Slot,
)
from qmp_memlistener.topology import Kind
from tests.unit.kvmlab.replay_lines import (
    BOOT,
    MIB,
    PAM,
    RAM,
    ROM,
    VGA,
    add,
    delete,
    read,
    shape,
    view,
)
from tests.unit.kvmlab.replay_rendering import PLAIN, SPLIT, line, planned


def test_a_boot_and_a_pam_write(tmp_path: Path) -> None:
    found = read(tmp_path, *BOOT, *PAM)
    assert (found.kind, found.qemu_version, found.notes) == ("log", None, ())
    assert found.rules.order is Order.V8_0
    assert shape(found) == [
        [("add", 0, 0, 0xA0000), ("add", 1, 0xC0000, 0x20000), ("add", 2, 0xE0000, 15 * MIB)],
        [
            ("delete", 2, 0xE0000, 15 * MIB),
            ("add", 2, 0xE0000, 0x10000),
            ("add", 3, 0xF0000, 15 * MIB - 0x10000),
        ],
    ]
    assert found.blocks == (
        HostBlock("ram0", None, 0xE0000 + 15 * MIB),  # one block, with the hole that VGA is in
        HostBlock("ram1", None, 0x20000),
    )
    boot, pam = found.transitions
    assert (boot.seq, boot.rets, boot.log) == (1, (0,) * 3, None)
    assert pam.slots == (
        Slot(0, 2, 0xE0000, 15 * MIB, 0, "ram0", None, 0xE0000),
        Slot(0, 2, 0xE0000, 0x10000, 0, "ram0", None, 0xE0000),
        Slot(0, 3, 0xF0000, 15 * MIB - 0x10000, 0, "ram0", None, 0xF0000),
    )
    (memory,) = boot.view_after.values()
    assert memory.address_space == "memory"
    assert [r.kind for r in memory] == [Kind.RAM, Kind.ROM, Kind.RAM]
    assert planned(found, pam).ops == pam.ops


def test_a_slot_that_comes_back_as_it_was_is_planned_too(tmp_path: Path) -> None:
    """RAM that turns read-only behind an alias: the slot stays what it is, and is set again."""
    again = (delete(2, 0xE0000, RAM + 0xE0000), add(2, 0xE0000, 15 * MIB, RAM + 0xE0000))
    found = read(tmp_path, *BOOT, *again, *again)
    assert [len(ops) for ops in shape(found)] == [3, 2, 2]
    for t in found.transitions[1:]:
        assert t.before == t.after
        assert planned(found, t).ops == t.ops


def test_an_alias_has_the_same_memory_behind_it(tmp_path: Path) -> None:
    found = read(tmp_path, *BOOT, add(3, 0xFFFE0000, 0x20000, ROM, READONLY))
    alias = found.transitions[-1].after.get(0, 3)
    original = found.transitions[-1].after.get(0, 1)
    assert alias is not None
    assert original is not None
    assert (alias.block, alias.offset) == (original.block, original.offset) == ("ram1", 0)


def test_blocks_that_are_far_apart_are_never_one(tmp_path: Path) -> None:
    """The same distance of host address and gpa can be chance."""
    found = read(tmp_path, add(0, 0, MIB, RAM), add(1, 1 << 40, MIB, RAM + (1 << 40)))
    assert [b.size for b in found.blocks] == [MIB, MIB]


def test_addresses_that_touch_are_one_block_wherever_they_are_mapped(tmp_path: Path) -> None:
    found = read(tmp_path, add(0, 0, 16 * MIB, RAM), add(1, 1 << 32, MIB, RAM + 16 * MIB))
    assert found.blocks == (HostBlock("ram0", None, 17 * MIB),)


# -- what one line does ------------------------------------------------------------------------


def test_dirty_logging_is_a_change_of_flags(tmp_path: Path) -> None:
    on = add(0, 0, 0xA0000, RAM, LOG_DIRTY_PAGES)
    off = add(0, 0, 0xA0000, RAM)
    found = read(tmp_path, *BOOT, on, off)
    assert [[str(o.op) for o in t.ops] for t in found.transitions] == [
        ["add"] * 3,
        ["flags"],
        ["flags"],
    ]
    start, stop = found.transitions[1:]
    assert start.log == LogChange(frozenset({"ram0"}), frozenset({"ram1"}), False)
    assert stop.log == LogChange(frozenset(), frozenset({"ram0", "ram1"}), False)
    assert [s.flags for s in start.slots] == [LOG_DIRTY_PAGES]
    assert found.transitions[-1].after == found.transitions[0].after


def test_logged_video_ram_is_no_migration(tmp_path: Path) -> None:
    vga = add(3, 0xFD000000, MIB, VGA, LOG_DIRTY_PAGES)
    dimm = add(4, 1 << 32, MIB, VGA + (1 << 36))
    found = read(tmp_path, *BOOT, vga, delete(2, 0xE0000, RAM + 0xE0000), PAM[1], dimm)
    assert len(found.transitions) == 2
    for t in found.transitions:
        assert planned(found, t).ops == t.ops


def test_readonly_cannot_change_on_a_live_slot(tmp_path: Path) -> None:
    """QEMU deletes and sets it, and traces the second ioctl only."""
    found = read(tmp_path, *BOOT, add(1, 0xC0000, 0x20000, ROM))
    assert shape(found)[1:] == [
        [("delete", 1, 0xC0000, 0x20000), ("add", 1, 0xC0000, 0x20000)],
    ]
    assert found.notes == ()


def test_what_kvm_refused_is_kept_and_changes_nothing(tmp_path: Path) -> None:
    refused = (
        add(3, 0x1000, 0x1000, RAM + 0x1000).replace("ret=0", "ret=-17"),
        add(4, 1 << 32, 1 << 47, 0x123).replace("ret=0", "ret=-22"),
        delete(9, 0x5000, RAM).replace("ret=0", "ret=-22"),
        delete(0, 0, RAM).replace("ret=0", "ret=-12"),
    )
    found = read(tmp_path, *BOOT, *refused)
    ops = [op for t in found.transitions[1:] for op in t.ops]
    rets = [ret for t in found.transitions[1:] for ret in t.rets]
    backed = [slot.block for t in found.transitions[1:] for slot in t.slots]
    assert [(str(op.op), op.slot, op.size) for op in ops] == [
        ("add", 3, 0x1000),
        ("add", 4, 1 << 47),
        ("delete", 9, 0),
        ("delete", 0, 0xA0000),
    ]
    assert rets == [-17, -22, -22, -12]
    assert backed == ["ram0", None, "ram0", "ram0"]
    assert found.transitions[-1].after == found.transitions[0].after
    assert found.notes == ("KVM refused an operation (4 times, first at line 4)",)
    assert max(block.size for block in found.blocks) < 32 * MIB


def test_slots_of_smm_are_in_a_space_of_their_own(tmp_path: Path) -> None:
    smram = (add(0, 0, 0xA0000, RAM, as_id=1), add(1, 0xA0000, 0x20000, RAM + 0xA0000, as_id=1))
    close = (delete(0, 0, RAM), delete(1, 0xA0000, RAM + 0xA0000, as_id=1))
    found = read(tmp_path, *BOOT, *smram, *close)
    assert [len(t.ops) for t in found.transitions] == [5, 2]  # as 0 first, then as 1
    assert [r.size for r in found.transitions[0].view_after[1]] == [0xA0000, 0x20000]
    assert found.transitions[0].view_after[1].address_space == "KVM-SMRAM"
    assert found.notes == ("operations on another address space than `memory` (SMM's, mostly): 3",)


def test_the_address_space_may_be_in_the_slots_upper_half(tmp_path: Path) -> None:
    text = [line(Op(OpKind.ADD, 1, 5, 0, MIB), RAM, PLAIN)]
    assert "Slot#65541 " in text[0]
    found = read(tmp_path, *text)
    assert [(s.as_id, s.slot) for s in found.transitions[0].after] == [(1, 5)]
    assert found.rules.order is Order.V7_2
    assert found.notes[0] == "its lines are those of QEMU 7.2 to 9.0; 7.2 is assumed"


def test_guest_memfd_is_told(tmp_path: Path) -> None:
    found = read(tmp_path, add(0, 0, MIB, RAM, GUEST_MEMFD))
    assert found.transitions[0].ops[0].flags == GUEST_MEMFD
    assert found.notes == ("slots with a guest_memfd, whose memory is not the host's: 1",)


# -- which operations are one commit -------------------------------------------------------------


def test_a_commit_begins_with_its_views(tmp_path: Path) -> None:
    """Adds of two commits, upwards in address: only the marks tell them apart."""
    one, two, three = BOOT
    found = read(tmp_path, view(), view("0x1"), one, view(), view("0x1"), two, three)
    assert [len(t.ops) for t in found.transitions] == [1, 2]
    # a root that comes again begins a commit, and so may a BAR that is mapped
    bar = "pci_update_mappings_add virtio-net-pci 00:03.0 4,0xfe000000+0x4000"
    found = read(tmp_path, view(), view(), one, bar, two, three)
    assert [len(t.ops) for t in found.transitions] == [1, 2]


@pytest.mark.parametrize("form", [PLAIN, SPLIT])
def test_flags_are_changed_where_the_version_does_it(tmp_path: Path, form: str) -> None:
    """Among the adds up to 7.2, before all else from 8.0 on."""
    low, high = Op(OpKind.ADD, 0, 0, 0, MIB), Op(OpKind.ADD, 0, 1, 4 * MIB, MIB)
    flags = Op(OpKind.FLAGS, 0, 0, 0, MIB, LOG_DIRTY_PAGES)
    gone, back = Op(OpKind.DELETE, 0, 1, 4 * MIB), Op(OpKind.ADD, 0, 1, 4 * MIB, 2 * MIB, 1)
    commit = (gone, flags, back) if form == PLAIN else (flags, gone, back)
    hva = {0: RAM, 1: RAM + 4 * MIB}
    text = [line(op, hva[op.slot], form) for op in (low, high, *commit)]
    found = read(tmp_path, *text)
    assert [[str(o.op) for o in t.ops] for t in found.transitions] == [
        ["add", "add"],
        [str(op.op) for op in commit],
    ]
    for t in found.transitions:
        assert planned(found, t).ops == t.ops


def test_a_marked_commit_tells_8_0_from_7_2(tmp_path: Path) -> None:
    text = [line(Op(OpKind.ADD, 0, i, i * MIB, MIB), RAM + i * MIB, PLAIN) for i in range(2)]
    flags = Op(OpKind.FLAGS, 0, 1, MIB, MIB, LOG_DIRTY_PAGES)
    commit = [line(flags, RAM + MIB, PLAIN), line(Op(OpKind.DELETE, 0, 0), RAM, PLAIN)]
    found = read(tmp_path, view(), *text, view(), *commit)
    assert found.rules.order is Order.V8_0
    assert [len(t.ops) for t in found.transitions] == [2, 2]
    assert found.notes == ()
    assert read(tmp_path, *text, *commit).rules.order is Order.V7_2  # may as well be two commits


# -- files ---------------------------------------------------------------------------------------


def test_a_last_line_that_is_cut_off(tmp_path: Path) -> None:
    whole = "\n".join(BOOT)
    for end, ops in (("\n", 3), ("", 3), ("\n" + PAM[0][:30], 3), ("\r\n" + PAM[0], 4)):
        (tmp_path / "log").write_text(whole + end)
        found = read_replay(str(tmp_path / "log"))
        assert sum(len(t.ops) for t in found.transitions) == ops, end
    # -1 may be the beginning of -17
    (tmp_path / "log").write_text(whole + "\n" + PAM[0].replace("ret=0", "ret=-1"))
    found = read_replay(str(tmp_path / "log"))
    assert sum(len(t.ops) for t in found.transitions) == 3
    assert found.notes == ("a slot operation cannot be read and is left out (line 4)",)


def test_a_line_behind_much_that_is_no_line(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * 200_000 + "\n".join((*BOOT, "")).encode())
    assert sum(len(t.ops) for t in read_replay(str(tmp_path / "log")).transitions) == 3


def test_wild_values(tmp_path: Path) -> None:
    top = (1 << 64) - 0x1000
    found = read(
        tmp_path,
        add(0, top, 0x1000, RAM),
        add(1, 0, 1 << 42, 1 << 50),
        add(4, 1 << 50, 1 << 43, 1 << 50),
        add(2, top, 0x2000, RAM),
        add(3, 0x10, 0x1000, RAM),
        add(32763, 1 << 60, 0x1000, VGA),
        delete(65535, 1 << 61, RAM, as_id=65535),
        delete(1, 0, RAM, as_id=99999),
    )
    assert [s.size for s in found.transitions[-1].after] == [1 << 42, 0x1000, 0x1000]
    assert found.notes[0] == (
        "an operation that no KVM accepts is left out (4 times, first at line 3)"
    )


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no usable"),
        (b"no trace line\n\0\xff\n", "no usable"),
        (b'{"type":"map"}\n', "no usable"),
        (b"-trace kvm_set_user_memory -D x\n", "no usable"),
        (b"kvm_set_user_memory Slot#3 flags=0x0 gpa=0x10 size=0x0 ua=0x0 ret=0\n", "no usable"),
    ],
)
def test_a_file_without_operations(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(InputError, match=why) as caught:
        read_replay(str(tmp_path / "log"))
    assert caught.value.exit_code == 2
    assert "kvm_set_user_memory -D FILE" in (caught.value.remedy or "")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "not there", tmp_path / "not" / "there"):
        with pytest.raises(InputError, match="cannot be read") as caught:
            read_replay(str(path))
        assert caught.value.exit_code == 2


def test_slots_without_end_are_refused_before_memory_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MOST_ENTRIES", 80_000)
    lines = (
        f"flatview_new {0x7F00_0000 + i:#x} (root 0x1)\n{add(i, i << 21, 0x1000, RAM + (i << 21))}"
        for i in range(1000)
    )
    (tmp_path / "log").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="400 transitions of up to 400 slots") as caught:
        read_replay(str(tmp_path / "log"))
    assert "--first 399" in (caught.value.remedy or "")
    assert len(read_replay(str(tmp_path / "log"), most=399).transitions) == 399
