"""Options become what a running QEMU takes, on every QEMU here: `device_add` is
right at once, and what was given arrives unchanged."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmp_memlistener.errors import CommandFailed, DeadlineExceeded, InputError
from qmp_memlistener.guests import GuestSpec, QemuBuild, launch
from qmp_memlistener.qmp import Monitor
from qmp_memlistener.updates.model import Addition, Role, UpdateRefused, Value
from qmp_memlistener.updates.options import parse_addition
from qmp_memlistener.updates.property_types import add, text_to, type_arguments
from tests.support.live import builds, qmp

M = 1 << 20
HOSTILE = "a,b=c \"d\" 'e' {f} é🐑\n\t\\ ,,id=x"
SECONDS = 20.0


class Counted:
    """A monitor, and the commands that were sent over it."""

    def __init__(self, monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monitor = monitor
        self.sent: list[str] = []
        execute = monitor.timed

        async def timed(name: str, *args: object, **options: object) -> object:
            self.sent.append(name)
            return await execute(name, *args, **options)  # type: ignore[arg-type]  # as given

        monkeypatch.setattr(monitor, "timed", timed)

    def take(self) -> list[str]:
        sent, self.sent = self.sent, []
        return sent


@asynccontextmanager
async def guest(build: QemuBuild, machine: str = "pc", *args: str) -> AsyncIterator[Monitor]:
    """A guest that has not begun to run, with room for DIMMs."""
    spec = GuestSpec(
        machine=machine,
        accel="tcg",
        monitors=1,
        shared_memory=False,
        args=("-S", "-m", "size=64M,slots=4,maxmem=4G", *args),
    )
    async with launch(spec.on(build)) as running, qmp(running.monitors[0]) as monitor:
        yield monitor


async def added(monitor: Monitor, role: Role, text: str) -> Addition:
    return await add(monitor, parse_addition(role, text), SECONDS)


async def get(monitor: Monitor, path: str, name: str) -> object:
    return await monitor.execute("qom-get", {"path": path, "property": name})


BACKENDS: list[tuple[Role, str, dict[str, Value]]] = [
    (Role.OBJECT, "memory-backend-ram,size=16M", {"size": 16 * M}),
    (
        Role.OBJECT,
        "memory-backend-ram,size=0x1000000,share=on,prealloc=y,merge=off,dump=no",
        {"size": 16 * M, "share": True, "prealloc": True, "merge": False, "dump": False},
    ),
    (
        Role.OBJECT,
        "memory-backend-memfd,size=.015625G,share=true,seal=off",
        {"size": 16 * M, "share": True, "seal": False},
    ),
    (
        Role.OBJECT,
        "memory-backend-file,size=16384k,mem-path=DIR/a,,b=c,share=yes,align=2M,prealloc=off",
        {"size": 16 * M, "share": True, "align": 2 * M, "mem-path": "DIR/a,b=c"},
    ),
    (Role.OBJECT, "rng-random,filename=/dev/urandom", {"filename": "/dev/urandom"}),
    (Role.OBJECT, "iothread,poll-max-ns=1000", {"poll-max-ns": 1000}),
    (Role.OBJECT, "throttle-group,x-bps-total=1M", {"x-bps-total": M}),
    (
        Role.OBJECT,
        "throttle-group,limits.bps-total=4096,limits.iops-read=7",
        {"limits": {"bps-total": 4096, "iops-read": 7}},
    ),
    (Role.OBJECT, "secret,data=7", {"data": "7"}),
    (Role.NETDEV, "user,restrict=on,net=10.0.3.0/24", {"restrict": True, "net": "10.0.3.0/24"}),
    (
        Role.NETDEV,
        "user,hostfwd.0=tcp:127.0.0.1:0-:22,hostfwd.1.str=udp:127.0.0.1:0-:9,ipv6=off",
        {
            "hostfwd": [{"str": "tcp:127.0.0.1:0-:22"}, {"str": "udp:127.0.0.1:0-:9"}],
            "ipv6": False,
        },
    ),
    (Role.NETDEV, "user,dnssearch=example.com", {"dnssearch": [{"str": "example.com"}]}),
    (Role.NETDEV, "hubport,hubid=3", {"hubid": 3}),
    (Role.NETDEV, "socket,listen=127.0.0.1:0", {"listen": "127.0.0.1:0"}),
    (
        Role.BLOCKDEV,
        "null-co,read-only=on,size=1M,latency-ns=0,cache.direct=off",
        {"read-only": True, "size": M, "latency-ns": 0, "cache": {"direct": False}},
    ),
    (
        Role.BLOCKDEV,
        "raw,file.driver=file,file.filename=DIR/disk,,1,file.read-only=on,read-only=on,offset=512",
        {
            "file": {"driver": "file", "filename": "DIR/disk,1", "read-only": True},
            "read-only": True,
            "offset": 512,
        },
    ),
    (
        Role.BLOCKDEV,
        (
            "blkdebug,image.driver=null-co,image.size=1M,inject-error.0.event=flush_to_disk,"
            "inject-error.0.errno=0x5,inject-error.0.once=on,inject-error.0.sector=-1"
        ),
        {
            "image": {"driver": "null-co", "size": M},
            "inject-error": [{"event": "flush_to_disk", "errno": 5, "once": True, "sector": -1}],
        },
    ),
]


def in_dir(value: Value, tmp_path: Path) -> Value:
    """With DIR replaced."""
    replaced: Value = json.loads(json.dumps(value).replace("DIR", str(tmp_path)))
    return replaced


@pytest.mark.asyncio
@builds()
async def test_backends_are_typed_by_refusals(build: QemuBuild, tmp_path: Path) -> None:
    (tmp_path / "disk,1").write_bytes(bytes(M))
    async with guest(build) as monitor:
        for number, (role, text, expected) in enumerate(BACKENDS):
            kind, options = text.replace("DIR", str(tmp_path)).split(",", 1)
            found = await added(monitor, role, f"{kind},{role.id_key}=b{number},{options}")
            assert found.typed
            values = in_dir(expected, tmp_path)
            assert isinstance(values, dict)
            assert values.items() <= dict(found.arguments).items()
            if role is Role.OBJECT and "limits" not in values and kind != "secret":
                for key, value in values.items():
                    assert await get(monitor, f"/objects/b{number}", key) == value
            # What was taken, is taken as JSON too.
            await monitor.execute(role.remove_command, {role.id_key: f"b{number}"})
            again = parse_addition(role, json.dumps(dict(found.arguments)))
            assert await add(monitor, again, SECONDS) == found


DEVICES: list[tuple[str, str, dict[str, object]]] = [
    (
        "memory-backend-ram,id=m0,size=128M",
        "pc-dimm,memdev=m0,node=0,addr=0x120000000",
        {"addr": 0x120000000, "size": 128 * M},
    ),
    (
        "memory-backend-ram,id=m1,size=128M",
        (
            "nvdimm,memdev=m1,label-size=128K,unarmed=off,"
            "uuid=12345678-1234-1234-1234-123456789abc,slot=3"
        ),
        {"label-size": 128 << 10, "unarmed": False, "slot": 3},
    ),
    (
        "memory-backend-ram,id=m2,size=256M",
        "virtio-mem-pci,memdev=m2,requested-size=64M,block-size=2M,memaddr=0x150000000",
        {"requested-size": 64 * M, "block-size": 2 * M, "memaddr": 0x150000000},
    ),
    (
        "memory-backend-ram,id=m3,size=1M,share=on",
        "ivshmem-plain,memdev=m3,master=on",
        {"master": "on"},
    ),
    (
        "",
        "virtio-net-pci,mac=52:54:00:12:34:56,mq=on,vectors=4,addr=0x10.0,rombar=0,romfile=",
        {"mac": "52:54:00:12:34:56", "mq": True, "vectors": 4, "addr": 0x10 << 3, "rombar": 0},
    ),
    (
        "",
        "virtio-net,addr=11.0,bootindex=-1,disable-legacy=on",
        {"addr": 0x11 << 3, "bootindex": -1},
    ),
    ("", "virtio-balloon,deflate-on-oom=on", {"deflate-on-oom": True}),
    (
        "",
        "virtio-rng-pci,rng=r0,max-bytes=1024,period=1000",
        {"max-bytes": 1024, "period": 1000},
    ),
    ("", "usb-tablet,bus=xhci.0,usb_version=1,port=2", {"usb_version": 1, "port": "2"}),
    ("", "usb-storage,bus=xhci.0,drive=disk1,removable=on", {"removable": True}),
    (
        "",
        (
            "virtio-blk-pci,drive=disk0,serial=a,,b=c,logical_block_size=4k,physical_block_size=4096,"
            "write-cache=on,num-queues=1,share-rw=off,iothread=iot0"
        ),
        {"serial": "a,b=c", "logical_block_size": 4096, "num-queues": 1, "share-rw": False},
    ),
    ("", "virtio-scsi,num_queues=2,hotplug=on", {"num_queues": 2, "hotplug": True}),
    ("", "pci-bridge,chassis_nr=5,msi=off,shpc=on", {"chassis_nr": 5, "msi": "off", "shpc": True}),
    ("", "e1000,mac=52:54:00:12:34:57", {"mac": "52:54:00:12:34:57"}),
]


@pytest.mark.asyncio
@builds()
async def test_device_add_is_right_at_once(
    build: QemuBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("-device", "qemu-xhci,id=xhci", "-object", "rng-builtin,id=r0")
    async with guest(build, "pc,nvdimm=on", *args) as monitor:
        for name in ("disk0", "disk1"):
            await added(monitor, Role.BLOCKDEV, f"null-co,node-name={name},read-zeroes=on")
        await added(monitor, Role.OBJECT, "iothread,id=iot0")
        counted = Counted(monitor, monkeypatch)
        for number, (backend, text, expected) in enumerate(DEVICES):
            if backend:
                await added(monitor, Role.OBJECT, backend)
            kind, options = text.split(",", 1)
            device = parse_addition(Role.DEVICE, f"{kind},id=d{number},{options}")
            counted.take()
            typed = await type_arguments(monitor, device)
            assert set(counted.take()) == {"device-list-properties"}
            assert typed.typed
            await monitor.execute("device_add", typed.arguments)
            for key, value in expected.items():
                assert await get(monitor, f"/machine/peripheral/d{number}", key) == value, key


@pytest.mark.asyncio
@builds()
async def test_json_arrives_as_it_was(build: QemuBuild, tmp_path: Path) -> None:
    """Read back from QEMU: commas, quotes, braces, line breaks and other scripts."""
    async with guest(build, "pc", "-device", "virtio-serial-pci,id=vs0") as monitor:
        for number, as_json in enumerate((False, True)):
            values: dict[str, Value] = {"name": f"{number}{HOSTILE}"}
            device = {"driver": "virtserialport", "id": f"p{number}", "bus": "vs0.0", **values}
            text = json.dumps(device)
            if not as_json:
                option = str(values["name"]).replace(",", ",,")
                text = f"virtserialport,id=p{number},bus=vs0.0,name={option}"
            before = parse_addition(Role.DEVICE, text)
            found = await add(monitor, before, SECONDS)
            assert dict(found.arguments) == device
            got = await get(monitor, f"/machine/peripheral/p{number}", "name")
            assert got == values["name"]

            path = str(tmp_path / f"{number}{HOSTILE.replace('/', '')}")
            backend: dict[str, Value] = {
                "qom-type": "memory-backend-file",
                "id": f"m{number}",
                "mem-path": path,
                "size": 16 * M,
            }
            text = json.dumps(backend, ensure_ascii=False)
            if not as_json:
                option = path.replace(",", ",,")
                text = f"memory-backend-file,id=m{number},mem-path={option},size=16M"
            assert dict((await added(monitor, Role.OBJECT, text)).arguments) == backend
            assert await get(monitor, f"/objects/m{number}", "mem-path") == path
            assert os.path.basename(path) in os.listdir(tmp_path)


@pytest.mark.asyncio
@builds()
async def test_things_that_are_not_there(build: QemuBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    async with guest(build, "q35", "-device", "pcie-root-port,id=rp0,chassis=1") as monitor:
        counted = Counted(monitor, monkeypatch)
        for role in Role:
            for text in (
                f"nosuch,{role.id_key}=x",
                f'{{"{role.type_key}": "nosuch", "{role.id_key}": "x"}}',
            ):
                with pytest.raises(CommandFailed) as error:
                    await added(monitor, role, text)
                assert "nosuch" in error.value.desc
                assert error.value.remedy is not None
                assert f"-{role} help" in error.value.remedy
        assert "device_add" not in counted.take()
        with pytest.raises(CommandFailed) as error:
            await added(monitor, Role.DEVICE, "virtio-nosuch,id=x")
        assert "'virtio-nosuch' not found" in error.value.desc
        for name in ("virtio-gpu-gl-pci", "virtio-gpu", "virtio-vga-gl"):
            with pytest.raises(UpdateRefused, match="cannot be plugged into a running guest"):
                await added(monitor, Role.DEVICE, f"{name},id=x")
        # Refused by QEMU for another reason than a type: its own words, after one attempt.
        counted.take()
        with pytest.raises(CommandFailed, match="does not support hotplugging"):
            await added(
                monitor, Role.DEVICE, "pcie-root-port,id=x,chassis=4,slot=4,pref64-reserve=64M"
            )
        with pytest.raises(CommandFailed, match=r"nosuch' not found"):
            await added(monitor, Role.DEVICE, "virtio-net-pci,id=x,nosuch=1,bus=rp0")
        assert counted.take() == ["device-list-properties", "device_add"] * 2
        assert await monitor.execute("query-status")


@pytest.mark.asyncio
@builds()
async def test_values_that_are_none(build: QemuBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused with the option's name, and nothing is left behind."""
    async with guest(build) as monitor:
        counted = Counted(monitor, monkeypatch)
        for role, text, words in (
            (Role.DEVICE, "virtio-net-pci,id=x,mq=1", 'mq="1": QEMU expects on or off'),
            (Role.DEVICE, "virtio-net-pci,id=x,vectors=4M", 'vectors="4M"'),
            (Role.OBJECT, "memory-backend-ram,id=x,size=lots", 'size="lots"'),
            (Role.OBJECT, "memory-backend-ram,id=x,size=16M,share=maybe", 'share="maybe"'),
            (Role.OBJECT, "iothread,id=x,poll-max-ns=010", "can be 8 or 10"),
            (Role.NETDEV, "hubport,id=x,hubid=one", 'hubid="one"'),
            (Role.BLOCKDEV, "raw,node-name=x,file.driver=null-co,file.size=?", 'file.size="?"'),
        ):
            with pytest.raises(InputError) as error:
                await added(monitor, role, text)
            assert words in error.value.message
            assert error.value.remedy
        assert "device_add" not in counted.take()
        # The same id is free, so nothing was made; what is not a text is not converted.
        await added(
            monitor, Role.OBJECT, "memory-backend-ram,id=x,size=16M,host-nodes=0,policy=bind"
        )
        refused = '{"qom-type": "memory-backend-ram", "id": "y", "size": "16M"}'
        counted.take()
        with pytest.raises(CommandFailed, match="Parameter 'size' expects uint64"):
            await added(monitor, Role.OBJECT, refused)
        assert counted.take() == ["object-add"]
        rule = ",inject-error.{0}.errno=5,inject-error.{0}.event=flush_to_disk"
        many = "".join(rule.format(i) for i in range(101))
        with pytest.raises(UpdateRefused, match="more than 100 values"):
            await added(monitor, Role.BLOCKDEV, f"blkdebug,node-name=z,image.driver=null-co{many}")
        assert len(counted.take()) == 100
        assert await monitor.execute("query-named-block-nodes") == []
        counted.take()
        with pytest.raises(DeadlineExceeded):
            await add(monitor, parse_addition(Role.OBJECT, refused), 0)
        assert counted.take() == []


