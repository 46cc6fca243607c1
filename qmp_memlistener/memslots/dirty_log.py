"""Which memory regions QEMU logs writes to, before and after a transition.

Dirty logging is a property of the memory region (`memory_region_get_dirty_log_mask`,
softmmu/memory.c in 7.2, system/memory.c later): a bit that display code sets for itself
(DIRTY_MEMORY_VGA), and one that is set for every migratable RAM block while a migration or a
dirty-rate measurement runs (`memory_global_dirty_log_start`).  KVM sees LOG_DIRTY_PAGES when
either is set.  A FlatView does not show the bits, so they are taken from the slots before and
from the rules below.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..topology.model import FlatRange, Kind
from .slots import SlotTable

__all__ = ["DISPLAY_RAM", "DirtyLog", "LogChange", "migratable"]

DISPLAY_RAM = frozenset(
    {
        "vga.vram",  # vga.c vga_common_init: std, cirrus, qxl primary, vmware, virtio-vga, isa
        "bochs-display-vram",  # bochs-display.c bochs_display_realize
        "cg3.vram",  # cg3.c cg3_realizefn
        "g364fb.vram",  # g364fb.c g364fb_init
        "macfb-vram",  # macfb.c macfb_common_realize
        "sm501.local",  # sm501.c sm501_init
        "tcx.vram",  # tcx.c tcx_realizefn
    }
)
"""Regions that QEMU logs from their creation on: the callers of `memory_region_set_log(...,
DIRTY_MEMORY_VGA)` in hw/display, the same in 7.2 and 10.0.2.

Not in it: qxl and vmware switch the log of their `vga.vram` off and on with the mode;
framebuffer.c (pl110, bcm2835_fb, pxa2xx_lcd, ...) and exynos4210_fimd.c log whatever RAM the
guest points them at.  A table of slots shows such a state, a `LogChange` its changes.
"""


def migratable(r: FlatRange) -> bool:
    """Whether a migration logs the range's RAM block (`qemu_ram_is_migratable`).

    Blocks are migratable from `vmstate_register_ram` on: machine RAM, ROMs, DIMMs, virtio-mem,
    ivshmem, video RAM.  Device RAM is not (vfio and vhost map it with
    `memory_region_init_ram_device_ptr`) but for tpm-ppi (tpm_ppi.c), nor are virtio-gpu's blobs
    (`memory_region_init_ram_ptr`).
    """
    if r.name == "tpm-ppi":
        return True
    return (r.region_kind or r.kind) is not Kind.RAMD and r.name != "blob"


@dataclass(frozen=True, slots=True)
class LogChange:
    """What starts or stops dirty logging in a transition.

    `start` and `stop` hold region names (any owner) for which a display switches its log;
    `migration` is True when a global log starts, False when it ends, None when neither.
    """

    start: frozenset[str] = frozenset()
    stop: frozenset[str] = frozenset()
    migration: bool | None = None


class DirtyLog:
    """Answers whether a range is logged before and after a transition.

    Before: a region with slots in the table is logged when one of them has LOG_DIRTY_PAGES.
    Without slots, display RAM is logged, and all that is migratable when a migration runs: when
    a slot of anything else but display RAM has the flag.  After: the same, with the `change`
    applied.  Two states cannot be told apart in slots: a display that logs main RAM looks like a
    migration, and display RAM that only a migration logs (qxl, vmware) like any other; for these
    name what changes.
    """

    __slots__ = ("_change", "_migration_after", "_migration_before", "_seen")

    def __init__(self, table: SlotTable, change: LogChange | None = None) -> None:
        self._change = change = change or LogChange()
        self._seen: dict[tuple[str, str | None], bool] = {}
        migration = False
        for slot in table:
            if slot.block is None:
                continue
            region = (slot.block, slot.owner)
            logged = slot.logged
            self._seen[region] = self._seen.get(region, False) or logged
            if logged and slot.block not in DISPLAY_RAM and slot.block not in change.stop:
                migration = True
        self._migration_before = migration
        self._migration_after = migration if change.migration is None else change.migration

    @property
    def changes(self) -> bool:
        """Some region may start or stop being logged."""
        c = self._change
        return bool(c.start or c.stop) or self._migration_before != self._migration_after

    def before(self, r: FlatRange) -> bool:
        """The range's region is logged before the transition."""
        seen = self._seen.get(r.region)
        if seen is not None:
            return seen
        return r.name in DISPLAY_RAM or (self._migration_before and migratable(r))

    def after(self, r: FlatRange) -> bool:
        """The range's region is logged after the transition."""
        if r.name in self._change.start:
            return True
        seen = self._seen.get(r.region)
        stops = r.name in self._change.stop
        if seen is not None and not stops and self._migration_before == self._migration_after:
            return seen
        display = r.name in DISPLAY_RAM and seen is not False and not stops
        if display or not self._migration_after:
            return display
        if self._migration_before and seen is False:
            return False  # a migration runs and leaves it out
        return migratable(r)
