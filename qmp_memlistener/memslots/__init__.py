"""PURE: the slot table, QEMU's rules, plans by strategy, and what a plan exposes."""

from .commit import QemuOps, qemu_ops
from .dirty_log import DISPLAY_RAM, DirtyLog, LogChange, migratable
from .exposure import DirtyBytes, Exposure, Missing, Step, expose
from .hole import DEFAULT_MAX_HOLES, follow_blocks
from .ops import Op, OpKind
from .planning import Plan, PlanStrategy, plan, plan_all
from .rules import ADDRESS_SPACES, Order, Rules, name_backing, slot_table, views_by_as
from .slots import GUEST_MEMFD, LOG_DIRTY_PAGES, READONLY, Slot, SlotTable, bitmap_bytes

__all__ = [
    "ADDRESS_SPACES",
    "DEFAULT_MAX_HOLES",
    "DISPLAY_RAM",
    "GUEST_MEMFD",
    "LOG_DIRTY_PAGES",
    "READONLY",
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
    "PlanStrategy",
    "bitmap_bytes",
    "expose",
    "follow_blocks",
    "migratable",
    "name_backing",
    "plan",
    "plan_all",
    "qemu_ops",
    "slot_table",
    "views_by_as",
]
