"""Where a PCI device goes: the bus and slot that are chosen, and what is refused beforehand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.qmp.guest_devices import PciBus, slot_text
from qmp_memlistener.updates.model import Addition, Role, Strategy, UpdateRefused, Value
from qmp_memlistener.updates.pci_plans import on_a_bus

MIB = 1 << 20
WINDOWS = ((0xFE000000, 0xFE200000), (0xF0000000, 0xF2000000))
PC = PciBus("pci.0", None, express=False)
Q35 = PciBus("pcie.0", None, express=True, refusal="QEMU has no hotplug for the bus pcie.0")
PORT = PciBus("rp0", "rp0", express=True, windows=WINDOWS)
TAKEN = replace(PORT, name="rp1", bridge="rp1", taken={(0, 0): "/machine/peripheral/net0"})
OFF = replace(PORT, name="rp2", bridge="rp2", refusal="rp2 has hotplug=off")
BRIDGE = PciBus("b0", "b0", express=False)
SHPC = replace(BRIDGE, shpc=True)


def device(**properties: Value) -> Addition:
    return Addition(Role.DEVICE, "d0", {"driver": "x", "id": "d0", **properties}, typed=True)


def placed(
    *buses: PciBus,
    memory: int | None = None,
    strategy: Strategy = Strategy.DIRECT,
    of: dict[str, Value] | None = None,
) -> tuple[object, object]:
    """Bus and slot that QEMU is asked for."""
    found = on_a_bus(device(**(of or {})), strategy, buses, memory).arguments
    return found.get("bus"), found.get("addr")


def test_a_root_bus_that_takes_devices_is_left_to_qemu() -> None:
    assert placed(PC, PORT) == (None, None)
    assert placed(PC, of={"addr": "5"}) == (None, "5")
    assert placed() == (None, None)


@pytest.mark.parametrize(
    ("buses", "where"),
    [
        ((Q35, PORT), ("rp0", None)),
        ((Q35, OFF, TAKEN, PORT), ("rp0", None)),
        ((Q35, TAKEN, BRIDGE), ("b0", None)),
        ((Q35, BRIDGE, PORT), ("rp0", None)),
        ((Q35, OFF, SHPC), ("b0", "1.0")),
        ((Q35, replace(SHPC, taken={(1, 0): "/machine/peripheral/a"})), ("b0", "2.0")),
        ((replace(PC, refusal="no hotplug"), BRIDGE), ("b0", None)),
        ((replace(PC, taken={(n, 0): "x" for n in range(32)}), BRIDGE), ("b0", None)),
    ],
)
def test_the_first_place_that_takes_it(
    buses: tuple[PciBus, ...], where: tuple[object, object]
) -> None:
    assert placed(*buses) == where


def test_a_slot_that_was_named_is_kept() -> None:
    assert placed(Q35, PORT, BRIDGE, of={"addr": "3"}) == ("b0", "3")
    assert placed(Q35, TAKEN, PORT, of={"addr": "0.1"}) == ("rp1", "0.1")
    assert placed(Q35, SHPC, of={"addr": "1f.7", "bus": "b0"}) == ("b0", "1f.7")
    assert placed(PC, of={"addr": 5 << 3 | 1}) == (None, 5 << 3 | 1)


@pytest.mark.parametrize(
    ("buses", "of", "words"),
    [
        ((Q35,), {}, "no free PCIe root port"),
        ((Q35, OFF, TAKEN), {}, "rp2 has hotplug=off; the root port rp1 has a device already"),
        ((Q35, PORT), {"bus": "pcie.0"}, r"root bus pcie\.0"),
        ((Q35, OFF), {"bus": "rp2"}, "rp2 has hotplug=off"),
        ((Q35, TAKEN), {"bus": "rp1"}, "rp1 has a device already"),
        ((Q35, TAKEN), {"bus": "rp1", "addr": "0"}, r"slot 0\.0 of rp1 is taken by net0"),
        ((Q35, PORT), {"bus": "rp0", "addr": "1"}, "rp0 has slot 0 only"),
        ((Q35, PORT), {"addr": "1"}, "no free PCIe root port"),
        ((Q35, SHPC), {"bus": "b0", "addr": "0"}, "b0 has no slot 0"),
        ((PC,), {"bus": "pci.0", "addr": "20"}, "pci.0 has no slot 20"),
        (
            (replace(PC, taken={(n, 0): "x" for n in range(32)}),),
            {},
            r"no free slot on pci\.0 or behind a bridge",
        ),
    ],
)
def test_what_has_no_place(buses: tuple[PciBus, ...], of: dict[str, Value], words: str) -> None:
    with pytest.raises(UpdateRefused, match=words) as caught:
        placed(*buses, of=of)
    assert "nothing was touched" in caught.value.message
    assert caught.value.remedy


def test_a_bus_that_is_not_known_is_left_to_qemu() -> None:
    assert placed(Q35, PORT, of={"bus": "pxb0", "addr": "7"}) == ("pxb0", "7")


def test_the_port_with_room_is_taken() -> None:
    small = replace(PORT, name="small", bridge="small", windows=((0, 0), (0xF0000000, 0xF0100000)))
    for strategy in (Strategy.DIRECT, Strategy.HOLE):
        assert placed(Q35, small, PORT, memory=16 * MIB, strategy=strategy) == ("rp0", None)


def test_hole_wants_a_window_that_is_large_enough() -> None:
    with pytest.raises(UpdateRefused, match="bridge windows would have to move") as caught:
        placed(Q35, PORT, memory=64 * MIB, strategy=Strategy.HOLE)
    assert "id=rp0,pref64-reserve=64M" in str(caught.value.remedy)
    assert placed(Q35, PORT, memory=64 * MIB) == ("rp0", None)
    assert placed(PC, memory=64 * MIB, strategy=Strategy.HOLE) == (None, None), "no window to move"


SLOTS = st.tuples(st.integers(0, 31), st.integers(0, 7))
BUSES = st.lists(
    st.builds(
        PciBus,
        name=st.sampled_from("abcdef"),
        bridge=st.sampled_from("abcdef"),
        express=st.booleans(),
        refusal=st.none() | st.just("it is off"),
        shpc=st.booleans(),
        taken=st.dictionaries(SLOTS, st.just("/machine/peripheral/x")),
    ).map(lambda b: replace(b, bridge=b.name, shpc=b.shpc and not b.express)),
    max_size=6,
    unique_by=lambda b: b.name,
)


@given(BUSES, st.none() | SLOTS)
def test_it_goes_where_a_device_can_go_or_nowhere(
    buses: list[PciBus], place: tuple[int, int] | None
) -> None:
    of: dict[str, Value] = {} if place is None else {"addr": slot_text(place)}
    possible = {
        b.name
        for b in buses
        if b.refusal is None
        and (b.free is not None if place is None else place[0] in b.slots and place not in b.taken)
    }
    try:
        name, addr = placed(Q35, *buses, of=of)
    except UpdateRefused:
        assert not possible
        return
    assert name in possible
    bus = next(b for b in buses if b.name == name)
    if place is None and bus.shpc:
        assert addr == slot_text((bus.free or 0, 0))
        assert bus.free
    else:
        assert addr == of.get("addr")
