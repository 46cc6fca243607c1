"""The lab: a VM of our own on /dev/kvm, on which strategies for slot updates are run for real.

Needs x86-64 and a usable /dev/kvm; says so where there is none (MissingPrerequisite).
"""

from .capabilities import Cap, Capability
from .device import Kvm
from .machine import Machine
from .programs import GuestKind
from .race import RaceOptions, RaceReport, race, race_document
from .replay import ReplayOptions, ReplayReport, replay_document, replay_on_lab
from .replay_input import read_replay
from .strategies import STRATEGIES, LabStrategy, select, why_not
from .vm import LabVm, SlotRefused

__all__ = [
    "race",
    "RaceOptions",
    "RaceReport",
    "race_document",
    "replay_on_lab",
    "ReplayOptions",
    "ReplayReport",
    "replay_document",
    "read_replay",
    "STRATEGIES",
    "LabStrategy",
    "select",
    "why_not",
    "Kvm",
    "Cap",
    "Capability",
    "LabVm",
    "SlotRefused",
    "Machine",
    "GuestKind",
]
