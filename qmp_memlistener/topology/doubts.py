"""What `info mtree` leaves open, what `render` guesses instead, and which guesses matter.

`info mtree` does not show the order of overlapping siblings, nor whether an i/o region answers
accesses itself (QEMU's `mr->terminates`) or only holds others: memory_region_init() and
memory_region_init_io() print alike (the kind `container` of 10.1 and later says no more than that
a region has no parent).  No list of names can be complete, and some names are used for either
(`isa-io` answers on one board and not on another).  So `answers` has a certainty:

- a region without children answers, unless its name or its size is one that containers have;
- a region with children holds others, unless it is known to answer;
- names that are in the lists below are certain: each was compared with QEMU's own flat view, on all
  machines of QEMU 7.2, 10.0 and 11.1 that start (tests/conformance/mtree/machines), or read in its
  sources.

A guess on which nothing visible depends is not reported (`Doubts`).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from .model import Kind, Region

__all__ = [
    "NOTHING",
    "Answering",
    "Clipped",
    "Doubts",
    "Inherited",
    "Overlap",
    "Visible",
    "answers",
]


# With children: memory_region_init_io() and memory_region_add_subregion() on the same region.
_ANSWERING_PARENTS = frozenset(
    {
        "ahci", "aspeed.i2c", "aspeed.sdhci", "aspeed.smc.flash", "astro", "bochs-display-mmio",
        "dino", "elroy", "gpex_ioport_window", "gpex_mmio_window", "gt64120-isd", "io", "iocsr",
        "megasas-mmio", "pcie.0.mmio_window", "rtc", "sabre-config", "vga.mmio", "via-pm",
        "xlnx.versal-canfd", "xtfpga.io",
    }
)  # fmt: skip
# hw/vfio/pci.c ("... base BAR 0"), hw/vfio/helpers.c (mmapped parts are ramd children),
# hw/virtio/virtio-pci.c (host notifiers of vhost-user back ends), hw/pci-host/aspeed_pcie.c (11.1),
# hw/pci-host/astro.c.
_ANSWERING_PARENT = re.compile(
    r".* BAR \d+|virtio-pci-notify.*|pcie\.\d+\.(?:mmio|ioport)_window|elroy\d"
)

# memory_region_init(), with children or without.
_CONTAINERS = frozenset(
    {
        "amdvi_root", "bcm2838-peripherals", "bus master container", "cirrus-lowmem-container",
        "cirrus-pci-bar0", "cmd646-bmdma", "cpuhp container", "cxl_host_reg", "device-memory",
        "e1000e-flash", "ehci", "gpex_ioport", "gpex_mmio", "hotplug-memory", "hv-balloon",
        "ich9-pm", "igb-flash", "intel-hda-container", "isa-mem", "mem-container-smram",
        "mem-smram", "memhp container", "multiserial", "nvme-bar0", "pci", "pci bus memory",
        "pci-io", "pci-mem", "pci-memory", "pci-mmio", "pci-pio", "pci-testdev-membar",
        "pci.mem", "pci0-mem", "pci1-mem", "pci_bridge_io", "pci_bridge_pci", "pci_io",
        "pci_mem", "piix-bmdma-container", "piix4-pm", "platform bus", "rocker-msix-bar",
        "secure-memory", "secure-tag-memory", "sgx-epc", "shpc-bar", "smram", "system",
        "tag-memory", "unin-pci-mmio", "via-bmdma-container", "virtio-gpu-hostmem", "virtio-mem",
        "virtio-pci-io", "vmxnet3-msix-bar", "vtd-nodmar", "xhci", "xive-vc-end", "xive-vc-ipi",
    }
)  # fmt: skip
_NUMBERED_CONTAINER = re.compile(r"vtd-[0-9a-f.]+|pec-.*-mmio\d*|pci@\d+\.(?:mmio|io)")

# The same, seen with children only: without any they may be something else of that name.
_CONTAINING_PARENTS = frozenset(
    {
        "a15mp-priv-container", "a9mp-priv-container", "apu-mr", "arm-sse-cpu-container0",
        "arm-sse-cpu-container1", "armsse-container", "armv7m-container", "aspeed.adc",
        "aspeed.i3c.container", "aspeed.intc.container", "aspeed.spi_boot_container", "aux-io",
        "bcm2835-gpu", "bcm2835-mbox", "bcm2835-peripherals", "bic-memory", "bm-dino",
        "bm-raven", "bmc-memory", "cadence.sdhci-container", "container", "designware-i2c",
        "dma", "e500-ccsr", "exynos4210-cpu-container", "exynos4210-dist-container",
        "ftgmac100.container", "icp-0", "imx6.ccm", "imx6ul.ccm", "imx7.analog", "imx8mp.analog",
        "isa-fw", "lpc-opb", "mchp.pfsoc.ioscb", "memory", "mmio", "mpcore-priv-container",
        "mps2-tz-eth-usb-container", "mr-apu", "mr-ps-switch", "musca-device-container",
        "next.scsi", "npcm7xx.sdhci-container", "nrf51-container", "omap-gpmc-file", "onenand",
        "openpic", "pci-container", "pci1-io", "pcie-bus-address-space-root", "pcie-bus-memory",
        "pcie.0.iommu_root", "ps-alias-for-rpu", "realview-gic-container", "rpu-mr",
        "sabre-pci-ioport", "sm501.mmio", "usb_dwc3", "xlnx-cframe-reg", "xlnx-versal-cfu-apb",
        "xlnx-zynmp.rtc", "xlnx.csu_dma", "xlnx.pmu_io_intc", "xlnx.v-dp", "xlnx.versal-ospi",
        "xlnx.versal-pmc-iou-slcr", "xlnx.versal-usb2-ctrl-regs", "xlnx.zynqmp-can",
        "xlnx.zynqmp_ipi", "xscom-0",
    }
)  # fmt: skip

# Without children, and they answer, though they look as containers do.
_ANSWERING_LEAVES = frozenset(
    {
        "a53_dap", "aspeed.io", "ast2700.io", "ast2700.ltpi", "audio_dsp", "bcm2835-dbus",
        "bitband", "cache-and-tlb", "dbg-leds", "ddr-mem", "ddr_phy", "ddrc_cfg", "e1000-mmio",
        "e1000e-mmio", "edu-mmio", "empty-slot", "gpio", "gpio2", "gpio3", "homer-main-memory",
        "intc", "io", "lpcm", "lqspi", "mchp.pfsoc.ioscb.ccc", "msi_window", "next.mmio",
        "npcm7xx.ahbpci", "npcm8xx.ahbpci", "npcm8xx.rootc", "nrf51_soc.io", "nrf51_soc.private",
        "omap-id", "pci-isa-mmio", "pci-vpb-config", "pci-vpb-selfconfig", "pci0-conf",
        "pci0-iack", "PCI_2", "pcie-mmcfg-mmio", "pcie1_mem", "pciio", "pm-smbus", "pnv-pnor",
        "PSRAM", "pxa2xx-pcmcia-attribute", "pxa2xx-pcmcia-common", "pxa2xx-pcmcia-io",
        "qspi1_rx_buffer", "qspi_mem", "ram-empty", "rc4030.dma", "riscv.aplic",
        "riscv.sifive.plic", "ROMCS", "sabre-pci-config", "tz-mpc-upstream", "unin-pci-isa-mmio",
        "vga-lowmem", "vga-mmio", "xlnx.versal-ospi-dac", "xps_gpio",
    }
)  # fmt: skip
_ANSWERING_LEAF = re.compile(
    r"aspeed\.(?:i2c\.bus|smc\.flash)\.\d+"
    r"|ethlite\.[rt]x\[\d\]io"
    r"|iommu-.*"
    r"|microchip\.pfsoc\.(?:buserr_unit|fabricfic)\d(?:_mem)?"
    r"|npcm\dxx\.spixcs\d"
    r"|RESERVED \d"
    r"|smmuv3-iommu-memory-region-.*"
    r"|sx1\.cs\d"
    r"|xscom-.*"
    r"|ast2700\.iomem\d"
    r"|ide-mmio\.\d"
    r"|[cdp]chip\d"
)

_WORDS = ("bus", "container", "msix", "root", "space", "window")
# What a whole bus is mapped through has 64 KiB of ports, or more; a device's own ports are fewer.
_BUS_WORDS = (*_WORDS, "io", "isa", "mem", "memory", "mmio", "pci", "pio")
_BUS_SIZE = 64 << 10
_NUMBER = "0123456789"
_BUS_WINDOW = re.compile(r"(?:.*[^a-z])?(?:pci\w?|isa|bus)\d*[-_. ](?:mem|memory|mmio|io|pio)\d*")
_LIKE_A_CONTAINER = 16 << 20  # bytes; registers take less


class Answering(NamedTuple):
    """`yes`: the region answers itself; `certain`: that is known and not a guess."""

    yes: bool
    certain: bool


_YES, _NO = Answering(True, True), Answering(False, True)
_PERHAPS, _HARDLY = Answering(True, False), Answering(False, False)


def answers(region: Region) -> Answering:
    """Whether the region itself is visible where no child of it is."""
    if region.kind is not Kind.IO:
        return _YES
    return _parent(region.name) if region.children else _leaf(region.name, region.size)


def _is_container(name: str) -> bool:
    if name.endswith("-msix"):  # hw/pci/msix.c
        return True
    # hw/i386/intel_iommu.c, hw/pci-host/pnv_phb4_pec.c, hw/ppc/spapr_pci.c
    if name.startswith(("vtd-", "pec-", "pci@")) and _NUMBERED_CONTAINER.fullmatch(name):
        return True
    return name in _CONTAINERS


def _parent(name: str) -> Answering:
    if name in _ANSWERING_PARENTS or _ANSWERING_PARENT.fullmatch(name):
        return _YES
    if name in _CONTAINING_PARENTS or _is_container(name):
        return _NO
    return _HARDLY


@lru_cache(maxsize=1 << 14)  # one snapshot shows the names of the last
def _leaf(name: str, size: int) -> Answering:
    if _is_container(name):
        return _NO
    if size < _LIKE_A_CONTAINER:
        words = _WORDS if size < _BUS_SIZE else _BUS_WORDS
        if not name.rstrip(_NUMBER).rstrip("-_. ").lower().endswith(words):
            return _YES
    if name in _ANSWERING_LEAVES or _ANSWERING_LEAF.fullmatch(name):
        return _YES
    return _HARDLY if _BUS_WINDOW.fullmatch(name) else _PERHAPS


# -- which guesses matter ----------------------------------------------------------------------


NOTHING = "nothing"
"""Stands for what is behind a region when no other is."""

# Steps in finding out what overlapping siblings hide.  What is beyond is named without a closer
# look.
_MAX_LOOKS = 200_000


class Inherited(NamedTuple):
    """What a region passes on to everything below it and, as an alias, behind it."""

    readonly: bool = False
    nonvolatile: bool = False
    unmergeable: bool = False
    device_memory: bool = False


@dataclass(slots=True)
class Clipped:
    """A region clipped to where it could be seen; its index is its rank."""

    start: int
    end: int
    region: Region
    offset: int
    flags: Inherited


Visible = tuple[int, int, int, Clipped]
"""Start, end, rank and piece of what is visible."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """`[start, end)` is of two siblings; `front` and `behind` are the ranks of their pieces."""

    start: int
    end: int
    front: range
    behind: range
    names: tuple[str, str]


class Doubts:
    """Collects guesses while `pieces` grow, and then finds those that matter.

    `overlaps` are siblings whose order is guessed, `unseen` pairs of names that are beyond all
    limits.
    """

    def __init__(self, pieces: Sequence[Clipped]) -> None:
        self.overlaps: list[Overlap] = []
        self.unseen: set[tuple[str, str]] = set()
        self._pieces = pieces
        self._taken: set[int] = set()
        self._ghosts: list[tuple[int, Clipped]] = []
        self._visible: Sequence[Visible] = ()
        self._starts: list[int] = []
        self._looks = 0

    def note_guess(self, piece: Clipped, *, taken: bool) -> None:
        """Whether this region answers is guessed: `taken` for one that does.

        Call it when its place among the pieces is at their end.
        """
        if taken:
            self._taken.add(len(self._pieces))
        else:
            self._ghosts.append((len(self._pieces), piece))

    def pairs(self, visible: Sequence[Visible]) -> set[tuple[str, str]]:
        """Names of two regions of which either could be visible somewhere; the first is shown."""
        self._visible = visible
        self._starts = [v[0] for v in visible]
        out = self.unseen | {o.names for o in self.overlaps if self._matters(o)}
        for rank, ghost in self._ghosts:
            shown = self._behind(rank, ghost)
            if shown is not None:
                out.add((shown, ghost.region.name))
        if self._taken:
            out |= {(p.region.name, NOTHING) for _, _, rank, p in visible if rank in self._taken}
        return out

    def _between(self, start: int, end: int) -> Iterator[Visible]:
        """What is visible there, clipped; it ends early when too much was looked at."""
        i = max(bisect_right(self._starts, start) - 1, 0)
        for lo, hi, rank, piece in islice(self._visible, i, None):
            self._looks += 1
            if lo >= end or self._looks > _MAX_LOOKS:
                return
            if hi > start:
                yield max(lo, start), min(hi, end), rank, piece

    def _matters(self, overlap: Overlap) -> bool:
        """The one in front hides something of the one behind."""
        pieces = self._pieces
        for lo, hi, rank, _ in self._between(overlap.start, overlap.end):
            if rank in overlap.front:
                self._looks += len(overlap.behind)
                for behind in overlap.behind:
                    if pieces[behind].start < hi and pieces[behind].end > lo:
                        return True
        return self._looks > _MAX_LOOKS

    def _behind(self, rank: int, ghost: Clipped) -> str | None:
        """What is visible where the region would be; None when it would be hidden everywhere."""
        at = ghost.start
        for lo, hi, other, piece in self._between(ghost.start, ghost.end):
            if lo > at:
                return NOTHING
            if other >= rank:
                return piece.region.name
            at = hi
        return NOTHING if at < ghost.end else None
