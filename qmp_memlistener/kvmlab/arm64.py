"""arm64: vCPU state, and how a vCPU is put to run one of the lab's programs, as `x86` has it.

Structures and numbers of arch/arm64/include/uapi/asm/kvm.h, compared with the headers by a test.
No arm64 host has run this: the lab has no programs for it, and refuses such a host (`vm`).  What
else is different there is listed in docs/lab.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import c_uint32, c_uint64

from .abi import ior, iow
from .x86 import Ioctl

__all__ = [
    "CAP_IPA_SIZE",
    "EXIT_NISV",
    "EXIT_SYSTEM_EVENT",
    "GET_ONE_REG",
    "PREFERRED_TARGET",
    "PSCI_0_2",
    "SET_ONE_REG",
    "VCPU_INIT",
    "OneReg",
    "VcpuInit",
    "core_register",
    "set_up_vcpu",
    "start",
    "vm_type",
]


class VcpuInit(ctypes.Structure):
    """`struct kvm_vcpu_init`."""

    _fields_ = (("target", c_uint32), ("features", c_uint32 * 7))


class OneReg(ctypes.Structure):
    """`struct kvm_one_reg`: a register's id, and where its value is."""

    _fields_ = (("id", c_uint64), ("addr", c_uint64))


GET_ONE_REG = iow(0xAB, OneReg)
SET_ONE_REG = iow(0xAC, OneReg)
VCPU_INIT = iow(0xAE, VcpuInit)
PREFERRED_TARGET = ior(0xAF, VcpuInit)

CAP_IPA_SIZE = 165  # KVM_CAP_ARM_VM_IPA_SIZE: the most bits of a guest-physical address
EXIT_SYSTEM_EVENT = 24  # the guest called PSCI SYSTEM_OFF: how a program ends, there is no HLT exit
EXIT_NISV = 28  # an access to no slot by an instruction that the CPU does not describe
PSCI_0_2 = 2  # KVM_ARM_VCPU_PSCI_0_2, the number of a feature

_CORE = 0x6030_0000_0010_0000  # KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE
_WORDS = {**{f"x{n}": 2 * n for n in range(31)}, "sp": 62, "pc": 64, "pstate": 66}
_PSTATE = 0x3C5  # EL1 with its own stack pointer, all interrupts masked


def core_register(name: str) -> int:
    """The id of `x0` to `x30`, `sp`, `pc` or `pstate`: where it is in struct kvm_regs, in words."""
    return _CORE | _WORDS[name]


def vm_type(bits: int) -> int:
    """For KVM_CREATE_VM: guest-physical addresses of so many bits (0: 40, KVM's default)."""
    return bits & 0xFF


def set_up_vcpu(vm: Ioctl, vcpu: Ioctl) -> None:
    """Give the vCPU what this host's KVM prefers.  Beside x86 this is asked of the VM."""
    init = VcpuInit()
    vm(PREFERRED_TARGET, init)
    init.features[0] = 1 << PSCI_0_2
    vcpu(VCPU_INIT, init)


def start(vcpu: Ioctl, pc: int, registers: Mapping[str, int]) -> None:
    """Code at `pc` in EL1 with the MMU off: guest-virtual is guest-physical, all data is device
    memory, and no page tables are needed."""
    for name, value in {**registers, "pc": pc, "pstate": _PSTATE}.items():
        held = c_uint64(value)
        vcpu(SET_ONE_REG, OneReg(core_register(name), ctypes.addressof(held)))