@pytest.mark.asyncio
@builds()
async def test_lists_for_devices(build: QemuBuild) -> None:
    """QEMU before 9.2 drops them without a word: refused there, passed on by JSON from then on."""
    mapping: Value = [{"iothread": "iot0"}]
    device: dict[str, Value] = {"driver": "virtio-blk-pci", "id": "d0", "drive": "disk0"}
    device["iothread-vq-mapping"] = mapping
    async with guest(build) as monitor:
        await added(monitor, Role.OBJECT, "iothread,id=iot0")
        await added(monitor, Role.BLOCKDEV, "null-co,node-name=disk0,read-zeroes=on")
        addition = parse_addition(Role.DEVICE, json.dumps(device))
        if monitor.version.release < (9, 2):
            with pytest.raises(UpdateRefused, match='would drop "iothread-vq-mapping"'):
                await add(monitor, addition, SECONDS)
            return
        await add(monitor, addition, SECONDS)
        got = await get(monitor, "/machine/peripheral/d0", "iothread-vq-mapping")
        assert got == mapping
        with pytest.raises(InputError, match="is a list"):
            await added(
                monitor,
                Role.DEVICE,
                "virtio-blk-pci,id=d1,drive=disk0,iothread-vq-mapping=iot0",
            )


DRIVERS = ("virtio-blk-pci", "virtio-net-pci", "virtio-mem-pci", "pcie-root-port", "e1000e")


@pytest.mark.asyncio
@builds()
async def test_defaults_are_read_as_qemu_wrote_them(build: QemuBuild) -> None:
    """Of each property of these devices that has a default: its text has its type and value."""
    seen: set[str] = set()
    async with guest(build) as monitor:
        for driver in DRIVERS:
            properties = await monitor.execute("device-list-properties", {"typename": driver})
            assert isinstance(properties, list)
            for entry in properties:
                name, kind, default = entry["name"], entry["type"], entry.get("default-value")
                if default is None or isinstance(default, list) or name == "addr":
                    continue
                text = ("off", "on")[default] if isinstance(default, bool) else str(default)
                value = text_to(kind, text, name)
                assert (value, type(value)) == (default, type(default)), (driver, name, kind)
                seen.add(kind)
    assert {"bool", "uint32", "int32", "size", "OnOffAuto"} <= seen
