"""What a KVM can do, as a table: KVM_CHECK_EXTENSION numbers that the lab asks for, and why.

Numbers of include/uapi/linux/kvm.h; what they mean is in Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

__all__ = ["CAPABILITIES", "Cap", "Capability"]


class Cap(IntEnum):
    """KVM_CAP_* by its number."""

    USER_MEMORY = 3
    SET_TSS_ADDR = 4
    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    SYNC_MMU = 16
    TSC_KHZ = 61
    READONLY_MEM = 81
    X86_SMM = 117
    MULTI_ADDRESS_SPACE = 118
    IMMEDIATE_EXIT = 136
    MANUAL_DIRTY_LOG_PROTECT2 = 168
    DIRTY_LOG_RING = 192
    BINARY_STATS_FD = 203
    DIRTY_LOG_RING_ACQ_REL = 223
    USER_MEMORY2 = 231
    MEMORY_FAULT_INFO = 232
    MEMORY_ATTRIBUTES = 233
    GUEST_MEMFD = 234
    VM_TYPES = 235
    PRE_FAULT_MEMORY = 236


CAPABILITIES = {
    Cap.USER_MEMORY: "memslots at all",
    Cap.SET_TSS_ADDR: "Intel's KVM wants three pages for itself",
    Cap.NR_VCPUS: "vCPUs that are sensible",
    Cap.NR_MEMSLOTS: "memslots that a VM may have",
    Cap.SYNC_MMU: "changes of the host mapping reach the guest: holes by host mapping",
    Cap.TSC_KHZ: "ticks of the guest's clock as time",
    Cap.READONLY_MEM: "READONLY slots",
    Cap.X86_SMM: "system management mode, and an address space for it",
    Cap.MULTI_ADDRESS_SPACE: "more than one address space of slots",
    Cap.IMMEDIATE_EXIT: "leaving KVM_RUN without a signal",
    Cap.MANUAL_DIRTY_LOG_PROTECT2: "fetching a dirty log without clearing it",
    Cap.DIRTY_LOG_RING: "dirty pages in a ring for each vCPU",
    Cap.BINARY_STATS_FD: "statistics of a VM",
    Cap.DIRTY_LOG_RING_ACQ_REL: "the same, with memory barriers",
    Cap.USER_MEMORY2: "slots with guest_memfd",
    Cap.MEMORY_FAULT_INFO: "a faulting address with -EFAULT",
    Cap.MEMORY_ATTRIBUTES: "private and shared pages: holes by memory attributes",
    Cap.GUEST_MEMFD: "guest memory that the host does not map",
    Cap.VM_TYPES: "protected VMs in software",
    Cap.PRE_FAULT_MEMORY: "populating the second-stage tables beforehand",
}


@dataclass(frozen=True, slots=True)
class Capability:
    """A capability of this host; `value` is what KVM_CHECK_EXTENSION returned, 0 for absent."""

    cap: Cap
    value: int
    what: str
