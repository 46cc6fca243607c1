"""What every strategy is given and what it answers.  Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ...topology.model import FlatView
from ..commit import QemuOps, qemu_ops
from ..dirty_log import DirtyLog, LogChange
from ..ops import Op
from ..rules import Rules
from ..slots import SlotTable

__all__ = ["Change", "Outcome"]


@dataclass(frozen=True)
class Change:
    """A transition: the views by address-space id, the table before, and what logs start or stop.

    `table` knows what backs its slots.
    """

    before: Mapping[int, FlatView]
    after: Mapping[int, FlatView]
    table: SlotTable
    rules: Rules
    log_change: LogChange | None = None

    @cached_property
    def log(self) -> DirtyLog:
        """Which regions are logged before and after."""
        return DirtyLog(self.table, self.log_change, self.before.values(), self.after.values())

    @cached_property
    def qemu(self) -> QemuOps:
        """What QEMU does; computed once for all strategies that start from it."""
        return qemu_ops(self.before, self.after, self.table, self.rules, self.log)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A strategy's answer.

    `before` is the table its ops start from (the strategy's own form of the table it was given).
    `vcpus_kicked` says that every vCPU has to leave guest mode together and wait.
    """

    ops: tuple[Op, ...]
    before: SlotTable
    after: SlotTable
    vcpus_kicked: bool
    inhibited: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
