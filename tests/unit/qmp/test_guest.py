"""What a guest is asked: typed answers, and that unknown is not zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import pytest

from qmp_memlistener.errors import CommandFailed, DeadlineExceeded, ProtocolViolation
from qmp_memlistener.qmp import Monitor, Reply
from qmp_memlistener.qmp.guest import (
    GuestLook,
    GuestVcpu,
    MemoryDevice,
    RunStatus,
    count_ram_blocks,
    read_backends,
    read_device_memory,
    read_memory_devices,
    read_migration,
    read_status,
    read_vcpus,
    translate,
    try_status,
)
from qmp_memlistener.qmp.guest_devices import (
    PciBar,
    read_children,
    read_netdevs,
    read_pci_functions,
    read_windows,
)

pytestmark = pytest.mark.asyncio
HMP = "human-monitor-command"


class Told:
    """A monitor of a QEMU that answers only this; what it does not have it refuses."""

    target = "unix:/x"

    def __init__(self, **answers: object) -> None:
        self._answers = {name.replace("_", "-"): value for name, value in answers.items()}

    async def execute(
        self, name: str, _: Mapping[str, object] | None = None, **__: float
    ) -> object:
        answer = self._answers.get(name)
        if isinstance(answer, Exception):
            raise answer
        if answer is None:
            raise CommandFailed(name, "CommandNotFound", "not found")
        return answer

    async def timed(self, name: str, _: Mapping[str, object] | None = None, **__: float) -> Reply:
        return Reply(await self.execute(name), 1, 2)


def told(**answers: object) -> Monitor:
    return cast("Monitor", Told(**answers))


async def test_the_status_is_told_or_raised() -> None:
    running = told(query_status={"status": "running", "running": True, "singlestep": False})
    assert await read_status(running) == RunStatus("running", True)
    answers: tuple[object, ...] = ({}, {"status": 1, "running": True}, [], "running")
    for odd in answers:
        with pytest.raises(ProtocolViolation, match="query-status"):
            await read_status(told(query_status=odd))
        assert await try_status(told(query_status=odd), deadline=1.0) is None
    gone = told(query_status=DeadlineExceeded("no answer"))
    with pytest.raises(DeadlineExceeded):
        await read_status(gone)
    assert await try_status(gone, deadline=1.0) is None


async def test_a_qemu_that_cannot_migrate_does_not() -> None:
    assert await read_migration(told()) == "none"
    assert await read_migration(told(query_migrate={})) == "none"
    assert await read_migration(told(query_migrate={"status": "active"})) == "active"


async def test_vcpus_that_are_not_told_are_not_none_at_all() -> None:
    assert await read_vcpus(told(), deadline=1.0) is None
    assert await read_vcpus(told(query_cpus_fast=[]), deadline=1.0) == []
    answer = [{"cpu-index": 3, "thread-id": 70, "qom-path": "/x"}]
    assert await read_vcpus(told(query_cpus_fast=answer), deadline=1.0) == [GuestVcpu(3, 70)]


async def test_memory_devices_of_all_types_are_one() -> None:
    dimm = {"id": "d0", "addr": 1 << 32, "slot": 0, "node": 0, "size": 4096, "hotplugged": True,
            "memdev": "/objects/m0", "hotpluggable": True}  # fmt: skip
    virtio = {"id": "v0", "memaddr": 1 << 33, "requested-size": 2, "size": 1, "max-size": 8,
              "block-size": 1, "node": 0, "memdev": "/objects/m1"}  # fmt: skip
    monitor = told(
        query_memory_devices=[
            {"type": "dimm", "data": dimm},
            {"type": "virtio-mem", "data": virtio},
            {"type": "hv-balloon", "data": {"max-size": 5}},
        ]
    )
    assert await read_memory_devices(monitor) == (
        MemoryDevice("dimm", "d0", 1 << 32, 4096, "/objects/m0", hotpluggable=True),
        MemoryDevice(
            "virtio-mem", "v0", 1 << 33, 1, "/objects/m1", requested=2, max_size=8, block_size=1
        ),
        MemoryDevice("hv-balloon", None, None, None, max_size=5),
    )
    assert await read_memory_devices(told()) == ()


async def test_ram_blocks_are_counted_where_qemu_tells_them() -> None:
    text = (
        "              Block Name    PSize\r\n  pc.ram    4 KiB  0x0 0x1\r\n  vga  4 KiB  0x2\r\n"
    )
    assert await count_ram_blocks(told(**{HMP: text})) == 2
    assert await count_ram_blocks(told()) is None


async def test_what_a_machine_does_not_have() -> None:
    assert await read_device_memory(told(qom_list=[{"name": "type", "type": "string"}])) is None
    assert await read_backends(told()) == {}
    sizes = [{"id": "m0", "size": 5, "merge": True}, {"size": 7}]
    assert await read_backends(told(query_memdev=sizes)) == {"m0": 5}


@pytest.mark.parametrize(
    ("text", "gpa"),
    [("gpa: 0x1000\r\n", 0x1000), ("gpa: 0\r\n", 0), ("Unmapped\r\n", None), ("", None)],
)
async def test_an_address_is_translated_or_has_no_page(text: str, gpa: int | None) -> None:
    assert await translate(told(**{HMP: text}), 0, 0xFFFF, deadline=1.0) == gpa


async def test_children_are_told_from_other_properties() -> None:
    listed = [
        {"name": "d0", "type": "child<pc-dimm>"},
        {"name": "type", "type": "string"},
        {"name": "bus", "type": "link<bus>"},
    ]
    assert await read_children(told(qom_list=listed), "/machine/peripheral") == {"d0": "pc-dimm"}


async def test_network_clients_and_their_peers() -> None:
    text = (
        "hub 0\r\n \\ hub0port1: net2: index=0,type=user\r\n \\ hub0port0\r\n"
        "net0: index=0,type=nic\r\n \\ n0: index=0,type=user,net=10.0.2.0\r\n"
    )
    assert await read_netdevs(told(**{HMP: text})) == {
        "hub0port1",
        "net2",
        "hub0port0",
        "net0",
        "n0",
    }
    assert await read_netdevs(told()) == frozenset()


async def test_pci_functions_behind_bridges() -> None:
    closed, window = {"base": 1, "limit": 0}, {"base": 0x1000, "limit": 0x1FFF}
    behind = {"bus": 1, "slot": 2, "function": 0, "qdev_id": "d0",
              "regions": [{"bar": 0, "type": "memory", "size": 16, "address": -1},
                          {"bar": 1, "type": "memory", "size": 32, "address": 4096}]}  # fmt: skip
    bridge = {"bus": 0, "slot": 1, "function": 0, "qdev_id": "rp0", "regions": [],
              "pci_bridge": {"bus": {"memory_range": window, "prefetchable_range": closed},
                             "devices": [behind]}}  # fmt: skip
    monitor = told(query_pci=[{"bus": 0, "devices": [bridge]}])
    first, second = await read_pci_functions(monitor)
    assert (first.id, first.windows) == ("rp0", ((0x1000, 0x2000), (0, 0)))
    assert (second.id, second.bus, second.windows) == ("d0", 1, None)
    assert second.bars == (PciBar(None, 16), PciBar(4096, 32))
    assert await read_windows(monitor) == {"rp0": ((0x1000, 0x2000), (0, 0))}


async def test_a_migration_that_came_before_our_cont() -> None:
    before, after = GuestLook("paused", "none", ()), GuestLook("running", "completed", (1,))
    assert after.ran_twice(before)
    assert not after.ran_twice(after)
    assert not GuestLook("paused", "completed", (1,)).ran_twice(before)
