"""A guest whose main loop does not answer is not lost: that is what users look for."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from qmp_memlistener import attach
from qmp_memlistener.agent import source
from qmp_memlistener.guests import HOST_BRIDGE, I440FX, PAM_RAM, GuestSpec, Pulse, boot_args, launch
from qmp_memlistener.recording import Note, Record, TransitionRecord


@pytest.mark.parametrize("trace", [True, False], ids=["trace", "polling"])
@pytest.mark.asyncio
async def test_a_stopped_qemu_is_waited_for(trace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "SNAPSHOT_DEADLINE_S", 0.3)
    notes: asyncio.Queue[str] = asyncio.Queue()
    transitions: list[TransitionRecord] = []

    def on_record(record: Record) -> None:
        if isinstance(record, Note):
            notes.put_nowait(record.text)
        elif isinstance(record, TransitionRecord):
            transitions.append(record)

    async def note(text: str) -> None:
        async with asyncio.timeout(20):
            while text not in await notes.get():
                pass

    async with launch(GuestSpec(machine="pc", accel="tcg", args=boot_args())) as guest:
        assert guest.ram is not None
        pulse = Pulse(guest.ram)
        await pulse.wait_ready()
        async with attach(str(guest.monitors[0]), trace=trace, on_record=on_record) as agent:
            # changes all the time, so that a snapshot is always wanted
            toggle = await pulse.toggle(
                HOST_BRIDGE, I440FX.pam, (PAM_RAM << 4, 0), 1_000_000, period=1000
            )
            os.kill(guest.pid, signal.SIGSTOP)
            try:
                await note("no snapshot")
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
