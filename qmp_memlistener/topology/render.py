"""Renders a region tree into the FlatView that QEMU itself would build.

The rules are those of `render_memory_region` and `flatview_simplify` (system/memory.c; 7.2:
softmmu/memory.c): children before their parent, higher priority first, read-only and non-volatile
inherited through aliases, what was rendered first obscures what comes later, neighbours merge
when they continue each other.  Instead of inserting into a growing list, every visible piece gets
its rank in that order and one sweep over the addresses keeps the piece of lowest rank: O(n log n).

`info mtree` leaves three things out; the rules for them are in this module, each with its source:

- whether an i/o region answers by itself or only holds others (`_terminates`);
- which aliases are read-only (`_is_readonly_alias`);
- the order of siblings of equal priority that overlap at different addresses
  (`_render_order`); such pairs are reported in `Rendering.ambiguous`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

from ..errors import MtreeError
from .model import ADDRESS_SPACE_SIZE, FlatRange, FlatView, Kind, Region

__all__ = ["Extent", "Rendering", "render"]

HOST_PAGE = 4096
_MAX_DEPTH = 64  # nesting of real machines stays below 20
# Aliases of aliases may multiply: 32 root ports take a thousand visits, 100,000 regions that many.
_MAX_VISITS = 1_000_000

# i/o regions that have children and answer by themselves as well: memory_region_init_io() and
# memory_region_add_subregion() on the same region (QEMU 7.2 and 10.0).
_TERMINATING_PARENTS = frozenset(
    {
        "io",  # the I/O space, hw/i386/pc_q35.c, softmmu/physmem.c
        "gpex_mmio_window",  # hw/pci-host/gpex.c
        "gpex_ioport_window",
        "vga.mmio",  # hw/display/vga-pci.c
        "bochs-display-mmio",  # hw/display/bochs-display.c
        "rtc",  # hw/rtc/mc146818rtc.c
        "iocsr",  # hw/loongarch/virt.c
        "ahci",  # hw/ide/ahci-allwinner.c adds its own registers
        "aspeed.i2c",  # hw/i2c/aspeed_i2c.c
        "aspeed.sdhci",  # hw/sd/aspeed_sdhci.c
        "aspeed.smc.flash",  # hw/ssi/aspeed_smc.c
        "xlnx.versal-canfd",  # hw/net/can/xlnx-versal-canfd.c
        "gt64120-isd",  # hw/pci-host/gt64120.c
        "sabre-config",  # hw/pci-host/sabre.c
        "elroy",  # hw/pci-host/astro.c
        "astro",
        "dino",  # hw/pci-host/dino.c
    }
)
# hw/vfio/pci.c ("... base BAR 0"), hw/vfio/helpers.c (mmapped parts are ramd children),
# hw/virtio/virtio-pci.c (host notifiers of vhost-user back ends), hw/pci-host/aspeed_pcie.c (11.1).
_TERMINATING_PARENT_PATTERN = re.compile(
    r".* BAR \d+|virtio-pci-notify.*|pcie\.\d+\.(?:mmio|ioport)_window"
)

# Pure containers (memory_region_init()) that may have no visible child.
_EMPTY_CONTAINERS = frozenset(
    {
        "system",  # system/physmem.c
        "pci",  # hw/i386/pc_piix.c, pc_q35.c
        "smram",  # hw/pci-host/i440fx.c, q35.c
        "mem-container-smram",  # target/i386/kvm/kvm.c
        "memory",  # target/i386/tcg/system/tcg-cpu.c
        "mem-smram",
        "bus master container",  # hw/pci/pci.c
        "pci_bridge_pci",  # hw/pci/pci_bridge.c
        "pci_bridge_io",
        "gpex_mmio",  # hw/pci-host/gpex.c
        "gpex_ioport",
        "pci_io",  # hw/pci-host/versatile.c
        "pci_mem",
        "platform bus",  # hw/core/platform-bus.c
        "device-memory",  # hw/mem/memory-device.c
        "hotplug-memory",
        "virtio-mem",  # hw/virtio/virtio-mem.c, dynamic memslots
        "hv-balloon",  # hw/hyperv/hv-balloon.c
        "virtio-gpu-hostmem",  # hw/display/virtio-gpu-pci.c, virtio-vga.c
        "virtio-pci-io",  # hw/virtio/virtio-pci.c
        "sgx-epc",  # hw/i386/sgx.c
        "cxl_host_reg",  # hw/i386/pc.c
        "amdvi_root",  # hw/i386/amd_iommu.c
        "vtd-nodmar",  # hw/i386/intel_iommu.c
        "ich9-pm",  # hw/acpi/ich9.c
        "piix4-pm",  # hw/acpi/piix4.c
        "memhp container",  # hw/acpi/generic_event_device.c
        "cpuhp container",
        "piix-bmdma-container",  # hw/ide/piix.c
        "via-bmdma-container",  # hw/ide/via.c
        "cmd646-bmdma",  # hw/ide/cmd646.c
        "cirrus-lowmem-container",  # hw/display/cirrus_vga.c
        "cirrus-pci-bar0",
        "nvme-bar0",  # hw/nvme/ctrl.c
        "xhci",  # hw/usb/hcd-xhci.c
        "ehci",  # hw/usb/hcd-ehci.c
        "intel-hda-container",  # hw/audio/intel-hda.c
        "shpc-bar",  # hw/pci-bridge/pci_bridge_dev.c
        "e1000e-flash",  # hw/net/e1000e.c: backed by nothing
        "igb-flash",  # hw/net/igb.c
        "vmxnet3-msix-bar",  # hw/net/vmxnet3.c
        "rocker-msix-bar",  # hw/net/rocker/rocker.c
        "pci-testdev-membar",  # hw/misc/pci-testdev.c
        "multiserial",  # hw/char/serial-pci-multi.c
        "bcm2838-peripherals",  # hw/arm/bcm2838_peripherals.c
        "secure-memory",  # hw/arm/virt.c
        "secure-tag-memory",
        "tag-memory",
    }
)
_EMPTY_CONTAINER_PATTERN = re.compile(r".*-msix|vtd-[0-9a-f.]+")  # hw/pci/msix.c, intel_iommu.c

# virtio-mem and hv-balloon slots must not merge (QEMU 8.2, commit 533f5d6679)
_UNMERGEABLE_ALIAS = re.compile(r"memslot-\d+")


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a backed region would be visible if nothing were in front of it."""

    start: int
    size: int
    name: str
    owner: str | None
    offset: int


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered view, the extents of its backed regions, and what the tree left open.

    `ambiguous` holds pairs of names of overlapping siblings whose order QEMU does not print;
    `unresolved` names of alias targets that the text does not describe (rendered as they are).
    """

    view: FlatView
    extents: tuple[Extent, ...]
    ambiguous: tuple[tuple[str, str], ...]
    unresolved: tuple[str, ...]


class _Inherited(NamedTuple):
    """What a region passes on to everything below it and, as an alias, behind it."""

    readonly: bool = False
    nonvolatile: bool = False
    unmergeable: bool = False


@dataclass(slots=True)
class _Piece:
    """A region clipped to where it could be seen; its index is its rank."""

    start: int
    end: int
    region: Region
    offset: int
    flags: _Inherited


def render(root: Region | None, address_space: str = "memory") -> Rendering:
    """Render the linked tree below `root` (None: an address space with nothing in it).

    Raises MtreeError when an alias contains itself or aliases multiply without an end.
    """
    collector = _Collector()
    root = _flatview_root(root)
    if root is not None:
        collector.visit(root, 0, 0, ADDRESS_SPACE_SIZE, _Inherited(), 0)
    view = FlatView(list(_simplify(_sweep(collector.pieces))), address_space)
    extents = tuple(
        Extent(p.start, p.end - p.start, p.region.name, p.region.owner, p.offset)
        for p in collector.pieces
        if p.region.kind.backed
    )
    return Rendering(
        view,
        extents,
        tuple(sorted(collector.ambiguous)),
        tuple(sorted(collector.unresolved)),
    )


def _flatview_root(region: Region | None) -> Region | None:
    """The region that QEMU renders for an address space (`memory_region_get_flatview_root`).

    It skips whole aliases and containers with one child at 0, to share views between address
    spaces; the place of what it skips in *its* container is lost with it.
    """
    for _ in range(_MAX_DEPTH):
        if region is None or not region.enabled:
            return None
        if region.target is not None:
            target = region.resolved
            if target is None or region.offset or region.size < target.size:
                return region
            region = target
            continue
        if _terminates(region):
            return region
        enabled = [c for c in region.children if c.enabled]
        if not enabled:
            return None
        only = enabled[0]
        if len(enabled) > 1 or only.addr or region.size < only.size:
            return region
        region = only
    return region


class _Collector:
    """Walks the tree in QEMU's rendering order and notes every piece that could be visible."""

    def __init__(self) -> None:
        self.pieces: list[_Piece] = []
        self.ambiguous: set[tuple[str, str]] = set()
        self.unresolved: set[str] = set()
        self._order: dict[int, list[Region]] = {}
        self._visits = 0

    def visit(
        self, region: Region, base: int, lo: int, hi: int, flags: _Inherited, depth: int
    ) -> None:
        """`base` is where the parent's offset 0 lies; `[lo, hi)` is what the parent shows."""
        if not region.enabled:
            return
        self._visits += 1
        if depth > _MAX_DEPTH:
            raise MtreeError(region.line_no, region.name, "nested too deep, or contains itself")
        if self._visits > _MAX_VISITS:
            raise MtreeError(region.line_no, region.name, "aliases of aliases without an end")
        base += region.addr
        lo = max(lo, base)
        hi = min(hi, base + region.size)
        if lo >= hi:
            return
        if region.nonvolatile and not flags.nonvolatile:
            flags = flags._replace(nonvolatile=True)
        if region.target is not None:
            if _is_readonly_alias(region):
                flags = flags._replace(readonly=True)
            if _UNMERGEABLE_ALIAS.fullmatch(region.name):
                flags = flags._replace(unmergeable=True)
            target = region.resolved
            if target is None:
                self.unresolved.add(region.target)
                target = Region(0, region.offset + region.size, 0, region.kind, region.target)
            self.visit(target, base - target.addr - region.offset, lo, hi, flags, depth + 1)
            return
        if region.children:
            order = self._order.get(id(region))
            if order is None:
                order = self._order[id(region)] = self._render_order(region)
            for child in order:
                self.visit(child, base, lo, hi, flags, depth + 1)
        if _terminates(region):
            self.pieces.append(_Piece(lo, hi, region, lo - base, flags))

    def _render_order(self, region: Region) -> list[Region]:
        """Enabled children as `memory_region_update_container_subregions` ordered them.

        Higher priority first; among equals the one added last, which QEMU does not print.  At one
        address `info mtree` keeps that order.  Where equals overlap at different addresses, devices
        are taken to be added after RAM (MMCONFIG over RAM, hw/pci/pcie_host.c), and the smaller
        region after the larger (see `_in_front`).
        """
        groups: dict[int, list[Region]] = {}
        for child in region.children:
            if child.enabled:
                groups.setdefault(child.priority, []).append(child)
        out: list[Region] = []
        for priority in sorted(groups, reverse=True):
            out.extend(self._order_equals(groups[priority]))
        return out

    def _order_equals(self, siblings: list[Region]) -> list[Region]:
        siblings = sorted(siblings, key=attrgetter("addr"))  # stable: keeps QEMU's order
        out: list[Region] = []
        cluster: list[Region] = []
        end = 0
        for sibling in siblings:
            if cluster and sibling.addr >= end:
                out.extend(self._order_cluster(cluster))
                cluster, end = [], 0
            cluster.append(sibling)
            end = max(end, sibling.addr + sibling.size)
        out.extend(self._order_cluster(cluster))
        return out

    def _order_cluster(self, cluster: list[Region]) -> list[Region]:
        if len(cluster) < 2:
            return cluster
        by_addr: dict[int, list[Region]] = {}
        for sibling in cluster:
            by_addr.setdefault(sibling.addr, []).append(sibling)
        if len(by_addr) == 1:
            return cluster
        # take the best of the heads each time, so that QEMU's order at one address is kept
        heads = [(_in_front(stack[0]), n, 0, stack) for n, stack in enumerate(by_addr.values())]
        heapify(heads)
        out: list[Region] = []
        while heads:
            _, n, i, stack = heappop(heads)
            out.append(stack[i])
            if i + 1 < len(stack):
                heappush(heads, (_in_front(stack[i + 1]), n, i + 1, stack))
        for above, below in pairwise(out):
            if above.addr != below.addr:
                self.ambiguous.add((above.name, below.name))
        return out


