"""The strategies that the lab runs: which plan of `memslots` each executes, how, and what it needs.

A strategy here is a plan (the same that the verb `plan` prints) and a way to carry it out on
/dev/kvm.  Each says how faithful it is to what was proposed; what cannot run on a host says why
and is never replaced by something else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from ..errors import InputError
from ..memslots import Order, PlanStrategy
from ..text import quoted
from . import userfault
from .abi import Cap
from .vm import Kvm, most_slots

__all__ = ["CONTROL", "STRATEGIES", "HoleKind", "LabStrategy", "select", "why_not"]

CONTROL = "control"
KVM_X86_SW_PROTECTED_VM = 1  # a type of VM, and the number of its bit in KVM_CAP_VM_TYPES


class HoleKind(StrEnum):
    """How a hole is made in a live slot."""

    MPROTECT = "mprotect"
    MUNMAP = "munmap"
    USERFAULT = "userfault"
    ATTRIBUTES = "attributes"


@dataclass(frozen=True, slots=True)
class LabStrategy:
    """One way to carry out a transition.

    `sync` fetches a slot's dirty log just before it is deleted.  `hole` makes holes in live slots.
    `chunk` splits RAM into slots of so many bytes beforehand.  `only_model` is why no kernel
    runs it: its plan is all there is.  `fidelity` says what it stands for and where it differs.
    """

    name: str
    plan: PlanStrategy
    fidelity: str
    order: Order = Order.V7_2
    sync: bool = False
    hole: HoleKind | None = None
    chunk: int | None = None
    needs: tuple[Cap, ...] = ()
    only_model: str | None = None

    @property
    def idle(self) -> bool:
        """It changes nothing: the control."""
        return self.name == CONTROL

    @property
    def vm_type(self) -> int:
        """What KVM_CREATE_VM is to make: attributes are for protected VMs."""
        return KVM_X86_SW_PROTECTED_VM if self.hole is HoleKind.ATTRIBUTES else 0


_DATA_HOLE = (
    "slot id and dirty bitmap survive as in the proposed hole; an access to the hole is an MMIO "
    "exit only where guests are emulated, elsewhere KVM_RUN fails with -EFAULT"
)

STRATEGIES: tuple[LabStrategy, ...] = (
    LabStrategy(
        CONTROL,
        PlanStrategy.QEMU,
        "one ioctl that sets a slot to what it is: what an update costs at least",
    ),
    LabStrategy(
        "naive",
        PlanStrategy.QEMU,
        "QEMU's order up to 7.2, delete and add again, without its fetching of dirty logs",
    ),
    LabStrategy(
        "qemu-7.2",
        PlanStrategy.QEMU,
        "QEMU up to 7.2: the dirty log of a logged slot is fetched before it is deleted",
        sync=True,
    ),
    LabStrategy(
        "pause",
        PlanStrategy.PAUSE,
        "all vCPUs are paused through one lock, as QEMU pauses them",
    ),
    LabStrategy(
        "pause+sync",
        PlanStrategy.PAUSE,
        "the same, with the dirty logs fetched while vCPUs are paused",
        sync=True,
    ),
    LabStrategy(
        "inhibit",
        PlanStrategy.QEMU,
        "QEMU from 8.0 on: vCPUs are kicked and kept out of KVM_RUN while slots overlap",
        order=Order.V8_0,
        sync=True,
    ),
    LabStrategy(
        "batch",
        PlanStrategy.BATCH_INCREMENTAL,
        "the nearest thing to a multi-region ioctl: its operations one by one, vCPUs kept out once",
    ),
    LabStrategy(
        "batch-ioctl",
        PlanStrategy.BATCH_INCREMENTAL,
        "the multi-region ioctl itself",
        only_model="no kernel has it: KVM_SET_USER_MEMORY_REGION_LIST stayed a proposal",
    ),
    LabStrategy(
        "presplit-4k",
        PlanStrategy.QEMU,
        "RAM in slots of 4 KiB from the start: nothing but the hole's own slot changes",
        chunk=4 << 10,
        needs=(Cap.NR_MEMSLOTS,),
    ),
    LabStrategy(
        "presplit-64k",
        PlanStrategy.QEMU,
        "RAM in slots of 64 KiB: the rest of the hole's slot is missing for a moment",
        chunk=64 << 10,
        needs=(Cap.NR_MEMSLOTS,),
    ),
    LabStrategy(
        "presplit-2m",
        PlanStrategy.QEMU,
        "RAM in slots of 2 MiB: the rest of the hole's slot is missing for a moment",
        chunk=2 << 20,
        needs=(Cap.NR_MEMSLOTS,),
    ),
    LabStrategy(
        "hole",
        PlanStrategy.HOLE,
        f"a hole in the host's mapping, made with mprotect: {_DATA_HOLE}",
        hole=HoleKind.MPROTECT,
        needs=(Cap.SYNC_MMU,),
    ),
    LabStrategy(
        "hole-munmap",
        PlanStrategy.HOLE,
        "the same, made by taking the mapping away and putting it back (one mmap in its place, "
        "so that no other mapping can come in between)",
        hole=HoleKind.MUNMAP,
        needs=(Cap.SYNC_MMU,),
    ),
    LabStrategy(
        "hole-userfault",
        PlanStrategy.HOLE,
        "a hole that userfaultfd watches: an access stops the vCPU inside KVM until the hole is "
        "filled, and the address is known, but it cannot be answered as MMIO",
        hole=HoleKind.USERFAULT,
        needs=(Cap.SYNC_MMU,),
    ),
    LabStrategy(
        "hole-attributes",
        PlanStrategy.HOLE,
        "pages turned private in a slot that has no private memory: an access is "
        "KVM_EXIT_MEMORY_FAULT with its page, but neither direction nor data; the nearest thing in "
        "a kernel to the proposed hole. (A slot with guest_memfd would show that instead.)",
        hole=HoleKind.ATTRIBUTES,
        needs=(Cap.MEMORY_ATTRIBUTES, Cap.VM_TYPES),
    ),
    LabStrategy(
        "hole-split",
        PlanStrategy.HOLE_SPLIT,
        "`steer --strategy hole`: a slot that was split stays split, a hole is one delete and its "
        "fill one add; vCPUs are paused once, while a slot is split",
        sync=True,
    ),
    LabStrategy(
        "hole-flag",
        PlanStrategy.HOLE,
        "holes in a slot as the thread proposed them (KVM_MEM_SET_HOLE)",
        only_model="no kernel has it: KVM_MEM_SET_HOLE and KVM_MEM_DISABLED stayed proposals",
    ),
)

_BY_NAME = {s.name: s for s in STRATEGIES}
_FAMILIES = {"presplit": tuple(s for s in STRATEGIES if s.chunk is not None)}
_CHUNK = re.compile(r"presplit-(\d+)([kmg])")
_UNITS = {"k": 10, "m": 20, "g": 30}


def select(names: Iterable[str]) -> tuple[LabStrategy, ...]:
    """The strategies of these names, each once, the control first.

    `all` is all of them, `presplit` those of every size, and `presplit-SIZE` one of another size
    (a power of two from 4k on).  Raises InputError for an unknown name.
    """
    chosen: dict[str, LabStrategy] = {CONTROL: _BY_NAME[CONTROL]}
    for name in names:
        if name == "all":
            found: tuple[LabStrategy, ...] = STRATEGIES
        elif name in _FAMILIES:
            found = _FAMILIES[name]
        elif name in _BY_NAME:
            found = (_BY_NAME[name],)
        else:
            found = (_presplit(name),)
        chosen.update((s.name, s) for s in found)
    return tuple(chosen.values())


def _presplit(name: str) -> LabStrategy:
    match = _CHUNK.fullmatch(name)
    size = f"{match[1]} {match[2].upper()}iB" if match else ""
    chunk = int(match[1]) << _UNITS[match[2]] if match else 0
    if chunk < 4096 or chunk & (chunk - 1):
        raise InputError(
            f"the lab has no strategy {quoted(name)}",
            remedy=f"use all, presplit, presplit-SIZE, or {', '.join(_BY_NAME)}",
        )
    base = _BY_NAME["presplit-64k"]
    return replace(base, name=name, chunk=chunk, fidelity=base.fidelity.replace("64 KiB", size))


def why_not(strategy: LabStrategy, kvm: Kvm, *, slots: int = 1) -> str | None:
    """Why it cannot run here, None when it can.  `slots`: how many it would have."""
    if strategy.only_model is not None:
        return strategy.only_model
    for cap in strategy.needs:
        value = kvm.capability(cap)
        if not value:
            return f"this kernel's KVM has no KVM_CAP_{cap.name}"
        if cap is Cap.VM_TYPES and not value >> KVM_X86_SW_PROTECTED_VM & 1:
            return "this kernel makes no protected VMs in software (KVM_X86_SW_PROTECTED_VM)"
    if strategy.hole is HoleKind.USERFAULT:
        return userfault.why_not()
    most = most_slots(kvm)
    if slots > most:
        return f"it takes {slots} slots, this kernel's KVM has {most} for a VM"
    return None
