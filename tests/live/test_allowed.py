"""Every command that a QEMU gets from us is on the list, and QEMU lives through all of them.

QEMU itself says what it got: its trace event `handle_qmp_command` logs every request.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest

from qmp_memlistener import attach
from qmp_memlistener.errors import CommandNotAllowed
from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.guests.linux import LinuxSpec
from qmp_memlistener.qmp import allowed, read_facts
from qmp_memlistener.updates.model import Plug, Role, Strategy, Unplug
from qmp_memlistener.updates.options import parse_addition
from qmp_memlistener.updates.settings import UpdateOptions
from tests.live.verbs_support import one_build
from tests.support.linux import booted_linux
from tests.support.live import booted, builds, why_no_kvm
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
OF_KVM = {"query-stats", "query-stats-schemas"}
_REQUEST = re.compile(r"handle_qmp_command mon 0x[0-9a-f]+ req: (.*)")

Request = tuple[str, dict[str, object]]


@pytest.mark.alone
@builds()
@pytest.mark.asyncio
async def test_every_verb_sends_only_what_is_listed(build: QemuBuild, tmp_path: Path) -> None:
    """And what is said to have been seen is seen."""
    log = tmp_path / "qemu.log"
    spec = LinuxSpec(monitors=8, virtio_mem=256 << 20, pulse_us=None, args=logging_to(log))
    async with booted_linux(build, spec) as vm:
        target = f"unix:{vm.guest.guest.monitors[1]}"
        await look(target, tmp_path)
        await update(target)
        await change(target)
        assert (await read_facts(vm.monitor)).running
    sent = requests(log)
    has_kvm = not why_no_kvm(build.binary)
    if has_kvm:
        sent += await kvm_counters(build, tmp_path / "kvm.log")
    assert [request for request in sent if not allowed.is_listed(*request)] == []
    claimed = {c.name for c in allowed.QMP if is_seen(c.why)} - (set() if has_kvm else OF_KVM)
    assert claimed - {name for name, _ in sent} == set()
    lines = [" ".join(str(given["command-line"]).split()) for name, given in sent if is_hmp(name)]
    forms = [hmp.form for hmp in allowed.HMP if is_seen(hmp.why)]
    assert [f.pattern for f in forms if not any(map(f.fullmatch, lines))] == []


def is_seen(why: str) -> bool:
    return why.endswith("; seen")


def is_hmp(name: str) -> bool:
    return name == "human-monitor-command"


def logging_to(log: Path) -> tuple[str, ...]:
    return ("-D", str(log), "-trace", "handle_qmp_command")


def requests(log: Path) -> list[Request]:
    """What QEMU got: names and arguments."""
    found = []
    for line in log.read_text(errors="replace").splitlines():
        request = _REQUEST.search(line)
        if request is not None:
            message = json.loads(request[1])
            name = str(message.get("execute") or message.get("exec-oob"))
            found.append((name, message.get("arguments", {})))
    return found


async def kvm_counters(build: QemuBuild, log: Path) -> list[Request]:
    """The Linux guest runs under TCG, which keeps no such counters."""
    async with booted(build, "kvm", "pc", *logging_to(log)) as vm:
        async with attach(vm.target, probes=("kvmstats",)) as agent:
            await agent.probes_started()
        assert vm.guest.process.returncode is None
        return requests(log)


async def look(target: str, directory: Path) -> None:
    """The verbs that change nothing; one after the other, as two may want the same monitor."""
    recording = directory / "r.jsonl"
    check(await slow("show", target, "--json"))
    check(await slow("list", "--json"))
    check(await slow("doctor", target))
    check(await slow("doctor", "--clean"))
    check(await slow("record", target, "-o", recording, "--for", "0.1s", "--no-trace"))
    check(await slow("watch", target, "--for", "0.1s", "--mirror", "model", "--json"))


async def update(target: str) -> None:
    """Every kind of device comes and goes."""
    async with attach(target, guarded=True, probes=("ping", "lockprofile")) as agent:
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
    check(await slow("resize", target, "+16M", "--strategy", "hole"))
    once = ("--strategies", "hole", "--repeat", "1", "--window", "0.1s")
    check(await slow("compare", target, "-16M", *once))


slow = partial(run_verb, seconds=60.0)


def check(*ran: Ran) -> None:
    for verb in ran:
        assert verb.code == 0, verb


@one_build
@pytest.mark.asyncio
async def test_the_demo_sends_only_what_is_listed(
    build: QemuBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the guest that it boots itself; and its result names the probes that were at work."""
    log = tmp_path / "qemu.log"
    (tmp_path / "qemus" / "0.1").mkdir(parents=True)
    logged = {"binary": build.binary, "args": [*build.args, *logging_to(log)], "env": build.env}
    described = json.dumps({"version": "0.1", **logged})
    (tmp_path / "qemus" / "0.1" / "qemu.json").write_text(described)
    monkeypatch.setenv("QMP_MEMLISTENER_QEMUS", str(tmp_path / "qemus"))
    ran = await slow("demo", "--qemu", "0.1", "--accel", "tcg", "--repeat", "0", "--json")
    check(ran)
    sent = requests(log)
    assert len(sent) > 10
    assert [request for request in sent if not allowed.is_listed(*request)] == []
    probes = {probe["name"]: probe for probe in ran.documents[0]["probes"]}  # type: ignore[attr-defined]
    assert probes["trace"]["active"]
    assert all(probe["active"] or probe["reason"] for probe in probes.values())
