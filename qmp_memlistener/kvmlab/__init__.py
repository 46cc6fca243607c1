"""The lab: a VM of our own on /dev/kvm, on which strategies for slot updates are run for real.

Needs x86-64 and a usable /dev/kvm; says so where there is none (MissingPrerequisite).  The names
below are loaded on first use: a race needs msgspec alone, a replay what reads recordings as well.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .abi import Cap
    from .backend import KvmBackend
    from .machine import Machine
    from .programs import GuestKind
    from .race import RaceOptions, RaceReport, race_document, run_race
    from .replay.read import read_replay
    from .replay.run import ReplayOptions, ReplayReport, replay_document, run_replay
    from .strategies import STRATEGIES, LabStrategy, select, why_not
    from .vm import Kvm, LabVm, SlotRefused

__all__ = [
    "run_race",
    "RaceOptions",
    "RaceReport",
    "race_document",
    "run_replay",
    "ReplayOptions",
    "ReplayReport",
    "replay_document",
    "read_replay",
    "KvmBackend",
    "STRATEGIES",
    "LabStrategy",
    "select",
    "why_not",
    "Kvm",
    "Cap",
    "LabVm",
    "SlotRefused",
    "Machine",
    "GuestKind",
]

_HOME = {
    "Cap": "abi",
    "GuestKind": "programs",
    "Kvm": "vm",
    "KvmBackend": "backend",
    "LabStrategy": "strategies",
    "LabVm": "vm",
    "Machine": "machine",
    "RaceOptions": "race",
    "RaceReport": "race",
    "ReplayOptions": "replay.run",
    "ReplayReport": "replay.run",
    "STRATEGIES": "strategies",
    "SlotRefused": "vm",
    "race_document": "race",
    "run_race": "race",
    "read_replay": "replay.read",
    "replay_document": "replay.run",
    "run_replay": "replay.run",
    "select": "strategies",
    "why_not": "strategies",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
