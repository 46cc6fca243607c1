"""arm64's structures and numbers against the kernel's own headers, by way of a C compiler."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from qmp_memlistener.kvmlab import abi, arm64

COMPILER = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
HEADERS = Path("/usr/aarch64-linux-gnu/include")

NUMBERS = {
    "KVM_ARM_VCPU_INIT": arm64.VCPU_INIT,
    "KVM_ARM_PREFERRED_TARGET": arm64.PREFERRED_TARGET,
    "KVM_GET_ONE_REG": arm64.GET_ONE_REG,
    "KVM_SET_ONE_REG": arm64.SET_ONE_REG,
    "KVM_CAP_ARM_VM_IPA_SIZE": arm64.CAP_IPA_SIZE,
    "KVM_EXIT_SYSTEM_EVENT": arm64.EXIT_SYSTEM_EVENT,
    "KVM_EXIT_ARM_NISV": arm64.EXIT_NISV,
    "KVM_ARM_VCPU_PSCI_0_2": arm64.PSCI_0_2,
    "KVM_VM_TYPE_ARM_IPA_SIZE(48)": arm64.vm_type(48),
    "sizeof(struct kvm_vcpu_init)": ctypes.sizeof(arm64.VcpuInit),
    "sizeof(struct kvm_one_reg)": ctypes.sizeof(arm64.OneReg),
    # what `abi` says of every architecture
    "KVM_SET_USER_MEMORY_REGION": abi.SET_USER_MEMORY_REGION,
    "KVM_GET_DIRTY_LOG": abi.GET_DIRTY_LOG,
    "KVM_RUN": abi.RUN,
    "offsetof(struct kvm_run, exit_reason)": abi.Run.exit_reason.offset,
    "offsetof(struct kvm_run, immediate_exit)": abi.Run.immediate_exit.offset,
    "offsetof(struct kvm_run, mmio.phys_addr)": abi.Run.exit.offset,
    "offsetof(struct kvm_run, mmio.len)": abi.Run.exit.offset + 16,
    **{
        f"KVM_REG_ARM64|KVM_REG_SIZE_U64|KVM_REG_ARM_CORE|KVM_REG_ARM_CORE_REG({field})": (
            arm64.core_register(name)
        )
        for field, name in {
            "regs.regs[0]": "x0",
            "regs.regs[30]": "x30",
            "regs.sp": "sp",
            "regs.pc": "pc",
            "regs.pstate": "pstate",
        }.items()
    },
}


@pytest.mark.skipif(COMPILER is None, reason="no C compiler (cc, gcc, clang)")
@pytest.mark.skipif(
    not (HEADERS / "linux" / "kvm.h").exists(),
    reason="no headers of arm64 (Debian package linux-libc-dev-arm64-cross)",
)
def test_structures_and_numbers_of_arm64_are_the_kernels(tmp_path: Path) -> None:
    prints = "".join(f'printf("%llu\\n", (unsigned long long)({n}));\n' for n in NUMBERS)
    source, binary = tmp_path / "abi.c", tmp_path / "abi"
    includes = "".join(f"#include <{h}>\n" for h in ("stdio.h", "stddef.h", "linux/kvm.h"))
    source.write_text(f"{includes}int main(void) {{ {prints} return 0; }}\n")
    # both architectures are LP64 with the same sizes and alignments of integers
    command = (str(COMPILER), f"-I{HEADERS}", "-o", str(binary), str(source))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out = subprocess.run((str(binary),), capture_output=True, text=True, check=True).stdout
    assert dict(zip(NUMBERS, map(int, out.split()), strict=True)) == NUMBERS


def test_a_vcpu_is_set_up_and_started_by_the_documented_ioctls() -> None:
    """As far as can be told without a host: which ioctls, in which order, with what."""
    asked: list[int] = []
    registers: dict[int, int] = {}

    def ioctl(request: int, argument: ctypes.Structure | int = 0, /) -> int:
        asked.append(request)
        if isinstance(argument, arm64.OneReg):
            registers[argument.id] = ctypes.c_uint64.from_address(argument.addr).value
        if request == arm64.VCPU_INIT:
            assert isinstance(argument, arm64.VcpuInit)
            assert argument.features[0] == 1 << arm64.PSCI_0_2
        return 0

    arm64.set_up_vcpu(ioctl, ioctl)
    arm64.start(ioctl, 0x4000_0000, {"x1": 7})
    assert asked[:2] == [arm64.PREFERRED_TARGET, arm64.VCPU_INIT]
    assert registers == {
        arm64.core_register("x1"): 7,
        arm64.core_register("pc"): 0x4000_0000,
        arm64.core_register("pstate"): 0x3C5,
    }
