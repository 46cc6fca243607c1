"""Which memory regions QEMU logs writes to, before and after a transition.

Dirty logging is a property of the memory region (`memory_region_get_dirty_log_mask`,
softmmu/memory.c in 7.2, system/memory.c later): a bit that display code sets for itself
(DIRTY_MEMORY_VGA), and one that is set for every migratable RAM block while a migration or a
dirty-rate measurement runs (`memory_global_dirty_log_start`).  KVM sees LOG_DIRTY_PAGES when
either is set.  A FlatView does not show the bits, so they are taken from the slots before and
from the rules below.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..topology.model import FlatRange, FlatView, Kind, VirtioMemory
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

    Blocks are migratable from `vmstate_register_ram` on: machine RAM, ROMs, DIMMs (see
    `DirtyLog`), virtio-mem, ivshmem, video RAM.  Device RAM is not (vfio and vhost map it with
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

    `views_before` and `views_after` tell which slots are a memory device's: a DIMM's is added
    without the flag and gets it with the next commit, whatever that changes (`_Plugged`).
    """

    __slots__ = ("_change", "_migration_after", "_migration_before", "_plugged", "_seen")

    def __init__(
        self,
        table: SlotTable,
        change: LogChange | None = None,
        views_before: Iterable[FlatView] = (),
        views_after: Iterable[FlatView] = (),
    ) -> None:
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
        self._plugged = _Plugged(views_before, views_after, self._seen)

    @property
    def changes(self) -> bool:
        """Some region may start or stop being logged."""
        c = self._change
        return (
            bool(c.start or c.stop)
            or self._migration_before != self._migration_after
            or bool(self._plugged.due)
        )

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
        if r.region in self._plugged.unlogged:
            return False
        if r.region in self._plugged.due and r.name not in self._change.stop:
            return self._migration_after
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


class _Plugged:
    """Regions of memory devices whose slot has another flag than that of migratable RAM.

    `unlogged` are added without LOG_DIRTY_PAGES although all migratable RAM is logged: pc-dimm and
    nvdimm map their memory before they register it (`pc_dimm_plug`, hw/mem/pc-dimm.c), of which no
    listener learns; virtio-pmem never registers it; virtio-mem does so first (`realize`).  `due`
    are DIMMs that were added so before: the commit after finds them migratable.

    All lie in the machine's device memory.  An nvdimm's is non-volatile; the others look alike, and
    are told apart by how many virtio devices came with them.  Where that leaves it open (both kinds
    between two maps, or a DIMM due beside a virtio-pmem) they are taken for virtio-mem, and for
    virtio-pmem.
    """

    __slots__ = ("due", "unlogged")

    def __init__(
        self,
        before: Iterable[FlatView],
        after: Iterable[FlatView],
        seen: dict[tuple[str, str | None], bool],
    ) -> None:
        old, old_virtio = _device_memory(before)
        new, virtio = _device_memory(after)
        came = {region for region in new if region not in old and region not in seen}
        nvdimms = {region for region, r in new.items() if r.nonvolatile}
        self.unlogged = came & nvdimms
        self.due = {region for region in nvdimms & old.keys() if seen.get(region) is False}
        if virtio is None:
            return
        if virtio.pmem == 0:
            self.due = {region for region in old if region in new and seen.get(region) is False}
        if old_virtio is not None:
            plain = came - nvdimms
            mem, pmem = virtio.mem - old_virtio.mem, virtio.pmem - old_virtio.pmem
            if mem == 0 and pmem in (0, len(plain)):
                self.unlogged |= plain


def _device_memory(
    views: Iterable[FlatView],
) -> tuple[dict[tuple[str, str | None], FlatRange], VirtioMemory | None]:
    """Regions that memory devices show whole, and the virtio devices that are there."""
    regions: dict[tuple[str, str | None], FlatRange] = {}
    virtio = None
    for view in views:
        virtio = virtio or view.virtio_memory
        for r in view:
            if r.device_memory and r.kind.backed and not r.unmergeable:
                regions[r.region] = r
    return regions, virtio