def _in_front(region: Region) -> tuple[bool, int, int]:
    """Sorts siblings whose order is not printed: the least comes in front.

    Of equally large ones that is the one at the higher address: boards add devices in address
    order.
    """
    return (region.kind.backed, region.size, -region.addr)


def _is_readonly_alias(alias: Region) -> bool:
    """Whether QEMU made the alias read-only though its target may be written.

    `pam-rom` is, whatever the RAM behind it is made of (hw/pci-host/pam.c, `init_pam`); `isa-bios`
    of flash since 9.1 (hw/i386/x86-common.c, `x86_isa_bios_init`), of ROM it makes no difference,
    and RAM behind it is isapc's writable firmware.
    """
    return alias.name == "pam-rom" or (alias.name == "isa-bios" and alias.kind is Kind.ROMD)


def _terminates(region: Region) -> bool:
    """Whether the region answers accesses itself (QEMU's `mr->terminates`)."""
    if region.kind is not Kind.IO:
        return True
    name = region.name
    if region.children:
        return name in _TERMINATING_PARENTS or bool(_TERMINATING_PARENT_PATTERN.fullmatch(name))
    return not (name in _EMPTY_CONTAINERS or _EMPTY_CONTAINER_PATTERN.fullmatch(name))


def _sweep(pieces: list[_Piece]) -> Iterator[tuple[int, int, int, _Piece]]:
    """(start, end, rank, piece) of what is visible, in address order."""
    order = sorted(range(len(pieces)), key=lambda i: pieces[i].start)
    active: list[tuple[int, int]] = []  # (rank, end), a heap
    pos = 0
    i = 0
    n = len(order)
    while i < n or active:
        if not active:
            pos = pieces[order[i]].start
        while i < n and pieces[order[i]].start <= pos:
            rank = order[i]
            heappush(active, (rank, pieces[rank].end))
            i += 1
        while active and active[0][1] <= pos:
            heappop(active)
        if not active:
            continue
        rank, end = active[0]
        # visible until it ends or something of lower rank begins
        while i < n and pieces[order[i]].start < end:
            nxt = order[i]
            if nxt < rank:
                end = pieces[nxt].start
                break
            heappush(active, (nxt, pieces[nxt].end))
            i += 1
        yield pos, end, rank, pieces[rank]
        pos = end


def _simplify(visible: Iterator[tuple[int, int, int, _Piece]]) -> Iterator[FlatRange]:
    """Merge neighbours that continue each other (`flatview_simplify`, `can_merge`)."""
    last: FlatRange | None = None
    for start, end, _rank, p in visible:
        offset = p.offset + (start - p.start)
        region = p.region
        kind = Kind.ROM if p.flags.readonly else region.kind
        if (
            last is not None
            and last.end == start
            and last.name == region.name
            and last.owner == region.owner
            and last.offset + last.size == offset
            and last.kind is kind
            and last.nonvolatile == p.flags.nonvolatile
            and not last.unmergeable
            and not p.flags.unmergeable
        ):
            start, offset = last.start, last.offset
        elif last is not None:
            yield last
        size = end - start
        last = FlatRange(
            start=start,
            size=size,
            kind=kind,
            name=region.name,
            offset=offset,
            owner=region.owner,
            region_kind=region.kind,
            nonvolatile=p.flags.nonvolatile,
            unmergeable=p.flags.unmergeable,
            memslot=kind is not Kind.IO and start % HOST_PAGE == 0 and size % HOST_PAGE == 0,
        )
    if last is not None:
        yield last
