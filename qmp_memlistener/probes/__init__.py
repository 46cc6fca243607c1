"""Each probe measures one or more kinds of stall window and declares what it needs."""

from __future__ import annotations

from .model import (
    CommandSpan,
    Context,
    Kind,
    Measurement,
    Observation,
    Probe,
    ProbeInfo,
    ProbeUnavailable,
    Sink,
    SlotUpdate,
    Verdict,
)

__all__ = [
    "Kind",
    "Probe",
    "ProbeInfo",
    "Verdict",
    "Context",
    "Sink",
    "Observation",
    "SlotUpdate",
    "CommandSpan",
    "Measurement",
    "ProbeUnavailable",
]
