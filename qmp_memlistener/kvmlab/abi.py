"""The part of KVM's ABI that the lab uses and that is the same on every architecture.

Structures, ioctl numbers, capabilities, exit reasons and flags of Linux' include/uapi/linux/kvm.h;
those of x86 are in `x86`, those of arm64 in `arm64`.  Numbers of ioctls follow from the structures,
as in the kernel's macros.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_uint8, c_uint16, c_uint32, c_uint64
from enum import IntEnum

KVMIO = 0xAE
API_VERSION = 12

_Struct = type[ctypes.Structure]


def io(number: int) -> int:
    """`_IO(KVMIO, number)`."""
    return KVMIO << 8 | number


def _sized(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | KVMIO << 8 | number


def iow(number: int, struct: _Struct) -> int:
    """`_IOW(KVMIO, number, struct)`: user space writes it, the kernel reads it."""
    return _sized(1, number, ctypes.sizeof(struct))


def ior(number: int, struct: _Struct) -> int:
    """`_IOR(KVMIO, number, struct)`."""
    return _sized(2, number, ctypes.sizeof(struct))


def iowr(number: int, struct: _Struct) -> int:
    """`_IOWR(KVMIO, number, struct)`."""
    return _sized(3, number, ctypes.sizeof(struct))


MEMORY_ATTRIBUTE_PRIVATE = 1 << 3

DIRTY_GFN_DIRTY = 1
DIRTY_GFN_RESET = 2
DIRTY_LOG_PAGE_OFFSET = 64
"""Where in a vCPU's mapping its dirty ring begins, in pages; on arm64 since Linux 6.2."""


class Cap(IntEnum):
    """KVM_CAP_* by its number, those that the lab asks for (api.rst 4.4)."""

    USER_MEMORY = 3  # memslots at all
    SET_TSS_ADDR = 4  # Intel's KVM wants three pages for itself
    NR_VCPUS = 9  # vCPUs that are sensible
    NR_MEMSLOTS = 10  # memslots that a VM may have
    SYNC_MMU = 16  # changes of the host mapping reach the guest: holes by host mapping
    TSC_KHZ = 61  # ticks of the guest's clock as time
    READONLY_MEM = 81  # READONLY slots
    X86_SMM = 117  # system management mode, and an address space for it
    MULTI_ADDRESS_SPACE = 118  # more than one address space of slots
    IMMEDIATE_EXIT = 136  # leaving KVM_RUN without a signal
    MANUAL_DIRTY_LOG_PROTECT2 = 168  # fetching a dirty log without clearing it
    DIRTY_LOG_RING = 192  # dirty pages in a ring for each vCPU
    BINARY_STATS_FD = 203  # statistics of a VM
    DIRTY_LOG_RING_ACQ_REL = 223  # the same, with memory barriers
    USER_MEMORY2 = 231  # slots with guest_memfd
    MEMORY_FAULT_INFO = 232  # a faulting address with -EFAULT
    MEMORY_ATTRIBUTES = 233  # private and shared pages: holes by memory attributes
    GUEST_MEMFD = 234  # guest memory that the host does not map
    VM_TYPES = 235  # protected VMs in software
    PRE_FAULT_MEMORY = 236  # populating the second-stage tables beforehand


class ExitReason(IntEnum):
    """`kvm_run.exit_reason`, those that the lab tells apart."""

    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    INTR = 10
    INTERNAL_ERROR = 17
    DIRTY_RING_FULL = 31
    MEMORY_FAULT = 39


class MemoryRegion(ctypes.Structure):
    """`struct kvm_userspace_memory_region`; size 0 deletes."""

    _fields_ = (
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    )


class GetDirtyLog(ctypes.Structure):
    """`struct kvm_dirty_log`: where the bitmap of a slot is to be written."""

    _fields_ = (("slot", c_uint32), ("padding1", c_uint32), ("dirty_bitmap", c_uint64))


class EnableCap(ctypes.Structure):
    """`struct kvm_enable_cap`."""

    _fields_ = (
        ("cap", c_uint32),
        ("flags", c_uint32),
        ("args", c_uint64 * 4),
        ("pad", c_uint8 * 64),
    )


class DirtyGfn(ctypes.Structure):
    """`struct kvm_dirty_gfn`: an entry of a dirty ring; `slot` has the address space above."""

    _fields_ = (("flags", c_uint32), ("slot", c_uint32), ("offset", c_uint64))


DIRTY_GFN_BYTES = ctypes.sizeof(DirtyGfn)
GfnArray = ctypes.Array[DirtyGfn]


class SignalMask(ctypes.Structure):
    """`struct kvm_signal_mask` with the kernel's 8-byte set behind it."""

    _fields_ = (("len", c_uint32), ("sigset", c_uint8 * 8))


class MemoryAttributes(ctypes.Structure):
    """`struct kvm_memory_attributes` (Linux 6.8)."""

    _fields_ = (
        ("address", c_uint64),
        ("size", c_uint64),
        ("attributes", c_uint64),
        ("flags", c_uint64),
    )


class _Mmio(ctypes.Structure):
    _fields_ = (
        ("phys_addr", c_uint64),
        ("data", c_uint64),
        ("len", c_uint32),
        ("is_write", c_uint8),
    )


class _Internal(ctypes.Structure):
    _fields_ = (("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16))


class _MemoryFault(ctypes.Structure):
    _fields_ = (("flags", c_uint64), ("gpa", c_uint64), ("size", c_uint64))


class _Exit(ctypes.Union):
    _fields_ = (
        ("mmio", _Mmio),
        ("internal", _Internal),
        ("memory_fault", _MemoryFault),
        ("padding", c_uint8 * 256),
    )


class Run(ctypes.Structure):
    """`struct kvm_run` up to its union; what the lab reads of it."""

    _fields_ = (
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("exit", _Exit),
    )


GET_API_VERSION = io(0x00)
CREATE_VM = io(0x01)
CHECK_EXTENSION = io(0x03)
GET_VCPU_MMAP_SIZE = io(0x04)
CREATE_VCPU = io(0x41)
GET_DIRTY_LOG = iow(0x42, GetDirtyLog)
SET_USER_MEMORY_REGION = iow(0x46, MemoryRegion)
RUN = io(0x80)
ENABLE_CAP = iow(0xA3, EnableCap)
RESET_DIRTY_RINGS = io(0xC7)
SET_MEMORY_ATTRIBUTES = iow(0xD2, MemoryAttributes)

# its size in the number is that of the structure without the set that follows it
SET_SIGNAL_MASK = _sized(1, 0x8B, ctypes.sizeof(c_int32))
