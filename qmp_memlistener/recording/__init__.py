"""One append-only file of typed records that every report, replay and export reads."""

from .reader import Recording, is_recording
from .records import (
    SCHEMA,
    BlockInfo,
    Cause,
    Extent,
    GuestState,
    Header,
    HoleInfo,
    Lost,
    MapRecord,
    Note,
    QmpEvent,
    Reconciled,
    Record,
    Section,
    SlotOp,
    TransitionRecord,
)
from .writer import RecordingWriter

__all__ = [
    "Recording",
    "RecordingWriter",
    "is_recording",
    "Record",
    "Header",
    "MapRecord",
    "TransitionRecord",
    "SlotOp",
    "GuestState",
    "QmpEvent",
    "Reconciled",
    "Lost",
    "Note",
    "Cause",
    "Section",
    "HoleInfo",
    "BlockInfo",
    "Extent",
    "SCHEMA",
]
