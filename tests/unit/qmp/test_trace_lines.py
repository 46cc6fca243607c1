"""Trace lines of every supported QEMU become the same records, in order, in any pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.memslots import OpKind
from qmp_memlistener.qmp import (
    BarMapping,
    FlatViewChange,
    FlatViewEvent,
    HmpCommand,
    MemoryDeviceChange,
    MemoryDeviceEvent,
    RunStateChange,
    SlotFailure,
    TraceDecoder,
    TraceRecord,
    VirtioMemEvent,
    VmStateChange,
)
from qmp_memlistener.qmp.trace_lines import MAX_LINE, STAMP_BOUND_NS, new_marker
from qmp_memlistener.records import SlotOp

T = 1_000


def decode(text: str) -> list[TraceRecord]:
    return TraceDecoder().feed(text.encode() + b"\n", T)


SLOT_7_2 = "kvm_set_user_memory Slot#5 flags=0x1 gpa=0x100000 size=0x7ff00000 ua=0x7f00 ret=0"
SLOT_8_2 = (
    "kvm_set_user_memory AddrSpace#0 Slot#5 flags=0x1 gpa=0x100000 size=0x7ff00000 ua=0x7f00 ret=0"
)
SLOT_9_1 = (
    "kvm_set_user_memory AddrSpace#0 Slot#5 flags=0x1 gpa=0x100000 size=0x7ff00000 ua=0x7f00 "
    "guest_memfd=-1 guest_memfd_offset=0x0 ret=0"
)
FAILED_9_1 = (
    "qemu-system-x86_64: kvm_set_user_memory_region: KVM_SET_USER_MEMORY_REGION2 failed, slot=3, "
    "start=0xe0000000, size=0x1000, flags=0x4, guest_memfd=9, guest_memfd_offset=0x0: File exists"
)
SLOT = SlotOp(
    t_ns=T, as_id=0, slot=5, op=OpKind.ADD, gpa=0x100000, size=0x7FF00000, flags=1, hva=0x7F00
)


@pytest.mark.parametrize("line", [SLOT_7_2, SLOT_8_2, SLOT_9_1])
def test_slot_operation_of_each_version(line: str) -> None:
    assert decode(line) == [SLOT]


def test_address_space_comes_from_the_upper_half_of_the_slot_in_old_versions() -> None:
    (op,) = decode(
        f"kvm_set_user_memory Slot#{1 << 16 | 3} flags=0x0 gpa=0x0 size=0x0 ua=0x0 ret=0"
    )
    assert isinstance(op, SlotOp)
    assert (op.as_id, op.slot, op.op) == (1, 3, OpKind.DELETE)
    # A slot in the highest address spaces is printed as a negative %d.
    (op,) = decode("kvm_set_user_memory Slot#-65533 flags=0x0 gpa=0x0 size=0x1 ua=0x0 ret=0")
    assert isinstance(op, SlotOp)
    assert (op.as_id, op.slot, op.op) == (0xFFFF, 3, OpKind.ADD)


def test_failed_and_confidential_slots() -> None:
    (op,) = decode(
        "kvm_set_user_memory AddrSpace#1 Slot#2 flags=0x4 gpa=0xffffffffffff0000 "
        "size=0x10000 ua=0x7fffffffffff guest_memfd=9 guest_memfd_offset=0x2000 ret=-22"
    )
    assert op == SlotOp(
        t_ns=T, as_id=1, slot=2, op=OpKind.ADD, gpa=0xFFFFFFFFFFFF0000, size=0x10000, flags=4,
        ret=-22, hva=0x7FFFFFFFFFFF,
    )  # fmt: skip


STAMPS = [
    ("", None),
    ("4711@1700000000.000042:", 1_700_000_000_000_042_000),
    ("2023-11-14T22:13:20.000042Z ", 1_700_000_000_000_042_000),
    ("2023-11-14T22:13:20Z ", 1_700_000_000_000_000_000),
]

OTHERS: list[tuple[str, TraceRecord]] = [
    (
        "flatview_new 0x55d0e0a0b0c0 (root 0x55d0e0a0b0d0)",
        FlatViewEvent(T, FlatViewChange.NEW, 0x55D0E0A0B0C0, 0x55D0E0A0B0D0),
    ),
    (
        "flatview_destroy 0x1 (root (nil))",
        FlatViewEvent(T, FlatViewChange.DESTROY, 1, 0),
    ),
    (
        "flatview_destroy_rcu 0x1 (root 0x2)",
        FlatViewEvent(T, FlatViewChange.DESTROY_RCU, 1, 2),
    ),
    (
        "pci_update_mappings_add virtio-net-pci 00:03.0 4,0xfe000000+0x4000",
        BarMapping(T, True, "virtio-net-pci", 0, 3, 0, 4, 0xFE000000, 0x4000),
    ),
    (
        "pci_update_mappings_del ivshmem-plain ff:1f.7 2,0x380000000000+0x1000000",
        BarMapping(T, False, "ivshmem-plain", 0xFF, 0x1F, 7, 2, 0x380000000000, 0x1000000),
    ),
    (
        "memory_device_pre_plug id=d0 addr=0x0",
        MemoryDeviceEvent(T, MemoryDeviceChange.PRE_PLUG, "d0", 0),
    ),
    (
        "memory_device_plug id=my dimm addr=0x3 addr=0x100000000",
        MemoryDeviceEvent(T, MemoryDeviceChange.PLUG, "my dimm addr=0x3", 0x100000000),
    ),
    (
        "memory_device_unplug id= addr=0x100000000",
        MemoryDeviceEvent(T, MemoryDeviceChange.UNPLUG, None, 0x100000000),
    ),
    (
        "virtio_mem_plug_request addr=0x140000000 nb_blocks=64",
        VirtioMemEvent(T, "plug_request", 0x140000000, 64),
    ),
    (
        "virtio_mem_resized_usable_region old_size=0x0new_size=0x10000000",
        VirtioMemEvent(T, "resized_usable_region", old_size=0, new_size=0x10000000),
    ),
    ("virtio_mem_unplugged_all ", VirtioMemEvent(T, "unplugged_all")),
    ("virtio_mem_unplug_all_request ", VirtioMemEvent(T, "unplug_all_request")),
    ("virtio_mem_send_response type=1", VirtioMemEvent(T, "send_response", value=1)),
    ("virtio_mem_state_response state=2", VirtioMemEvent(T, "state_response", value=2)),
    (
        "runstate_set current_run_state 6 (prelaunch) new_state 9 (running)",
        RunStateChange(T, "prelaunch", "running"),
    ),
    (
        "vm_state_notify running 0 reason 4 (paused)",
        VmStateChange(T, False, "paused"),
    ),
    (
        "vm_state_notify running 1 reason 9 (running)",
        VmStateChange(T, True, "running"),
    ),
    (
        "handle_hmp_command mon 0x7ffc cmdline: info mtree -o",
        HmpCommand(T, "info mtree -o"),
    ),
    (
        "handle_hmp_command mon 0x7ffc cmdline: print 0x1234",
        HmpCommand(T, "print 0x1234"),
    ),
    (
        "qemu: KVM_SET_USER_MEMORY_REGION failed, slot=3, start=0xe0000000, size=0x1000: Invalid",
        SlotFailure(T, 3, 0xE0000000, 0x1000, "Invalid"),
    ),
    (
        FAILED_9_1,
        SlotFailure(T, 3, 0xE0000000, 0x1000, "File exists"),
    ),
]


@pytest.mark.parametrize(("line", "record"), OTHERS)
def test_other_events(line: str, record: TraceRecord) -> None:
    assert decode(line) == [record]


@pytest.mark.parametrize(("prefix", "stamp_ns"), STAMPS)
@pytest.mark.parametrize("line", [SLOT_7_2, SLOT_9_1, *(text for text, _ in OTHERS)])
def test_time_stamps_of_both_forms(prefix: str, stamp_ns: int | None, line: str) -> None:
    """The time is QEMU's own, on our clock, and never outside of when the line can have come."""
    read_ns, skew_ns = 1 << 62, 5_000
    text = f"{prefix}{line}\n".encode()
    (record,) = TraceDecoder().feed(text, read_ns, skew_ns=skew_ns)
    assert record.t_ns == (read_ns if stamp_ns is None else stamp_ns - skew_ns)
    if stamp_ns is not None:
        (record,) = TraceDecoder().feed(text, read_ns, since_ns=stamp_ns, skew_ns=skew_ns)
        assert record.t_ns == stamp_ns
        (record,) = TraceDecoder().feed(text, T)
        assert record.t_ns == T


