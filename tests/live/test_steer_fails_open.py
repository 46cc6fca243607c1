"""Whatever the interposer does not expect: the guest lives, and the fact is in the channel."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmp_memlistener.guests import HOST_BRIDGE, I440FX, PAM_RAM, High
from qmp_memlistener.host.processes import Process
from qmp_memlistener.steer import OBJECT, Channel, EventKind, Mode, Refusal, open_channel
from tests.support.host import patience
from tests.support.steer import (
    NEEDS,
    Faults,
    build_shared,
    preloaded,
    racing,
    state,
    steer,
    toggled,
)
from tools.soak_steer import cycles, kills, migrate

pytestmark = [
    *NEEDS,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]

_SUPPORT = Path(__file__).parent.parent / "support"
_HOLD = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
tid = int(sys.argv[1])
assert libc.ptrace(0x4206, tid, None, None) == 0
assert libc.ptrace(0x4207, tid, None, None) == 0
os.waitpid(tid, 0x40000000)
print("held", flush=True)
sys.stdin.read()
"""


def _channel(pid: int) -> Channel:
    process = Process.read(pid)
    assert process is not None
    channel = open_channel(process)
    assert channel is not None
    return channel


@asynccontextmanager
async def held(tid: int) -> AsyncIterator[None]:
    """A thread that a debugger has stopped, as like as not in the kernel."""
    holder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _HOLD, str(tid)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert holder.stdout is not None
    try:
        assert await holder.stdout.readline() == b"held\n"
        yield
    finally:
        await holder.communicate(b"")  # its stdin ends


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "strategy",
    ["hole", *(pytest.param(s, marks=pytest.mark.full) for s in ("pause", "inhibit"))],
)
async def test_a_vcpu_that_is_held_still(strategy: str) -> None:
    async with racing(High.DATA) as (guest, pulse):
        assert (await steer(guest, strategy)).code == 0
        with _channel(guest.pid) as channel:
            tids = [v.tid for v in channel.vcpus()]
            channel.skip()
            first = channel.state()
            _, other = sorted(tids)  # CPU 0 toggles
            async with held(other):
                assert await toggled(guest, pulse, 10) == "survived"
            now = channel.state()
            events = channel.read_events()
        assert (now.mode, now.refusal) == (Mode.OBSERVE, Refusal.NOT_STOPPED)
        assert now.gave_up == first.gave_up + 1  # it is not waited for again and again
        (gave_up,) = (e for e in events if e.kind is EventKind.PARK and e.rc)
        assert gave_up.end_ns - gave_up.begin_ns < patience(3) * 1e9
        assert await toggled(guest, pulse, 10) == "survived"
        await pulse.wait_beats(2)
        assert (await steer(guest, strategy)).code == 0  # it may be wanted again


@pytest.mark.asyncio
async def test_a_vcpu_is_waited_for_no_longer_on_a_busy_host(tmp_path: Path) -> None:
    """The bound is one of time: each step of the wait takes 60 ms here, and not one."""
    late = build_shared(_SUPPORT / "steer_late.c", tmp_path)
    async with racing(High.DATA, env=preloaded(Mode.INHIBIT, late)) as (guest, pulse):
        assert await toggled(guest, pulse, 4) == "survived"
        with _channel(guest.pid) as channel:
            _, other = sorted(v.tid for v in channel.vcpus())
            channel.skip()
            async with held(other):
                assert await toggled(guest, pulse, 4) == "survived"
            (gave_up,) = (e for e in channel.read_events() if e.kind is EventKind.PARK and e.rc)
        # 1 s; a step once counted for 10 ms at most, and it was over 3 s
        assert gave_up.end_ns - gave_up.begin_ns < 3e9


@pytest.mark.asyncio
async def test_it_is_not_taken_out_while_slots_are_split_and_a_vcpu_is_held() -> None:
    async with racing(High.DATA) as (guest, pulse):
        assert (await steer(guest, "hole")).code == 0
        assert await toggled(guest, pulse, 9) == "survived"  # a hole is open
        with _channel(guest.pid) as channel:
            _, other = sorted(v.tid for v in channel.vcpus())
        async with held(other):
            ran = await steer(guest, "off")
        assert ran.code == 1
        assert "KVM_RUN" in ran.err  # either it was not taken by a vCPU, or by the main loop
        assert state(guest).hooked
        assert await toggled(guest, pulse, 10) == "survived"
        assert state(guest).mode is Mode.HOLE
        assert (await steer(guest, "off")).code == 0
        now = state(guest)
        assert (now.hooked, now.slots) == (False, now.pieces)


@pytest.mark.asyncio
@pytest.mark.full
async def test_more_events_than_the_ring_holds() -> None:
    async with racing() as (guest, pulse):
        assert (await steer(guest, "hole")).code == 0
        with _channel(guest.pid) as channel:
            channel.skip()
            for _ in range(14):
                assert await toggled(guest, pulse, 250) == "survived"
            found = []
            while events := channel.read_events():
                found += events
            assert channel.lost > 0
            assert len(found) > 16000
            assert [e for e in found if e.rc < 0] == []
            now = channel.state()
        assert (now.mode, now.gave_up) == (Mode.HOLE, 0)


