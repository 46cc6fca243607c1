"""Throw-away guests for the demo, the tests and the benchmarks."""

from __future__ import annotations

from .launch import GuestSpec, LaunchedGuest, launch
from .pci import HOST_BRIDGE, I440FX, PAM_RAM, PAM_ROM, Q35, HostBridge, PciAddress
from .pulse import Pulse, PulseAnswer, Toggle, TscClock, boot_args, find_image
from .pulse_memory import (
    CpuState,
    Gap,
    Heartbeat,
    High,
    PulseHeader,
    PulseMemory,
    ToggleLog,
    ToggleWrite,
)
from .qemus import KvmProbe, QemuBuild, find_qemu, find_qemus, kvm_usable

__all__ = [
    "launch",
    "GuestSpec",
    "LaunchedGuest",
    "QemuBuild",
    "find_qemu",
    "find_qemus",
    "kvm_usable",
    "KvmProbe",
    "Pulse",
    "boot_args",
    "find_image",
    "PulseMemory",
    "High",
    "PulseHeader",
    "CpuState",
    "Heartbeat",
    "Gap",
    "Toggle",
    "ToggleLog",
    "ToggleWrite",
    "PulseAnswer",
    "TscClock",
    "PciAddress",
    "HostBridge",
    "HOST_BRIDGE",
    "I440FX",
    "Q35",
    "PAM_RAM",
    "PAM_ROM",
]