@pytest.mark.parametrize(("prefix", "stamp_ns"), STAMPS)
@pytest.mark.parametrize("line", [SLOT_9_1, "flatview_new 0x55d0 (root 0x55e0)"])
def test_lines_that_were_read_late_say_so_and_stamped_ones_need_not(
    prefix: str, stamp_ns: int | None, line: str
) -> None:
    for late_ns in (STAMP_BOUND_NS, STAMP_BOUND_NS + 1):
        (record,) = TraceDecoder().feed(f"{prefix}{line}\n".encode(), T, late_ns=late_ns)
        assert isinstance(record, SlotOp | FlatViewEvent)
        late = stamp_ns is None and late_ns > STAMP_BOUND_NS
        assert record.late_ns == (late_ns if late else None)


def test_a_date_that_does_not_exist_gives_no_stamp() -> None:
    (record,) = decode(f"2023-13-45T99:00:00Z {SLOT_9_1}")
    assert record == SLOT


def test_stamped_lines_in_an_unstamped_log_and_the_reverse() -> None:
    tid, iso = STAMPS[1][0], STAMPS[2][0]
    runstate = "runstate_set current_run_state 4 (paused) new_state 9 (running)"
    lines = [SLOT_7_2, tid + SLOT_7_2, iso + runstate, SLOT_9_1, runstate]
    one_by_one = TraceDecoder()
    read_ns = 1 << 62
    records = [r for line in lines for r in one_by_one.feed(f"{line}\n".encode(), read_ns)]
    assert [type(r) for r in records] == [SlotOp, SlotOp, RunStateChange, SlotOp, RunStateChange]
    assert [r.t_ns < read_ns for r in records] == [False, True, True, False, False]
    together = TraceDecoder()
    assert together.feed("\n".join(lines).encode() + b"\n", read_ns) == records
    assert (together.lines, together.unknown) == (5, 0)


