"""The `interposer` probe on a steered QEMU, beside what its log and uprobes show."""

from __future__ import annotations

import asyncio
import sys

import pytest

from qmp_memlistener import attach
from qmp_memlistener.errors import InputError
from qmp_memlistener.guests import HOST_BRIDGE, I440FX, PAM_RAM, High, Pulse
from qmp_memlistener.records import (
    Lost,
    Mode,
    Record,
    SlotOp,
    StallKind,
    StallRecord,
    SteeringRecord,
    TransitionRecord,
)
from tests.support.host import patience
from tests.support.steer import NEEDS, racing, state, steer, toggled
from tests.support.verbs import run_verb

pytestmark = NEEDS
TOGGLES = 6


async def toggle(pulse: Pulse, count: int = TOGGLES, period: int = 20_000) -> None:
    """PAM, `count` times; returns when the guest has done it."""
    toggled = await pulse.toggle(HOST_BRIDGE, I440FX.pam, (PAM_RAM << 4, 0), count, period=period)
    async with asyncio.timeout(patience(30)):
        while toggled.done < count:  # noqa: ASYNC110 (no event)
            await asyncio.sleep(0.005)


class Kept:
    """Records of an attachment."""

    def __init__(self) -> None:
        self.all: list[Record] = []

    def stalls(self, kind: StallKind) -> list[StallRecord]:
        return [r for r in self.all if isinstance(r, StallRecord) and r.kind is kind]

    @property
    def transitions(self) -> list[TransitionRecord]:
        return [r for r in self.all if isinstance(r, TransitionRecord)]

    @property
    def operations(self) -> list[SlotOp]:
        return [r for r in self.all if isinstance(r, SlotOp)]

    @property
    def strategies(self) -> list[SteeringRecord]:
        return [r for r in self.all if isinstance(r, SteeringRecord)]

    def check_nothing_lost(self) -> None:
        assert [r for r in self.all if isinstance(r, Lost)] == []


@pytest.mark.asyncio
async def test_the_log_and_the_ring_tell_of_the_same_operations() -> None:
    """In their order, with their slots and sizes; and each is told once."""
    async with racing(High.DATA) as (guest, pulse):
        assert (await steer(guest, "observe")).code == 0
        kept = Kept()
        async with attach(
            f"unix:{guest.monitors[0]}", probes=("trace", "interposer"), on_record=kept.all.append
        ) as agent:
            assert {p.name for p in agent.probes() if p.active} == {"trace", "interposer"}
            assert str(agent.strategy) == "observe"
            await toggle(pulse)
            await agent.settle()
    kept.check_nothing_lost()
    told = sorted(kept.stalls(StallKind.SLOT_UPDATE), key=lambda s: s.start_ns)
    assert len(kept.operations) == len(told) == 4 * TOGGLES
    for op, stall in zip(kept.operations, told, strict=True):
        assert stall.site == str(op)
        assert (stall.probe, stall.witnesses) == ("interposer", ["interposer", "trace"])
        assert stall.at_least_ns == stall.at_most_ns == stall.end_ns - stall.start_ns
        assert stall.end_ns <= op.t_ns
        assert stall.cause is not None
        assert (stall.cause.type, stall.cause.ref) == ("transition", op.transition)
    missing = kept.stalls(StallKind.MISSING)
    assert [s.during for s in missing] == [[t.seq] for t in kept.transitions]
    assert {s.probe for s in missing} == {"interposer"}
    assert kept.stalls(StallKind.VCPU_INHIBIT) == []


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "probes",
    [
        "trace,interposer",
        pytest.param("trace,interposer,uprobes", marks=pytest.mark.full),
    ],
)
async def test_what_kvm_was_given_is_told_and_not_what_was_asked_for(probes: str) -> None:
    """Under `hole` KVM gets one operation where QEMU asks for four, and RAM is never missing."""
    async with racing() as (guest, pulse):
        assert (await steer(guest, "hole", "--strict")).code == 0
        await toggle(pulse, 2)  # the slot is split
        kept = Kept()
        async with attach(
            f"unix:{guest.monitors[0]}",
            probes=tuple(probes.split(",")),
            on_record=kept.all.append,
        ) as agent:
            await agent.probes_started()
            if "uprobes" in probes and "uprobes" not in agent.measuring.names:
                pytest.skip("uprobes need root")
            await toggle(pulse)
            await agent.settle()
    kept.check_nothing_lost()
    assert len(kept.operations) == 4 * TOGGLES
    told = kept.stalls(StallKind.SLOT_UPDATE)
    assert {s.probe for s in told} == {"interposer"}
    assert len(told) == 2 * TOGGLES  # the piece with other flags goes, and comes anew
    parks = kept.stalls(StallKind.VCPU_INHIBIT)
    assert len(parks) == TOGGLES
    for stall in [*told, *parks]:
        assert stall.cause is not None
        assert stall.cause.type == "transition"
        assert set(probes.split(",")) <= {*stall.witnesses, "uprobes"}
    seqs = [t.seq for t in kept.transitions]
    assert sorted(s.during[0] for s in parks) == seqs
    missing = {str(s.site) for s in kept.stalls(StallKind.MISSING)}
    assert all(int(site.split("-")[1], 16) < 1 << 20 for site in missing), missing


