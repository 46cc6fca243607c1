"""What `plan` says of `hole-split` is what the interposer does in a real QEMU, op by op."""

from __future__ import annotations

import pytest

from qmp_memlistener.guests import (
    HOST_BRIDGE,
    I440FX,
    PAM_RAM,
    PAM_ROM,
    Q35,
    GuestSpec,
    HostBridge,
    LaunchedGuest,
    Pulse,
    boot_args,
    launch,
)
from qmp_memlistener.host.processes import Process
from qmp_memlistener.memslots import (
    ADDRESS_SPACES,
    Order,
    PlanStrategy,
    Rules,
    Slot,
    SlotTable,
    name_backing,
    plan,
)
from qmp_memlistener.qmp import Monitor, UnixTarget, take_snapshot
from qmp_memlistener.steer import OBJECT, Channel, EventKind, open_channel
from qmp_memlistener.topology import FlatView, read_maps
from tests.support.live import Shape, planned_shapes, skip_without_kvm
from tests.support.steer import NEEDS, STEERED

pytestmark = NEEDS

RULES = Rules(Order.V7_2)
HOLE = "4"  # enum mode of interposer.h
Views = dict[int, FlatView]


class Ring:
    """The slots as QEMU and as KVM have them, by what the channel's ring says from the start."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.qemu: dict[tuple[int, int], Slot] = {}
        self.kvm: dict[tuple[int, int], Slot] = {}

    def read(self) -> tuple[list[Shape], int]:
        """What KVM was given since the last call, and how often vCPUs were kept out."""
        ops: list[Shape] = []
        parks = 0
        for event in self._channel.read_events(1 << 14):
            parks += event.kind is EventKind.PARK
            if event.kind not in (EventKind.QEMU, EventKind.KVM):
                continue
            table = self.qemu if event.kind is EventKind.QEMU else self.kvm
            which = event.slot >> 16, event.slot & 0xFFFF
            old = table.pop(which, None)
            assert event.rc == 0
            if event.size:
                table[which] = Slot(*which, event.gpa, event.size, event.flags)
                kind, now = ("flags" if old else "add"), table[which]
            else:
                assert old is not None
                kind, now = "delete", Slot(*which, old.gpa, old.size)
            if event.kind is EventKind.KVM:
                ops.append((kind, *which, now.gpa, now.size, now.flags))
        assert self._channel.lost == 0
        return ops, parks

    def table(self, views: Views) -> SlotTable:
        qemu = name_backing(SlotTable(self.qemu.values()), views, RULES)
        return SlotTable((_part(qemu, s) for s in self.kvm.values()), qemu=qemu)


def _part(qemu: SlotTable, s: Slot) -> Slot:
    whole = qemu.at(s.as_id, s.gpa)
    assert whole is not None
    assert whole.offset is not None
    offset = whole.offset + s.gpa - whole.gpa
    return Slot(s.as_id, s.slot, s.gpa, s.size, s.flags, whole.block, whole.owner, offset)


async def _views(guest: LaunchedGuest) -> Views:
    async with await Monitor.connect(UnixTarget(str(guest.monitors[0]))) as monitor:
        text = (await take_snapshot(monitor)).text
    return {ADDRESS_SPACES[n]: m.view for n, m in read_maps(text, list(ADDRESS_SPACES)).items()}


def _writes(bridge: HostBridge) -> list[tuple[int, int]]:
    """Firmware's: each more than once, so that what was split is split when it comes again."""
    pam, smram, tseg = bridge.pam, bridge.smram, bridge.esmramc
    writes = [(pam, PAM_RAM << 4), (pam, 0)] * 3
    writes += [(pam + 1, PAM_RAM), (pam + 2, PAM_RAM << 4 | PAM_ROM), (pam, PAM_ROM << 4)]
    writes += [
        (pam + 2, 0),
        (pam, 0),
        (pam + 1, 0),
        (pam + 2, PAM_RAM << 4 | PAM_ROM),
        (pam + 2, 0),
    ]
    writes += [(smram, 0x4A), (smram, 0x0A)] * 2
    if tseg is not None:
        writes += [(tseg, 0x05), (tseg, 0x00)] * 2
    return writes


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("machine", "bridge"),
    [("pc", I440FX), pytest.param("q35", Q35, marks=pytest.mark.full)],
)
async def test_each_operation_is_the_planned_one(machine: str, bridge: HostBridge) -> None:
    build = STEERED[-1]
    skip_without_kvm(build, "kvm")
    env = {"LD_PRELOAD": str(OBJECT), "QMP_MEMLISTENER_STEER": HOLE}
    spec = GuestSpec(machine=machine, accel="kvm", memory=256 << 20, args=boot_args(), env=env)
    async with launch(spec.on(build)) as guest:
        assert guest.ram is not None
        process = Process.read(guest.pid)
        assert process is not None
        channel = open_channel(process)
        assert channel is not None
        with Pulse(guest.ram) as pulse, channel:
            await pulse.wait_ready()
            ring = Ring(channel)
            ring.read()
            before = await _views(guest)
            table = ring.table(before)
            splits = changes = 0
            for register, value in _writes(bridge):
                await pulse.write_config(HOST_BRIDGE, register, value, 1)
                after = await _views(guest)
                done = plan(before, after, PlanStrategy.HOLE_SPLIT, table=table, rules=RULES)
                issued, parks = ring.read()
                asked = [o for o in done.ops if o.slot >= 0]
                assert issued == planned_shapes(asked), (hex(register), value)
                assert parks == done.vcpus_kicked
                assert done.after == ring.table(after)
                splits += parks
                changes += bool(issued)
                before, table = after, done.after
    assert changes >= 10
    assert 2 <= splits < changes / 2
