"""Logs that begin in a guest's life, or have lost lines: what is put together, and how."""

from __future__ import annotations

from pathlib import Path

from qmp_memlistener.memslots import LOG_DIRTY_PAGES, READONLY, Op, OpKind, Slot
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
from tests.unit.kvmlab.replay_rendering import planned


def test_a_slot_from_before_is_as_large_as_what_takes_its_place(tmp_path: Path) -> None:
    found = read(tmp_path, *PAM)
    assert list(found.initial) == [Slot(0, 2, 0xE0000, 15 * MIB, 0, "ram0", None, 0)]
    assert found.notes == (
        "slots that were there from the start, at unknown places: 2",
        "slots that were there before the first operation: 1 (sizes guessed: 1)",
    )


def test_a_slot_from_before_spans_the_hole_that_is_punched(tmp_path: Path) -> None:
    """Two parts of the same memory come, with other memory between: it was one slot."""
    found = read(
        tmp_path,
        delete(0, 0, RAM),
        add(0, 0, 0xC0000, RAM),
        add(3, 0xC0000, 0x20000, ROM, READONLY),
        add(4, 0xE0000, MIB, RAM + 0xE0000),
    )
    assert [(s.gpa, s.size, s.flags) for s in found.initial] == [(0, 0xE0000 + MIB, 0)]


def test_guesses_never_overlap(tmp_path: Path) -> None:
    """Three slots become one: the first two end where the next begins."""
    found = read(
        tmp_path,
        delete(0, 0, RAM),
        delete(7, 0xC0000, ROM),
        delete(5, 0xE0000, RAM + 0xE0000),
        add(0, 0, MIB, RAM),
    )
    assert [(s.slot, s.gpa, s.size) for s in found.initial] == [
        (0, 0, 0xC0000),
        (7, 0xC0000, 0x20000),
        (5, 0xE0000, MIB - 0xE0000),
    ]


def test_a_slot_that_never_comes_again_has_a_modest_size(tmp_path: Path) -> None:
    found = read(tmp_path, delete(3, 1 << 32, VGA), delete(4, (1 << 32) + 0x3000, ROM))
    assert [(s.gpa, s.size) for s in found.initial] == [
        (1 << 32, 0x3000),
        ((1 << 32) + 0x3000, 2 * MIB),
    ]


def test_memory_that_moves_keeps_its_size(tmp_path: Path) -> None:
    """A BAR is unmapped, and mapped elsewhere in another commit."""
    found = read(tmp_path, view(), delete(3, 0xE0000000, VGA), view(), add(3, 0xD0000000, MIB, VGA))
    assert [(s.gpa, s.size) for s in found.initial] == [(0xE0000000, MIB)]
    assert len(found.blocks) == 1


def test_logging_of_a_slot_from_before(tmp_path: Path) -> None:
    """A migration begins: every line looks like an add, and none is."""
    text = [
        add(0, 0, 0xA0000, RAM, LOG_DIRTY_PAGES),
        add(7, 0xC0000, 0x20000, ROM, LOG_DIRTY_PAGES | READONLY),
        add(3, 0xE0000, MIB, RAM + 0xE0000, LOG_DIRTY_PAGES),
    ]
    found = read(tmp_path, *text)
    assert [(s.slot, s.flags) for s in found.initial] == [(0, 0), (7, READONLY), (3, 0)]
    (t,) = found.transitions
    assert {op.op for op in t.ops} == {OpKind.FLAGS}
    assert planned(found, t).ops == t.ops


def test_a_dimm_that_is_plugged_while_ram_is_logged_is_no_slot_from_before(tmp_path: Path) -> None:
    """Its slot comes without logging, which is switched on after: at its place, not above it."""
    dimm = (1 << 32, 128 * MIB, VGA)
    found = read(tmp_path, add(4, *dimm), add(4, *dimm, LOG_DIRTY_PAGES))
    assert list(found.initial) == []
    assert [op.op for t in found.transitions for op in t.ops] == [OpKind.ADD, OpKind.FLAGS]


