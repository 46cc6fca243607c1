"""The lab's structures and numbers against the kernel's own headers, by way of a C compiler."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from qmp_memlistener.kvmlab import abi, userfault, x86
from qmp_memlistener.kvmlab.abi import Cap
from qmp_memlistener.memslots import GUEST_MEMFD, LOG_DIRTY_PAGES, READONLY

COMPILER = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)

STRUCTS: dict[str, type[ctypes.Structure]] = {
    "kvm_userspace_memory_region": abi.MemoryRegion,
    "kvm_dirty_log": abi.GetDirtyLog,
    "kvm_enable_cap": abi.EnableCap,
    "kvm_dirty_gfn": abi.DirtyGfn,
    "kvm_memory_attributes": abi.MemoryAttributes,
    "kvm_regs": x86.Regs,
    "kvm_sregs": x86.Sregs,
    "kvm_segment": x86.Segment,
    "kvm_dtable": x86.DescriptorTable,
    "kvm_cpuid_entry2": x86.CpuidEntry,
}

# a structure that headers of some age lack is there when its ioctl or capability is
SINCE = {
    "kvm_memory_attributes": "KVM_SET_MEMORY_ATTRIBUTES",
}

NUMBERS = {
    "KVM_GET_API_VERSION": abi.GET_API_VERSION,
    "KVM_CREATE_VM": abi.CREATE_VM,
    "KVM_CHECK_EXTENSION": abi.CHECK_EXTENSION,
    "KVM_GET_VCPU_MMAP_SIZE": abi.GET_VCPU_MMAP_SIZE,
    "KVM_CREATE_VCPU": abi.CREATE_VCPU,
    "KVM_GET_DIRTY_LOG": abi.GET_DIRTY_LOG,
    "KVM_SET_USER_MEMORY_REGION": abi.SET_USER_MEMORY_REGION,
    "KVM_RUN": abi.RUN,
    "KVM_ENABLE_CAP": abi.ENABLE_CAP,
    "KVM_RESET_DIRTY_RINGS": abi.RESET_DIRTY_RINGS,
    "KVM_SET_MEMORY_ATTRIBUTES": abi.SET_MEMORY_ATTRIBUTES,
    "KVM_SET_SIGNAL_MASK": abi.SET_SIGNAL_MASK,
    "KVM_DIRTY_LOG_PAGE_OFFSET": abi.DIRTY_LOG_PAGE_OFFSET,
    "KVM_MEM_LOG_DIRTY_PAGES": LOG_DIRTY_PAGES,
    "KVM_MEM_READONLY": READONLY,
    "KVM_MEM_GUEST_MEMFD": GUEST_MEMFD,
    "KVM_MEMORY_ATTRIBUTE_PRIVATE": abi.MEMORY_ATTRIBUTE_PRIVATE,
    "KVM_GET_REGS": x86.GET_REGS,
    "KVM_SET_REGS": x86.SET_REGS,
    "KVM_GET_SREGS": x86.GET_SREGS,
    "KVM_SET_SREGS": x86.SET_SREGS,
    "KVM_GET_SUPPORTED_CPUID": x86.GET_SUPPORTED_CPUID,
    "KVM_SET_CPUID2": x86.SET_CPUID2,
    "KVM_SET_MP_STATE": x86.SET_MP_STATE,
    "KVM_SET_TSS_ADDR": x86.SET_TSS_ADDR,
    "KVM_SET_IDENTITY_MAP_ADDR": x86.SET_IDENTITY_MAP_ADDR,
    "KVM_GET_TSC_KHZ": x86.GET_TSC_KHZ,
    "UFFDIO_API": userfault.UFFDIO_API,
    "UFFDIO_REGISTER": userfault.UFFDIO_REGISTER,
    "UFFDIO_UNREGISTER": userfault.UFFDIO_UNREGISTER,
    "UFFDIO_WAKE": userfault.UFFDIO_WAKE,
    "UFFDIO_CONTINUE": userfault.UFFDIO_CONTINUE,
    "UFFD_FEATURE_MINOR_SHMEM": userfault.FEATURE_MINOR_SHMEM,
    "UFFDIO_REGISTER_MODE_MINOR": userfault.MODE_MINOR,
    **{f"KVM_CAP_{cap.name}": int(cap) for cap in Cap if cap is not Cap.TSC_KHZ},
    "KVM_CAP_GET_TSC_KHZ": int(Cap.TSC_KHZ),
    **{f"KVM_EXIT_{reason.name}": int(reason) for reason in abi.ExitReason},
}

RUN_FIELDS = {
    "immediate_exit": abi.Run.immediate_exit.offset,
    "exit_reason": abi.Run.exit_reason.offset,
    "mmio.phys_addr": abi.Run.exit.offset,
    "mmio.data": abi.Run.exit.offset + 8,
    "mmio.len": abi.Run.exit.offset + 16,
    "mmio.is_write": abi.Run.exit.offset + 20,
    "internal.suberror": abi.Run.exit.offset,
}


def program() -> str:
    lines = [
        "#include <stdio.h>",
        "#include <stddef.h>",
        "#include <linux/kvm.h>",
        "#include <linux/userfaultfd.h>",
        "int main(void) {",
    ]
    for name, struct in STRUCTS.items():
        body = [f'printf("{name} %zu\\n", sizeof(struct {name}));']
        body += [
            f'printf("{name}.{field[0]} %zu\\n", offsetof(struct {name}, {field[0]}));'
            for field in struct._fields_
            if not field[0].startswith("pad")
        ]
        guard = SINCE.get(name)
        lines += [f"#ifdef {guard}", *body, "#endif"] if guard else body
    for name in NUMBERS:
        lines += [f"#ifdef {name}", f'printf("{name} %llu\\n", (unsigned long long){name});']
        lines.append("#endif")
    lines += [
        f'printf("kvm_run.{field} %zu\\n", offsetof(struct kvm_run, {field}));'
        for field in RUN_FIELDS
    ]
    return "\n".join([*lines, "return 0; }"])


@pytest.mark.skipif(COMPILER is None, reason="no C compiler (cc, gcc, clang)")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the lab's structures are x86-64's")
def test_structures_and_numbers_are_the_kernels(tmp_path: Path) -> None:
    source, binary = tmp_path / "abi.c", tmp_path / "abi"
    source.write_text(program())
    done = subprocess.run(
        [str(COMPILER), "-o", str(binary), str(source)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "No such file" in done.stderr and "linux/" in done.stderr:
        pytest.skip("the kernel's headers (linux-libc-dev) are not installed")
    assert done.returncode == 0, done.stderr
    told = subprocess.run([str(binary)], capture_output=True, text=True, timeout=10, check=True)
    kernel = {name: int(value) for name, value in map(str.split, told.stdout.splitlines())}
    ours = dict(NUMBERS)
    for name, struct in STRUCTS.items():
        ours[name] = ctypes.sizeof(struct)
        for field in struct._fields_:
            ours[f"{name}.{field[0]}"] = getattr(struct, field[0]).offset
    ours |= {f"kvm_run.{field}": offset for field, offset in RUN_FIELDS.items()}
    # headers older than a feature leave it out; what every header since Linux 5.14 has is there
    assert len(kernel) > 120
    assert {name: ours[name] for name in kernel} == kernel
