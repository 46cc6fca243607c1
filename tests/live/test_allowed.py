"""Every command that a QEMU gets from us is on the list, and QEMU lives through all of them.

QEMU itself says what it got: its trace event `handle_qmp_command` logs every request.
"""

from __future__ import annotations

import asyncio
import json
import re
from functools import partial
from pathlib import Path

import pytest

from qmp_memlistener import attach
from qmp_memlistener.errors import CommandNotAllowed
from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.guests.linux import LinuxSpec
from qmp_memlistener.monitor import allowed, read_facts
from qmp_memlistener.updates.model import Plug, Role, Strategy, Unplug
from qmp_memlistener.updates.operation import UpdateOptions
from qmp_memlistener.updates.options import parse_addition
from tests.support.linux import booted_linux
from tests.support.live import builds
from tests.support.verbs import Ran, run_verb

pytestmark = pytest.mark.qemu

PATIENT = UpdateOptions(wait_s=5.0)
NETDEV = (Role.NETDEV, "hubport,id=b0,hubid=7")
BLOCKDEV = (Role.BLOCKDEV, "null-co,node-name=b0,size=1M,read-zeroes=on")
SHARED = (Role.OBJECT, "memory-backend-ram,id=b0,size=16M,share=on")
MEMORY = (Role.OBJECT, "memory-backend-ram,id=b0,size=128M")
DEVICES = (
    ("virtio-net-pci,id=d0,netdev=b0", NETDEV, Strategy.DIRECT),
    ("virtio-blk-pci,id=d0,drive=b0", BLOCKDEV, Strategy.PAUSE),
    ("nvme,id=d0,serial=s,drive=b0", BLOCKDEV, Strategy.DIRECT),
    ("ivshmem-plain,id=d0,memdev=b0", SHARED, Strategy.HOLE),
    ("pc-dimm,id=d0,memdev=b0", MEMORY, Strategy.DIRECT),
)
REFUSED = ("virtio-gpu-gl-pci", "virtio-vga-gl", "virtio-gpu-pci", "vhost-user-vga")
_REQUEST = re.compile(r"handle_qmp_command mon 0x[0-9a-f]+ req: (.*)")


@builds()
@pytest.mark.asyncio
async def test_every_verb_sends_only_what_is_listed(build: QemuBuild, tmp_path: Path) -> None:
    log = tmp_path / "qemu.log"
    spec = LinuxSpec(
        monitors=8,
        virtio_mem=256 << 20,
        args=("-D", str(log), "-trace", "handle_qmp_command"),
    )
    async with booted_linux(build, spec) as vm:
        target = f"unix:{vm.guest.guest.monitors[1]}"
        await look(target, tmp_path)
        await update(target)
        await change(target)
        assert (await read_facts(vm.monitor)).running
    sent = requests(log)
    unlisted = [(name, given) for name, given in sent if not allowed.is_listed(name, given)]
    assert unlisted == []
    seen = {name for name, _ in sent}
    never = {command.name for command in allowed.QMP} - seen
    assert never <= {"query-uuid", "qom-set"}, never


def requests(log: Path) -> list[tuple[str, dict[str, object]]]:
    """What QEMU got: names and arguments."""
    found = []
    for line in log.read_text(errors="replace").splitlines():
        request = _REQUEST.search(line)
        if request is not None:
            message = json.loads(request[1])
            name = str(message.get("execute") or message.get("exec-oob"))
            found.append((name, message.get("arguments", {})))
    return found


async def look(target: str, directory: Path) -> None:
    """The verbs that change nothing; each takes what monitors it finds, so one after the other."""
    check(*await asyncio.gather(slow("show", target, "--json"), slow("list", "--json")))
    check(await slow("doctor", target))
    check(await slow("doctor", "--clean"))
    check(await slow("watch", target, "--for", "0.5s", "--mirror", "model", "--json"))
    recording = directory / "r.jsonl"
    check(await slow("record", target, "-o", recording, "--for", "0.2s", "--no-trace"))


async def update(target: str) -> None:
    """Every kind of device comes and goes."""
    async with attach(target, guarded=True, probes=("ping", "kvmstats", "lockprofile")) as agent:
        for device, backend, strategy in DEVICES:
            backends = (parse_addition(*backend),)
            plug = Plug(parse_addition(Role.DEVICE, device), backends)
            plugged = await agent.update(plug, strategy, PATIENT)
            assert plugged.outcome == "done", (device, plugged)
            gone = await agent.update(Unplug("d0", backends), Strategy.DIRECT, PATIENT)
            assert gone.outcome == "done", (device, gone)
        for name in REFUSED:
            plug = Plug(parse_addition(Role.DEVICE, f"{name},id=g"), ())
            refused = await agent.update(plug, Strategy.DIRECT, PATIENT)
            assert refused.outcome == "refused"
        with pytest.raises(CommandNotAllowed):
            await agent.monitor.execute("x-query-virtio-status", {"path": "/machine"})


async def change(target: str) -> None:
    """The verbs that change something, one after the other."""
    rng = "virtio-rng-pci,id=d1"
    check(await slow("hotplug", target, "--device", rng, "--strategy", "pause"))
    check(await slow("unplug", target, "d1"))
    check(await slow("resize", target, "+128M"))
    check(await slow("compare", target, "-128M", "--repeat", "1", "--window", "0.2s"))


slow = partial(run_verb, seconds=60.0)


def check(*ran: Ran) -> None:
    for verb in ran:
        assert verb.code == 0, verb