def test_slots_that_are_added_logged_after_deletes_were_not_there(tmp_path: Path) -> None:
    """Though one among them is not logged, or the deletion of their ids is before the log."""
    logged = [add(i, i * MIB, MIB, VGA + i * MIB, LOG_DIRTY_PAGES) for i in range(1, 5)]
    plain = add(2, 2 * MIB, MIB, RAM + 2 * MIB)
    one = read(tmp_path, view(), delete(1, MIB, RAM + MIB), logged[0], plain, *logged[2:])
    assert [(s.slot, s.gpa) for s in one.initial] == [(1, MIB)]
    cut = read(tmp_path, delete(7, 16 * MIB, RAM), *logged, view(), delete(1, MIB, VGA + MIB))
    assert [(s.slot, s.gpa) for s in cut.initial] == [(7, 16 * MIB)]


def test_an_id_below_one_that_was_given_out_is_in_use(tmp_path: Path) -> None:
    """QEMU takes the lowest free id, so slot 1 was there when slot 2 came."""
    found = read(
        tmp_path,
        delete(0, 0, RAM),
        add(0, 0, 0x1000, RAM),
        add(2, 0x2000, 0x1000, RAM + 0x2000),
        add(1, 1 << 32, MIB, VGA),
    )
    assert [(s.slot, s.gpa, s.flags) for s in found.initial] == [
        (0, 0, 0),
        (1, 1 << 32, LOG_DIRTY_PAGES),
    ]
    assert found.transitions[-1].ops[-1].op is OpKind.FLAGS


def test_deletions_that_are_missing_are_put_in(tmp_path: Path) -> None:
    found = read(tmp_path, *BOOT, *PAM[1:])
    assert shape(found)[1:] == [
        [
            ("delete", 2, 0xE0000, 15 * MIB),
            ("add", 2, 0xE0000, 0x10000),
            ("add", 3, 0xF0000, 15 * MIB - 0x10000),
        ],
    ]
    assert found.notes == ("the deletion of a slot is missing and was put in (line 4)",)


def test_an_id_that_is_set_elsewhere_was_deleted(tmp_path: Path) -> None:
    found = read(tmp_path, *BOOT, add(1, 1 << 32, MIB, VGA))
    assert shape(found)[1:] == [[("delete", 1, 0xC0000, 0x20000), ("add", 1, 1 << 32, MIB)]]


def test_other_memory_under_the_same_id_and_address(tmp_path: Path) -> None:
    """No flags change: KVM would refuse to move a live slot to another host address."""
    found = read(tmp_path, *BOOT, add(1, 0xC0000, 0x20000, VGA))
    assert [op.op for op in found.transitions[1].ops] == ["delete", "add"]
    assert found.notes == ("the deletion of a slot is missing and was put in (line 4)",)


def test_a_delete_that_fits_nothing(tmp_path: Path) -> None:
    found = read(tmp_path, *BOOT, delete(9, 0x1000, RAM), *PAM, delete(2, 0x5000000, ROM))
    assert [len(t.ops) for t in found.transitions] == [3, 3, 1]
    assert found.transitions[-1].ops[0] == Op(OpKind.DELETE, 0, 2, 0xE0000, 0x10000)
    assert found.notes == (
        "a slot is deleted that cannot be there: left out (line 4)",
        "a slot is deleted elsewhere than it is: lines are missing (line 8)",
    )


def test_a_refused_operation_says_nothing_about_an_id(tmp_path: Path) -> None:
    refused = delete(2, 0xE0000, RAM + 0xE0000).replace("ret=0", "ret=-12")
    found = read(tmp_path, refused, *PAM)
    assert [(s.slot, s.size) for s in found.initial] == [(2, 15 * MIB)]
    assert [t.rets for t in found.transitions] == [(-12,), (0, 0, 0)]