def test_marker() -> None:
    number = new_marker()
    (record,) = decode(f"handle_hmp_command mon 0x7ffc cmdline: print {number:#x}")
    assert isinstance(record, HmpCommand)
    assert record.marker == number
    assert new_marker() != number


STREAM = (
    "\n".join(
        [
            SLOT_7_2,
            "noise",
            *(line for line, _ in OTHERS),
            SLOT_9_1,
            "",
            "kvm_set_user_memory Slot#",
        ]
    ).encode()
    + b"\n"
)
WHOLE = TraceDecoder().feed(STREAM, T)


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_pieces_make_no_difference(cuts: list[int]) -> None:
    decoder = TraceDecoder()
    records: list[TraceRecord] = []
    edges = [0, *sorted(cuts), len(STREAM)]
    for start, end in pairwise(edges):
        records += decoder.feed(STREAM[start:end], T)
    assert records == WHOLE
    assert decoder.pending == 0
    assert decoder.lines == STREAM.count(b"\n")
    assert decoder.unknown == 3


def test_an_incomplete_line_waits_and_can_be_forgotten() -> None:
    decoder = TraceDecoder()
    assert decoder.feed(SLOT_7_2.encode(), T) == []
    assert decoder.pending == len(SLOT_7_2)
    decoder.reset()
    assert decoder.feed(b"\n", T) == []
    assert decoder.feed(SLOT_7_2.encode() + b"\n", T) == [SLOT]


def test_endless_lines_are_dropped_without_being_kept() -> None:
    decoder = TraceDecoder()
    for _ in range(20):
        assert decoder.feed(b"x" * MAX_LINE, T) == []
        assert decoder.pending <= MAX_LINE
    assert decoder.feed(b"yy\n" + SLOT_7_2.encode() + b"\n", T) == [SLOT]
    assert decoder.overlong == 1


@pytest.mark.parametrize(
    "line",
    [
        "kvm_set_user_memory",
        SLOT_7_2.replace("0x1 ", "0x1"),
        SLOT_7_2.replace("ret=0", "ret="),
        SLOT_7_2.replace("0x100000", "0x" + "f" * 17),
        SLOT_7_2 + " ",
        " " + SLOT_7_2,
        "x" + SLOT_7_2,
        "flatview_newer 0x1 (root 0x2)",
        "memory_device_plug id=d0",
        "vm_state_notify running 1",
        "9" * 5000,
        "\x00\x01",
    ],
)
def test_lines_that_are_not_ours_are_counted(line: str) -> None:
    decoder = TraceDecoder()
    assert decoder.feed(line.encode() + b"\n", T) == []
    assert (decoder.lines, decoder.unknown) == (1, 1)
