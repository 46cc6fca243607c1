"""What makes the transitions of a comparison: the pulse guest on command, or any guest itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from enum import StrEnum

from ...errors import DeadlineExceeded, InputError, MissingPrerequisite, OperationFailed
from ...guests import HOST_BRIDGE, I440FX, PAM_RAM, Q35, HostBridge, Pulse
from ...host.bounded import in_thread
from ...host.processes import Process
from ...probes.pulse_ram import open_pulse
from ...steer import Channel
from ...text import count_text

__all__ = ["GuestMade", "PulseMade", "PulseTransition"]

_STEP_S = 0.005
_THERE_AND_BACK = 2
_RESET_S = 30.0
_KEYBOARD = 0x64
_RESET = 0xFE
_D_OPEN, _G_SMRAME = 0x40, 0x08
_TSEG_8M = 0x05
_MMCONFIG = 0x1000_0001  # 256 MiB on, over RAM where there is more


class PulseTransition(StrEnum):
    """What the pulse guest does and takes back; a reset shuts what it has opened."""

    PAM = "pam"
    SMRAM = "smram"
    TSEG = "tseg"
    MMCONFIG = "mmconfig"
    RESET = "reset"


_LOCKED = "boot the pulse guest without firmware, which may lock it"
_REMEDIES = {
    PulseTransition.PAM: _LOCKED,
    PulseTransition.SMRAM: f"give the guest a display (-device VGA); {_LOCKED}",
    PulseTransition.TSEG: _LOCKED,
    PulseTransition.MMCONFIG: "give the guest more than 256 MiB of RAM, which is where it goes",
    PulseTransition.RESET: _LOCKED,
}


_Write = tuple[int, int, int]  # register of the host bridge, value, width


class PulseMade:
    """The pulse guest opens and shuts something, or resets itself, once a round.

    In rounds of the control it writes what the registers have.
    """

    def __init__(
        self,
        pulse: Pulse,
        what: PulseTransition,
        writes: Sequence[_Write],
        idle: Sequence[_Write],
    ) -> None:
        self._pulse = pulse
        self._what = what
        self._writes = writes
        self._idle = idle
        self._is_open = False

    @classmethod
    async def of(cls, process: Process, what: PulseTransition, machine: str) -> PulseMade:
        """`machine` is QEMU's name of it.

        Raises InputError where that has no such register, MissingPrerequisite when no pulse guest
        runs there, or it may not be commanded.
        """
        bridge = Q35 if "q35" in machine else I440FX
        try:
            with await in_thread(open_pulse, process) as memory:
                pulse = Pulse.of(memory)
        except PermissionError as exc:
            raise MissingPrerequisite(
                f"the pulse guest may not be commanded: {exc.strerror}",
                remedy="run as root or as the user that QEMU runs as",
            ) from exc
        try:
            return cls(pulse, what, *await _writes(pulse, what, bridge, machine))
        except BaseException:
            pulse.close()
            raise

    async def begin(self, channel: Channel) -> None:
        await self.make(channel)

    async def make(self, channel: Channel) -> None:
        before = channel.state().transactions
        self._is_open = True
        await self._write(self._writes)
        if self._what is PulseTransition.RESET:
            await self._reset()
        self._is_open = False
        if channel.state().transactions == before:
            raise OperationFailed(
                "the guest wrote the register, and no slot changed", remedy=_REMEDIES[self._what]
            )

    async def leave_out(self, channel: Channel) -> None:
        del channel
        await self._write(self._idle)

    async def put_back(self) -> None:
        if self._is_open:
            await self._write(self._idle)
            self._is_open = False

    async def _write(self, writes: Sequence[_Write]) -> None:
        for register, value, width in writes:
            await self._pulse.write_config(HOST_BRIDGE, register, value, width)

    async def _reset(self) -> None:
        """Through the keyboard controller; the command that does so is never answered."""
        before = self._pulse.header()
        ready = before.ready_tsc if before is not None else 0
        asked = asyncio.ensure_future(self._pulse.port_out(_KEYBOARD, _RESET, 1))

        def again() -> bool:
            now = self._pulse.header()
            return now is not None and now.ready and now.ready_tsc != ready

        try:
            await self._pulse.wait_for(again, _RESET_S, lambda: "its next boot")
        finally:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    def close(self) -> None:
        self._pulse.close()


async def _writes(
    pulse: Pulse, what: PulseTransition, bridge: HostBridge, machine: str
) -> tuple[list[_Write], list[_Write]]:
    """There and back, and what changes nothing: the registers are in the end as they were."""

    async def read(register: int | None, width: int = 1) -> tuple[int, int]:
        if register is None:
            raise InputError(
                f"{machine or 'this machine'} has no register for {what}", remedy="use a q35 guest"
            )
        return register, await pulse.read_config(HOST_BRIDGE, register, width)

    smram, had = await read(bridge.smram)
    if what is PulseTransition.SMRAM:
        there, back = [(smram, (had ^ _D_OPEN) | _G_SMRAME, 1)], [(smram, had, 1)]
    elif what is PulseTransition.PAM:
        pam, value = await read(bridge.pam)
        there, back = [(pam, value ^ PAM_RAM << 4, 1)], [(pam, value, 1)]
    elif what is PulseTransition.TSEG:
        tseg, value = await read(bridge.esmramc)
        there = [(smram, had | _G_SMRAME, 1), (tseg, 0 if value & 1 else _TSEG_8M, 1)]
        back = [(tseg, value, 1), (smram, had, 1)]
    elif what is PulseTransition.RESET and bridge.esmramc is None:
        pam, value = await read(bridge.pam)
        return [(pam, PAM_RAM << 4, 1)], [(pam, value, 1)]
    elif what is PulseTransition.RESET:  # q35's leaves PAM as it is
        tseg, value = await read(bridge.esmramc)
        there = [(smram, had | _G_SMRAME, 1), (tseg, _TSEG_8M, 1)]
        return there, [(tseg, value, 1), (smram, had, 1)]
    else:
        window, value = await read(bridge.pciexbar, 8)
        there = [(window, value & ~1 if value & 1 else _MMCONFIG, 8)]
        back = [(window, value, 8)]
    return [*there, *back], [*back, *back]


class GuestMade:
    """`count` transitions a round, whatever the guest makes; waited for so many seconds at most."""

    def __init__(self, count: int, patience_s: float) -> None:
        self._count = count
        self._patience_s = patience_s

    async def begin(self, channel: Channel) -> None:
        await self._wait(channel, _THERE_AND_BACK)

    async def make(self, channel: Channel) -> None:
        await self._wait(channel, self._count)

    async def _wait(self, channel: Channel, count: int) -> None:
        first = channel.state().transactions
        until = time.monotonic() + self._patience_s
        while (made := channel.state().transactions - first) < count:
            if time.monotonic() > until:
                raise OperationFailed(
                    f"the guest made {made} of {count_text(count, 'transition')} in "
                    f"{self._patience_s:g} s",
                    remedy="use a longer --window, or a smaller --guest-made",
                )
            await asyncio.sleep(_STEP_S)  # shared memory wakes nobody

    async def leave_out(self, channel: Channel) -> None:
        """What the guest makes happens all the same."""
        try:
            await self.make(channel)
        except OperationFailed as exc:
            raise DeadlineExceeded(exc.message, remedy=exc.remedy) from exc

    async def put_back(self) -> None:
        """Nothing: the guest goes on."""

    def close(self) -> None:
        """Nothing is held."""
