"""What libvirt is given for the commands of a plan."""

from __future__ import annotations

import pytest

from qmp_memlistener.qmp import Command
from qmp_memlistener.updates.managed import device_xml, through_manager
from qmp_memlistener.updates.model import (
    Addition,
    Awaited,
    Role,
    UpdatePlan,
    UpdateRefused,
    UpdateStep,
    Value,
    adding,
)
from qmp_memlistener.updates.options import parse_addition

MIB = 1 << 20


def made(role: Role, text: str) -> Addition:
    return parse_addition(role, text)


def xml(device: str, backend: str, role: Role = Role.OBJECT) -> str:
    other = made(role, backend)
    return device_xml(made(Role.DEVICE, device), {other.id: other})


def typed(kind: str, name: str, more: dict[str, Value]) -> Addition:
    return Addition(Role.OBJECT, name, {"qom-type": kind, "id": name, **more}, typed=True)


def test_a_dimm_with_its_place() -> None:
    backend = typed("memory-backend-ram", "m0", {"size": 256 * MIB})
    device = made(Role.DEVICE, "pc-dimm,id=d0,memdev=m0,slot=1,addr=0x100000000,node=0")
    assert device_xml(device, {"m0": backend}) == (
        "<memory model='dimm'><target><size unit='B'>268435456</size><node>0</node></target>"
        '<alias name="ua-d0"/><address type=\'dimm\' slot="1" base="0x100000000"/></memory>'
    )


def test_shared_memory_keeps_its_file_and_its_address() -> None:
    file: dict[str, Value] = {"size": MIB, "share": True, "mem-path": "/dev/shm/iv"}
    backend = typed("memory-backend-file", "m0", file)
    device = made(Role.DEVICE, "ivshmem-plain,id=ua-iv0,memdev=m0,bus=pci.2,addr=0x1f.3")
    found = device_xml(device, {"m0": backend})
    assert "<shmem name=\"iv\"><model type='ivshmem-plain'/><size unit='B'>1048576</size>" in found
    assert '<alias name="ua-iv0"/>' in found
    assert "bus='0x02' slot='0x1f' function='0x3'" in found


def test_text_of_users_stays_text() -> None:
    found = xml("virtio-rng-pci,id=a,rng=r", "rng-random,id=r,filename=/dev/<x>&")
    assert "/dev/&lt;x&gt;&amp;" in found
    assert "<x>" not in found


@pytest.mark.parametrize(
    ("device", "backend", "role"),
    [
        ("nvme,id=x,serial=1", "memory-backend-ram,id=m,size=1M", Role.OBJECT),
        ("virtio-net-pci,id=x,netdev=n,mq=on", "user,id=n", Role.NETDEV),
        ("virtio-net-pci,id=x,netdev=n", "user,id=n,hostfwd=tcp::1-:2", Role.NETDEV),
        ("virtio-net-pci,id=x,netdev=other", "user,id=n", Role.NETDEV),
        ("virtio-net-pci,id=x,netdev=n,bus=odd.0", "user,id=n", Role.NETDEV),
        ("ivshmem-plain,id=x,memdev=m", "memory-backend-ram,id=m,size=1M", Role.OBJECT),
        ("ivshmem-plain,id=x,memdev=m", "memory-backend-file,id=m,mem-path=/x", Role.OBJECT),
    ],
)
def test_what_libvirt_would_make_otherwise_is_refused(
    device: str, backend: str, role: Role
) -> None:
    with pytest.raises(UpdateRefused, match="nothing was touched"):
        xml(device, backend, role)


def test_a_plan_becomes_one_change_and_keeps_its_device() -> None:
    backend = typed("memory-backend-ram", "qml-mem0", {"size": MIB})
    device = made(Role.DEVICE, "pc-dimm,id=qml-dimm0,memdev=qml-mem0")
    plan = UpdatePlan(
        prepare=(adding(backend),),
        update=(adding(device),),
        awaited=Awaited.TAKEN,
        devices=("qml-dimm0",),
        notes=("qml-dimm0 is the new DIMM, qml-mem0 the memory behind it",),
    )
    found = through_manager(plan, {"ua-qml-dimm0"})
    assert found.prepare == found.finish == ()
    assert found.devices == ("ua-qml-dimm0-2",)
    assert [s.command.name for s in found.update] == ["attach-device"]
    assert "ua-qml-dimm0-2" in str(found.update[0].command.arguments)
    assert found.notes == ("libvirt calls it ua-qml-dimm0-2: ids of users begin with ua- there",)


def test_going_and_resizing() -> None:
    gone = UpdateStep(Command("device_del", {"id": "dimm0"}), "device dimm0")
    more = {"path": "/machine/peripheral/vm0", "property": "requested-size", "value": MIB}
    plan = UpdatePlan(
        update=(gone, UpdateStep(Command("qom-set", more), "vm0")),
        awaited=Awaited.GONE,
        devices=("dimm0", "vm0"),
    )
    assert [s.command for s in through_manager(plan).update] == [
        Command("detach-device", {"alias": "dimm0"}),
        Command("update-memory-device", {"alias": "vm0", "bytes": MIB}),
    ]
