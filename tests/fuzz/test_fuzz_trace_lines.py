"""The trace decoder survives anything, counts every line, and finds real lines between garbage."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from qmp_memlistener.qmp import TraceDecoder
from qmp_memlistener.records import SlotOp

SLOT_9_1 = (
    b"kvm_set_user_memory AddrSpace#1 Slot#2 flags=0x0 gpa=0x0 size=0x0 ua=0x0 "
    b"guest_memfd=-1 guest_memfd_offset=0x0 ret=-22"
)
LINES = [
    SLOT_9_1,
    b"kvm_set_user_memory Slot#5 flags=0x1 gpa=0x100000 size=0x7ff00000 ua=0x7f00 ret=0",
    b"flatview_new 0x55d0e0a0b0c0 (root 0x55d0e0a0b0d0)",
    b"pci_update_mappings_add virtio-net-pci 00:03.0 4,0xfe000000+0x4000",
    b"memory_device_plug id=d0 addr=0x100000000",
    b"virtio_mem_resized_usable_region old_size=0x0new_size=0x10000000",
    b"runstate_set current_run_state 6 (prelaunch) new_state 9 (running)",
    b"vm_state_notify running 1 reason 9 (running)",
    b"handle_hmp_command mon 0x7ffc cmdline: print 0x7100000000000001",
    b"x: KVM_SET_USER_MEMORY_REGION failed, slot=3, start=0xe0, size=0x1000: Invalid argument",
]
STAMPS = [b"", b"4711@1700000000.000042:", b"2023-11-14T22:13:20.000042Z "]


def mutated(rng: random.Random) -> bytes:
    """A trace line with a few bytes cut, doubled, replaced or moved."""
    line = bytearray(rng.choice(STAMPS) + rng.choice(LINES))
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(line) + 1)
        what = rng.randrange(4)
        if what == 0:
            del line[at : at + rng.randrange(1, 9)]
        elif what == 1:
            line[at:at] = rng.randbytes(rng.randrange(1, 5))
        elif what == 2:
            line[at:at] = rng.choice(LINES)[: rng.randrange(80)]
        else:
            line[at : at + 1] = b"9" * rng.randrange(1, 30)
    return bytes(line)


@given(st.integers(0, 2**32), st.integers(1, 4096))
@settings(max_examples=150, deadline=None)
def test_mutated_lines(seed: int, piece: int) -> None:
    rng = random.Random(seed)
    data = b"\n".join(mutated(rng) for _ in range(60)) + b"\n"
    whole, pieces = TraceDecoder(), TraceDecoder()
    expected = whole.feed(data, 1)
    got = [r for i in range(0, len(data), piece) for r in pieces.feed(data[i : i + piece], 1)]
    assert whole.lines == pieces.lines == data.count(b"\n")
    assert whole.lines == len(expected) + whole.unknown
    # A first stamped line switches the decoder to stamped lines, which changes no value.
    assert got == expected


@given(st.binary(max_size=4000))
@settings(max_examples=150, deadline=None)
def test_random_bytes(data: bytes) -> None:
    decoder = TraceDecoder()
    decoder.feed(data, 1)
    records = decoder.feed(b"\n" + SLOT_9_1 + b"\n", 2)
    assert isinstance(records[-1], SlotOp)
    assert decoder.pending == 0
