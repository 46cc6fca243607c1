"""A guest whose main loop does not answer is not lost: that is what users look for."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from qmp_memlistener.agent import source
from qmp_memlistener.guests import HOST_BRIDGE, I440FX, PAM_RAM, GuestSpec, Pulse, boot_args, launch
from qmp_memlistener.records import Note, Record, TransitionRecord
from tests.support.live import attach_bare


@pytest.mark.parametrize("trace", [True, False], ids=["trace", "polling"])
@pytest.mark.asyncio
async def test_a_stopped_qemu_is_waited_for(trace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "SNAPSHOT_DEADLINE_S", 0.3)
    notes: asyncio.Queue[str] = asyncio.Queue()
    transitions: list[TransitionRecord] = []
    changed = asyncio.Event()

    def on_record(record: Record) -> None:
        if isinstance(record, Note):
            notes.put_nowait(record.text)
        elif isinstance(record, TransitionRecord):
            transitions.append(record)
            changed.set()

    async def note(text: str, timeout: float = 20) -> None:
        async with asyncio.timeout(timeout):
            while text not in await notes.get():
                pass

    async with launch(GuestSpec(machine="pc", accel="tcg", args=boot_args())) as guest:
        assert guest.ram is not None
        pulse = Pulse(guest.ram)
        await pulse.wait_ready()
        async with attach_bare(str(guest.monitors[0]), trace=trace, on_record=on_record) as agent:
            # changes all the time, so that a snapshot is always wanted
            toggle = await pulse.toggle(
                HOST_BRIDGE, I440FX.pam, (PAM_RAM << 4, 0), 1_000_000, period=20_000
            )
            for attempt in range(10):
                changed.clear()
                await asyncio.wait_for(changed.wait(), 20)
                os.kill(guest.pid, signal.SIGSTOP)
                try:
                    await note("no snapshot", 2)
                    break
                except TimeoutError:
                    # stopped between a snapshot and the next change: nothing was wanted
                    assert attempt < 9
                finally:
                    os.kill(guest.pid, signal.SIGCONT)
            await note("snapshots again")
            assert not agent.is_lost
            await toggle.stop()
            await agent.settle()
            await pulse.write_config(HOST_BRIDGE, I440FX.pam, 0, 1)
            await agent.settle()
            seen = agent.transitions
            await pulse.write_config(HOST_BRIDGE, I440FX.pam, PAM_RAM << 4, 1)
            await agent.settle()
            assert agent.transitions == seen + 1
            assert [h.start for h in transitions[-1].holes_filled] == [0xF0000]


@pytest.mark.asyncio
async def test_an_isolated_change_costs_one_snapshot() -> None:
    """Each holds the BQL for a moment: one more than needed is one too many."""
    async with launch(GuestSpec(machine="pc", accel="tcg", args=boot_args())) as guest:
        assert guest.ram is not None
        pulse = Pulse(guest.ram)
        await pulse.wait_ready()
        seen: asyncio.Queue[TransitionRecord] = asyncio.Queue()

        def on_record(record: Record) -> None:
            if isinstance(record, TransitionRecord):
                seen.put_nowait(record)

        async with attach_bare(str(guest.monitors[0]), on_record=on_record) as agent:
            before = agent.snapshots[0]
            changes = 12
            for turn in range(changes):
                value = 0 if turn % 2 else PAM_RAM << 4
                await pulse.write_config(HOST_BRIDGE, I440FX.pam, value, 1)
                async with asyncio.timeout(10):
                    await seen.get()
                # longer than the pause after a snapshot, so that a second one would be taken
                await asyncio.sleep(0.05)
            assert agent.transitions == changes
            assert agent.snapshots[0] - before == changes