@pytest.mark.asyncio
async def test_a_change_of_strategy_is_recorded_when_it_is_made() -> None:
    """By the API, by another process, by an interposer that comes while we watch."""
    async with racing(High.DATA) as (guest, pulse):
        kept = Kept()
        async with attach(
            f"unix:{guest.monitors[0]}", probes=("trace", "interposer"), on_record=kept.all.append
        ) as agent:
            assert str(agent.strategy) == "off"
            assert "interposer" not in agent.measuring.names
            done = await agent.steer("inhibit")
            assert (done.before, done.after) == (Mode.OFF, Mode.INHIBIT)
            assert "interposer" in agent.measuring.names
            assert str(agent.strategy) == "inhibit"
            await toggle(pulse)
            await agent.settle()
            inhibited = len(kept.transitions)
            other = f"unix:{guest.monitors[1]}"
            assert (await run_verb("steer", other, "--strategy", "hole")).code == 0
            await toggle(pulse)
            await agent.settle()
            assert str(agent.strategy) == "hole"
            await agent.steer("off")
            await agent.settle()
            assert str(agent.strategy) == "off"
            kinds = agent.measured(agent.header.monotonic_ns, agent.header.monotonic_ns + 1)
            assert StallKind.VCPU_INHIBIT not in kinds
    kept.check_nothing_lost()
    names = [str(r.strategy) for r in kept.strategies]
    assert names[:2] == ["off", "observe"]  # it comes in observing, and may go so
    assert [name for name in names if name != "observe"] == ["off", "inhibit", "hole", "off"]
    assert all(r.late_ns is None for r in kept.strategies)
    (hole,) = (r for r in kept.strategies if r.strategy is Mode.HOLE)
    before = [t for t in kept.transitions if t.t_ns < hole.t_ns]
    assert len(before) == inhibited == TOGGLES
    parks = kept.stalls(StallKind.VCPU_INHIBIT)
    assert [s.during for s in parks[:TOGGLES]] == [[t.seq] for t in before]


_STEERS = """
import asyncio, sys
from qmp_memlistener import attach

async def main():
    async with attach(sys.argv[1]) as agent:
        await agent.steer("hole")
        print("steered", flush=True)
        await agent.wait_lost()

asyncio.run(main())
"""


@pytest.mark.asyncio
async def test_the_guest_goes_on_under_its_strategy_when_the_agent_dies() -> None:
    """The next attach finds that, says so, and undoes it."""
    async with racing(High.CODE) as (guest, pulse):
        target = f"unix:{guest.monitors[0]}"
        dying = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _STEERS, target), stdout=asyncio.subprocess.PIPE
        )
        assert dying.stdout is not None
        async with asyncio.timeout(patience(30)):
            assert await dying.stdout.readline() == b"steered\n"
        dying.kill()
        await dying.wait()
        assert await toggled(guest, pulse) == "survived"
        assert state(guest).mode is Mode.HOLE
        listed = await run_verb("list", "--json")
        guests = listed.documents[0]["guests"]
        assert isinstance(guests, list)
        (found,) = (g for g in guests if g["pid"] == guest.pid)
        assert found["strategy"] == "hole"
        async with attach(target, probes=()) as agent:
            assert any("hole is applied" in text for text in agent.remarks)
            done = await agent.steer("off")
            assert (done.before, done.after) == (Mode.HOLE, Mode.OFF)
            assert str(agent.strategy) == "off"
        assert not state(guest).hooked


@pytest.mark.asyncio
async def test_what_no_strategy_is_is_refused() -> None:
    async with racing(High.DATA) as (guest, _), attach(f"unix:{guest.monitors[0]}") as agent:
        with pytest.raises(InputError, match="no strategy"):
            await agent.steer("holes")
        with pytest.raises(InputError, match="strict"):
            await agent.steer("pause", strict=True)
        assert str(agent.strategy) == "off"
