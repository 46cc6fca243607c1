"""PURE: the slot table, QEMU's rules, plans by strategy, and what a plan exposes.

Knows nothing of sockets, clocks or processes.
"""

from .commit import QemuOps, qemu_ops
from .dirty_log import DISPLAY_RAM, DirtyLog, LogChange, migratable
from .document import plan_document
from .exposure import DirtyBytes, Exposure, Missing, Step, expose
from .ops import Op, OpKind, TracedOp
from .planning import Plan, Strategy, plan, plan_all, plan_transition
from .reconcile import Difference, DifferenceKind, differences, fold
from .rules import ADDRESS_SPACES, Order, Rules, name_backing, slot_table, views_by_as
from .slots import GUEST_MEMFD, LOG_DIRTY_PAGES, READONLY, Slot, SlotTable, bitmap_bytes
from .strategies import DEFAULT_MAX_HOLES, follow_blocks

__all__ = [
    "ADDRESS_SPACES",
    "DEFAULT_MAX_HOLES",
    "DISPLAY_RAM",
    "GUEST_MEMFD",
    "LOG_DIRTY_PAGES",
    "READONLY",
    "Difference",
    "DifferenceKind",
    "DirtyBytes",
    "DirtyLog",
    "Exposure",
    "LogChange",
    "Missing",
    "Op",
    "OpKind",
    "Order",
    "Plan",
    "QemuOps",
    "Rules",
    "Slot",
    "SlotTable",
    "Step",
    "Strategy",
    "TracedOp",
    "bitmap_bytes",
    "differences",
    "expose",
    "fold",
    "follow_blocks",
    "migratable",
    "name_backing",
    "plan",
    "plan_all",
    "plan_document",
    "plan_transition",
    "qemu_ops",
    "slot_table",
    "views_by_as",
]
