"""What the tests of a mirror's backend on /dev/kvm share: slots, and what a guest finds in them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from qmp_memlistener.kvmlab import KvmBackend, SlotRefused
from qmp_memlistener.memslots import LOG_DIRTY_PAGES, READONLY, Slot

__all__ = [
    "GIB",
    "MAIN",
    "MIB",
    "PLAIN",
    "RAM",
    "ROM",
    "SHADOW",
    "WORD",
    "is_shown",
    "refused_by_kvm",
    "wait_until",
]

MIB, GIB = 1 << 20, 1 << 30
RAM, ROM = ("pc.ram", None), ("pc.rom", None)
MAIN = Slot(0, 0, 0, 64 * MIB, LOG_DIRTY_PAGES, *RAM, 0, ((0xC0000, 0xE0000),))
SHADOW = Slot(0, 1, 0xC0000, 0x20000, READONLY, *ROM, 0)
PLAIN = replace(MAIN, holes=())
WORD = b"mirrored"


def refused_by_kvm(slot: Slot, call: Callable[[], object]) -> int:
    """The errno; the message names the slot."""
    with pytest.raises(SlotRefused) as caught:
        call()
    assert f"slot {slot.slot} of address space 0 ({slot.gpa:#x}+{slot.size:#x})" in str(
        caught.value
    )
    return caught.value.errno


def is_shown(lab: KvmBackend, gpa: int, name: tuple[str, str | None], offset: int) -> bool:
    """The word that the host writes into the block is what a guest reads at the address."""
    word = os.urandom(8)
    lab.memory.write(name, offset, word)
    return lab.read(gpa) == word


def wait_until(true: Callable[[], bool]) -> None:
    """vCPUs beat all the time, so this is over soon."""
    over = threading.Event()
    for _ in range(10_000):
        if true():
            return
        over.wait(0.001)
    raise AssertionError("the vCPUs do not go on")