@pytest.mark.asyncio
@pytest.mark.parametrize("strict", [False, True])
async def test_kvm_refuses_an_operation_of_hole(strict: bool, tmp_path: Path) -> None:
    faults = Faults(tmp_path)
    env = preloaded(Mode.HOLE, faults.object) | faults.env
    if strict:
        env["QMP_MEMLISTENER_STRICT"] = "1"
    async with racing(High.DATA, env=env) as (guest, pulse):
        assert await toggled(guest, pulse, 10) == "survived"
        faults.refuse()
        assert await toggled(guest, pulse, 10) == "survived"
        assert faults.refused
        now = state(guest)
        assert (now.mode, now.refusal) == (Mode.OBSERVE, Refusal.KVM_REFUSED)
        assert now.slots == now.pieces  # QEMU's own
        assert (await steer(guest, "hole")).code == 0  # and it can be wanted again
        assert await toggled(guest, pulse, 10) == "survived"
        assert state(guest).mode is Mode.HOLE


@pytest.mark.asyncio
async def test_kvm_refuses_what_qemu_was_told_is_done(tmp_path: Path) -> None:
    """QEMU ends as it ends when it is refused a slot, and says why."""
    faults = Faults(tmp_path)
    env = preloaded(Mode.INHIBIT, faults.object) | faults.env
    async with racing(High.DATA, env=env) as (guest, pulse):
        assert await toggled(guest, pulse, 10) == "survived"
        faults.refuse()
        await pulse.toggle(HOST_BRIDGE, I440FX.pam, (PAM_RAM << 4, 0), 2, period=20)
        async with asyncio.timeout(patience(20)):
            await guest.process.wait()
        assert guest.process.returncode == -signal.SIGABRT
        assert "KVM refused slot" in guest.stderr()


@pytest.mark.asyncio
@pytest.mark.parametrize(("slots", "ops"), [(5, 64), (64, 3)])
async def test_more_slots_or_operations_than_there_is_room_for(
    slots: int, ops: int, tmp_path: Path
) -> None:
    small = build_shared(
        OBJECT.with_name("interposer.c"),
        tmp_path,
        *(f"-DMAX_SLOTS={slots}", f"-DMAX_OPS={ops}"),
        *("-DPARK_NS=1000000000ull", "-DRUN_NS=2000000000ull", "-DCLOSE_NS=10000000ull"),
        "-fvisibility=hidden",
    )
    async with racing(High.DATA, env=preloaded(Mode.HOLE, interposer=small)) as (guest, pulse):
        assert await toggled(guest, pulse, 10) == "survived"
        now = state(guest)
        assert (now.mode, now.refusal) == (Mode.OBSERVE, Refusal.TOO_MANY)
        await pulse.wait_beats(2)


@pytest.mark.asyncio
async def test_dirty_rings_carry_ids_of_slots() -> None:
    """`run` cannot know of them before; they are seen at the first transition."""
    accel = "kvm,dirty-ring-size=1024"
    async with racing(High.DATA, env=preloaded(Mode.HOLE), accel=accel) as (guest, pulse):
        assert await toggled(guest, pulse, 2) == "survived"
        now = state(guest)
        assert (now.mode, now.refusal) == (Mode.OBSERVE, Refusal.DIRTY_RINGS)
        assert now.slots == now.pieces
        assert (await steer(guest, "inhibit")).code == 0
        assert await toggled(guest, pulse) == "survived"


@pytest.mark.asyncio
@pytest.mark.full
async def test_a_qemu_that_is_stopped_for_longer_than_any_wait() -> None:
    """A vCPU that is kept out does not come in because time went by while all stood still."""
    async with racing(env=preloaded(Mode.INHIBIT)) as (guest, pulse):
        toggle = await pulse.toggle(HOST_BRIDGE, I440FX.pam, (PAM_RAM << 4, 0), 4_000, period=20)
        for _ in range(6):
            os.kill(guest.pid, signal.SIGSTOP)
            await asyncio.sleep(2.2)
            os.kill(guest.pid, signal.SIGCONT)
            await asyncio.sleep(0.02)
        assert await toggle.wait(patience(120)) == 4_000
        await pulse.wait_beats(2, 1)
        now = state(guest)
        assert (now.mode, now.gave_up) == (Mode.INHIBIT, 0)


@pytest.mark.asyncio
@pytest.mark.full
async def test_what_is_taken_out_leaves_qemu_as_it_was() -> None:
    """Its import table, protections, threads and descriptors, on a guest under load."""
    done = await cycles(8)
    assert done.wrong == ()


@pytest.mark.asyncio
@pytest.mark.full
async def test_a_killed_injector_leaves_nothing_for_good() -> None:
    assert await kills(6) == []


@pytest.mark.asyncio
@pytest.mark.full
@pytest.mark.parametrize(
    ("strategy", "strict"),
    [(Mode.PAUSE, False), (Mode.INHIBIT, False), (Mode.HOLE, False), (Mode.HOLE, True)],
    ids=["pause", "inhibit", "hole", "hole-strict"],
)
async def test_a_guest_that_writes_all_its_ram_is_migrated_whole(
    strategy: Mode, strict: bool
) -> None:
    assert await migrate(strategy, strict) == 0
