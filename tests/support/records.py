"""Records of a guest that never was; `msgspec.structs.replace` changes what a test needs."""

from __future__ import annotations

from qmp_memlistener.records import Cause, CauseType, Detail, Header, TransitionRecord

__all__ = ["HEADER", "transition"]

HEADER = Header(
    tool_version="0",
    monotonic_ns=1,
    realtime_ns=2,
    host_kernel="6.1",
    target="unix:/x",
    qemu_version="7.2.22",
    machine="pc",
    accel="kvm",
    guest_name=None,
    pid=1,
    source="trace",
)


def transition(seq: int, t_ns: int, slot_ops: int = 0) -> TransitionRecord:
    """One that changed nothing, of unknown cause."""
    return TransitionRecord(
        seq=seq,
        t_ns=t_ns,
        cause=Cause(CauseType.UNKNOWN),
        removed=[],
        added=[],
        holes_punched=[],
        holes_filled=[],
        detail=Detail.FULL,
        slot_ops=slot_ops,
    )
