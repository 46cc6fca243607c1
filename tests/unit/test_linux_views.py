"""What a Linux guest prints about itself, parsed.  The texts are a guest's own."""

from __future__ import annotations

import pytest

from qmp_memlistener.errors import InputError
from qmp_memlistener.guests import PciAddress
from tests.support import linux_views
from tests.support.linux_views import Bar, BlockDevice, MemoryBlocks, NetDevice, PciDevice


def pci_line(bdf: str, ids: str, starts: list[str], sizes: list[str], driver: str = "") -> str:
    """A line as the kernel's show_device prints it: 16 digits a number, the driver after a tab."""
    numbers = [*starts, *["0"] * (7 - len(starts)), *sizes, *["0"] * (7 - len(sizes))]
    return "\t".join([bdf, ids, "b", *(n.rjust(16) for n in numbers), driver])


def test_pci_functions_come_by_address_with_memory_bars_and_driver() -> None:
    text = "\n".join(
        [
            pci_line(
                "0100", "1af41041", ["0", "fe840000", "0", "0", "fde0000c"], ["0", "1000"], "x"
            ).replace("x", "virtio-pci"),
            pci_line("0008", "1af41110", ["fea00000", "0", "fd40000c"], ["100", "0", "400000"]),
            pci_line("0000", "808629c0", [], []),
        ]
    )
    assert linux_views.parse_pci(text + "\n") == (
        PciDevice(PciAddress(0, 0), 0x8086, 0x29C0, (), None),
        PciDevice(
            PciAddress(0, 1),
            0x1AF4,
            0x1110,
            (Bar(0, 0xFEA00000, 0x100), Bar(2, 0xFD400000, 0x400000)),
            None,
        ),
        PciDevice(PciAddress(1, 0), 0x1AF4, 0x1041, (Bar(1, 0xFE840000, 0x1000),), "virtio-pci"),
    )


def test_ports_are_no_memory_bars() -> None:
    ide = pci_line("0009", "80867010", ["1f0", "3f4", "170", "374", "c041"], ["8", "1", "8", "1"])
    assert linux_views.parse_pci(ide)[0].bars == ()


@pytest.mark.parametrize("text", ["0008", "zz\t1af41110", "0008\t1af41110\tb\t0"])
def test_what_is_no_pci_line_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="/proc/bus/pci/devices"):
        linux_views.parse_pci(text)


def test_memory_total_is_bytes() -> None:
    assert linux_views.parse_meminfo("MemTotal:         481300 kB\nMemFree: 1 kB\n") == 492851200
    with pytest.raises(InputError, match="MemTotal"):
        linux_views.parse_meminfo("MemFree: 1 kB\n")


def test_memory_blocks_online_and_present() -> None:
    text = "8000000\nmemory0/state:online\nmemory1/state:online\nmemory32/state:offline\n"
    blocks = linux_views.parse_memory(text)
    assert blocks == MemoryBlocks(size=128 << 20, online=2, present=3)
    assert blocks.online_bytes == 256 << 20
    for bad in ("", "memory0/state:online\n", "8000000\nmemory0\n"):
        with pytest.raises(InputError):
            linux_views.parse_memory(bad)


def test_net_devices_without_the_loopback() -> None:
    text = "lo/address:00:00:00:00:00:00\neth1/address:52:54:00:00:00:02\n"
    text += "eth0/address:52:54:00:00:00:01\n"
    assert linux_views.parse_net(text) == (
        NetDevice("eth0", "52:54:00:00:00:01"),
        NetDevice("eth1", "52:54:00:00:00:02"),
    )
    assert linux_views.parse_net("") == ()


def test_block_devices_with_a_medium() -> None:
    text = "vda/size:131072\nsr0/size:0\npmem0/size:524288\n"
    assert linux_views.parse_block(text) == (
        BlockDevice("pmem0", 256 << 20),
        BlockDevice("vda", 64 << 20),
    )
    with pytest.raises(InputError, match="size of a block device"):
        linux_views.parse_block("vda/size:many\n")
