"""x86-64: vCPU state, and how a vCPU is put into long mode to run one of the lab's programs.

Structures of arch/x86/include/uapi/asm/kvm.h.  Another architecture needs a module like this one:
`set_up_vm`, `set_up_vcpu`, `start`, page tables, and programs for `programs`.  `arm64` has the
first part of that.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from typing import Protocol

from .abi import io, ior, iow, iowr

GIB = 1 << 30
PAGE = 4096
MAX_GIB = 512
"""What one page of the third level maps."""

# where QEMU puts them as well (target/i386/kvm/kvm.c): no machine has memory there
_IDENTITY_MAP, _TSS = 0xFEFF_C000, 0xFEFF_D000


class Regs(ctypes.Structure):
    """`struct kvm_regs`."""

    _fields_ = tuple(
        (name, c_uint64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
        )
    )


class Segment(ctypes.Structure):
    """`struct kvm_segment`."""

    _fields_ = (
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        *((name, c_uint8) for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl")),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    )


class DescriptorTable(ctypes.Structure):
    """`struct kvm_dtable`."""

    _fields_ = (("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3))


class Sregs(ctypes.Structure):
    """`struct kvm_sregs`."""

    _fields_ = (
        *((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", DescriptorTable),
        ("idt", DescriptorTable),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", c_uint64 * 4),
    )


class CpuidEntry(ctypes.Structure):
    """`struct kvm_cpuid_entry2`."""

    _fields_ = (
        *((name, c_uint32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
        ("padding", c_uint32 * 3),
    )


_ENTRIES = 256


class Cpuid(ctypes.Structure):
    """`struct kvm_cpuid2` with room for entries behind it."""

    _fields_ = (("nent", c_uint32), ("padding", c_uint32), ("entries", CpuidEntry * _ENTRIES))


class _CpuidHead(ctypes.Structure):
    """`struct kvm_cpuid2` as the ioctl numbers count it."""

    _fields_ = (("nent", c_uint32), ("padding", c_uint32))


class _MpState(ctypes.Structure):
    _fields_ = (("mp_state", c_uint32),)


class _Address(ctypes.Structure):
    _fields_ = (("address", c_uint64),)


GET_SUPPORTED_CPUID = iowr(0x05, _CpuidHead)
SET_TSS_ADDR = io(0x47)
SET_IDENTITY_MAP_ADDR = iow(0x48, _Address)
GET_REGS = ior(0x81, Regs)
SET_REGS = iow(0x82, Regs)
GET_SREGS = ior(0x83, Sregs)
SET_SREGS = iow(0x84, Sregs)
SET_CPUID2 = iow(0x90, _CpuidHead)
SET_MP_STATE = iow(0x99, _MpState)
GET_TSC_KHZ = io(0xA3)

_ADDRESS_SIZES = 0x8000_0008
_CR0 = 0x8001_0011  # paging, write protect, extension type, protection
_CR4 = 0x20  # physical address extension
_EFER = 0x500  # long mode enabled and active
_RFLAGS = 2


class Ioctl(Protocol):
    """An ioctl on one file descriptor; raises OSError."""

    def __call__(self, request: int, argument: ctypes.Structure | int = 0, /) -> int: ...


def set_up_vm(ioctl: Ioctl) -> None:
    """What Intel's KVM needs before the first vCPU; others take or ignore it (api.rst 4.12)."""
    ioctl(SET_TSS_ADDR, _TSS)
    ioctl(SET_IDENTITY_MAP_ADDR, _Address(_IDENTITY_MAP))


def set_up_vcpu(system: Ioctl, vcpu: Ioctl) -> None:
    """Give the vCPU all that this host's KVM can do: long mode is part of it."""
    cpuid = Cpuid(nent=_ENTRIES)
    system(GET_SUPPORTED_CPUID, cpuid)
    vcpu(SET_CPUID2, cpuid)


def address_bits(system: Ioctl) -> int:
    """Bits of a guest-physical address (CPUID 0x80000008); 36 on a CPU that does not say."""
    cpuid = Cpuid(nent=_ENTRIES)
    system(GET_SUPPORTED_CPUID, cpuid)
    for entry in cpuid.entries[: cpuid.nent]:
        if entry.function == _ADDRESS_SIZES:
            bits: int = entry.eax & 0xFF
            return bits
    return 36


def start(vcpu: Ioctl, rip: int, cr3: int, registers: Mapping[str, int]) -> None:
    """64-bit code at `rip`, page tables at `cr3`, no interrupts and no handlers.

    So that whatever goes wrong in the guest ends in KVM_EXIT_SHUTDOWN or INTERNAL_ERROR.  Works on
    a vCPU that died of either.
    """
    sregs = Sregs()
    vcpu(GET_SREGS, sregs)
    data = Segment(limit=0xFFFFFFFF, selector=0x10, type=3, present=1, db=1, s=1, g=1)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, data)
    sregs.cs = Segment(limit=0xFFFFFFFF, selector=8, type=11, present=1, s=1, l=1, g=1)
    sregs.tr = Segment(limit=0xFFFF, type=11, present=1)
    sregs.ldt = Segment(unusable=1)
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = _CR0, cr3, _CR4, _EFER
    vcpu(SET_MP_STATE, _MpState(0))
    vcpu(SET_SREGS, sregs)
    vcpu(SET_REGS, Regs(rip=rip, rflags=_RFLAGS, **registers))


def tsc_khz(vcpu: Ioctl) -> int:
    """Ticks of the guest's TSC a millisecond, as KVM reports it (KVM_CAP_GET_TSC_KHZ)."""
    return vcpu(GET_TSC_KHZ)


TABLE_BYTES = 2 * PAGE  # and a page for each GiB


def tables(at: int, gibibytes: int, aliases: int = 0, alias_of: int = 0) -> bytes:
    """Page tables for gpa `at` that map `[0, gibibytes GiB)` to itself in pages of 2 MiB.

    Behind that, `aliases` GiB of pages that all show the 2 MiB at `alias_of`: a guest that goes
    through them walks its page tables all the time.  `TABLE_BYTES` and 4096 bytes a GiB; at most
    MAX_GIB together.
    """
    present, large = 3, 0x83
    directories = at + TABLE_BYTES
    every = gibibytes + aliases
    top = [at + PAGE | present] + [0] * 511
    third = [directories + i * PAGE | present for i in range(every)]
    third += [0] * (512 - every)
    pages = [page << 21 | large for page in range(gibibytes * 512)]
    pages += [alias_of | large] * (aliases * 512)
    return array("Q", [*top, *third, *pages]).tobytes()
