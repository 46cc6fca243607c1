"""Each probe measures one or more kinds of stall window and declares what it needs."""

from __future__ import annotations

from .model import (
    Context,
    HostWait,
    Observation,
    Probe,
    ProbeInfo,
    ProbeUnavailable,
    Sink,
    StallKind,
    Verdict,
)

__all__ = [
    "StallKind",
    "Probe",
    "ProbeInfo",
    "Verdict",
    "Context",
    "Sink",
    "Observation",
    "HostWait",
    "ProbeUnavailable",
]
