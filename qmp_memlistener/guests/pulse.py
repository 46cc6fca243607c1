"""The host's side of the pulse guest: heartbeats, gaps, the mailbox, toggles of a register.

The guest (vm-images/pulse, layout in its README.md) counts heartbeats on every CPU and obeys
commands through RAM that QEMU shares (`pulse_memory` says how it is read).  `boot_args` starts it,
`Pulse` reads and commands it.  Reading never disturbs the guest.  Times are ticks of the guest's
TSC; `Pulse.calibrate` relates them to CLOCK_MONOTONIC.  Starting QEMU is `launch`'s business.
"""

from __future__ import annotations

import asyncio
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import DeadlineExceeded, OperationFailed
from . import layout
from .images import find_built_image
from .pci import PciAddress
from .pulse_memory import High, PulseHeader, PulseMemory, ToggleLog

__all__ = [
    "PulseAnswer",
    "Pulse",
    "Toggle",
    "TscClock",
    "boot_args",
    "find_image",
]

_POLL = 0.0005  # seconds between looks at the mailbox; a spinning guest has no way to wake us

_GOOD_SAMPLE_NS = 40_000  # calibration tries again for a tighter sample than this,
_SAMPLE_ROUNDS = 50  # but not for ever
_NO_BEATS_NS = 5_000_000_000  # a busy host may not run a vCPU for a while

_COMMANDS = {value: name[4:] for name, value in vars(layout).items() if name.startswith("CMD_")}
_REFUSALS = {
    layout.STATUS_UNKNOWN: "it does not know this command",
    layout.STATUS_ARGUMENT: "an argument is out of range",
    layout.STATUS_BUSY: "something it started before is not finished",
    layout.STATUS_NO_DEVICE: "there is no such device or CPU",
}


def find_image() -> Path:
    """The guest's image: package data when installed, vm-images/pulse/pulse.img in a checkout.

    Raises MissingPrerequisite when there is neither.
    """
    return find_built_image("pulse", "pulse.img")


def boot_args(how: Literal["rom", "disk"] = "rom") -> tuple[str, ...]:
    """QEMU options that boot the guest, on pc and q35 alike; the image is only read.

    `rom` runs it in place of the firmware (tens of milliseconds, nothing set up by a BIOS),
    `disk` lets SeaBIOS boot it, so that memory and PCI look as on a stock machine.
    """
    image = find_image()
    if how == "rom":
        return ("-bios", str(image))
    # An IDE disk refuses readonly=on; snapshot=on opens the file read-only too.  SeaBIOS derives
    # 0 cylinders for so small a disk and then cannot read it on q35: hence the geometry.
    drive = f"if=none,id=pulse,format=raw,snapshot=on,file={str(image).replace(',', ',,')}"
    device = "ide-hd,drive=pulse,bootindex=0,lcyls=1,lheads=16,lsecs=63"
    return ("-drive", drive, "-device", device, "-boot", "menu=off")


@dataclass(frozen=True, slots=True)
class PulseAnswer:
    """To a command; the stamps enclose its last port write, or all of it if it had none."""

    result: int
    begin_tsc: int
    end_tsc: int


@dataclass(frozen=True, slots=True)
class TscClock:
    """Straight line between the guest's TSC and CLOCK_MONOTONIC.

    `error_ns` bounds how far either point that it was drawn through may be off.
    """

    tsc: int
    monotonic_ns: int
    ticks_per_second: float
    error_ns: int

    def to_ns(self, tsc: int) -> int:
        """CLOCK_MONOTONIC of a TSC value."""
        return self.monotonic_ns + self.duration_ns(tsc - self.tsc)

    def duration_ns(self, ticks: int) -> int:
        return round(ticks * 1e9 / self.ticks_per_second)

    def ticks(self, ns: int) -> int:
        return round(ns * self.ticks_per_second / 1e9)


class Toggle:
    """A toggle that the guest performs on its own; see `Pulse.toggle`."""

    def __init__(self, pulse: Pulse, goal: int) -> None:
        self._pulse = pulse
        self.goal = goal

    @property
    def done(self) -> int:
        """Writes finished so far."""
        return self._pulse.toggles_done()

    def writes(self, first: int = 0) -> ToggleLog:
        """Finished writes from number `first` on, as far as the guest's ring still has them."""
        return self._pulse.toggle_writes(first)

    async def wait(self, timeout: float = 30.0) -> int:
        """Until all writes are done.  DeadlineExceeded after `timeout` seconds."""
        await self._pulse.wait_for(
            lambda: self.done >= self.goal,
            timeout,
            lambda: f"{self.done} of {self.goal} toggle writes",
        )
        return self.done

    async def stop(self) -> int:
        """No further writes; returns how many there were."""
        return (await self._pulse.command(layout.CMD_TOGGLE)).result


class Pulse(PulseMemory):
    """The guest with its RAM file at `ram` (`LaunchedGuest.ram`): reads, waits and commands it.

    Methods that wait raise DeadlineExceeded after `timeout` seconds; commands the guest refuses
    raise OperationFailed.  Commands are sent one at a time, whoever calls.
    """

    def __init__(self, ram: Path, *, offset: int = 0) -> None:
        super().__init__(ram, offset=offset, writable=True)
        self._lock = asyncio.Lock()

    @classmethod
    def of(cls, memory: PulseMemory) -> Pulse:
        """The same guest, to be commanded.  Raises OSError when its RAM may not be written."""
        path, offset = memory.source
        return cls(path, offset=offset)

    async def wait_ready(self, cpus: int | None = None, timeout: float = 30.0) -> PulseHeader:
        """Until the guest is up; OperationFailed unless `cpus` (default: all it has) came along.

        After a reset the old header stays readable until the guest comes up again: compare `boots`.
        """
        await self.wait_for(self._ready, timeout, lambda: "its ready mark")
        header = self.header()
        if header is None or header.version != layout.LAYOUT_VERSION:
            raise OperationFailed(
                "the pulse guest has another layout than this library",
                remedy="rebuild the image with `make -C vm-images/pulse`",
            )
        wanted = header.expected_cpus if cpus is None else cpus
        if header.live_cpus < wanted:
            raise OperationFailed(f"only {header.live_cpus} of {wanted} CPUs of the guest came up")
        return header

    async def wait_beats(self, beats: int = 1, cpu: int = 0, timeout: float = 5.0) -> int:
        """Until the CPU has beaten `beats` times from now on; returns its count."""
        goal = self.heartbeat(cpu).count + beats
        await self.wait_for(
            lambda: self.heartbeat(cpu).count >= goal, timeout, lambda: f"heartbeats of CPU {cpu}"
        )
        return self.heartbeat(cpu).count

    async def calibrate(self, seconds: float = 0.2, cpu: int = 0) -> TscClock:
        """Measure the guest's TSC against CLOCK_MONOTONIC over `seconds`."""
        tsc0, ns0, error0 = await self._sample(cpu)
        await asyncio.sleep(seconds)
        tsc1, ns1, error1 = await self._sample(cpu)
        rate = (tsc1 - tsc0) * 1e9 / (ns1 - ns0)
        return TscClock(tsc1, ns1, rate, max(error0, error1))

    async def command(self, code: int, *args: int, timeout: float = 10.0) -> PulseAnswer:
        """Send one raw command (`layout.CMD_*`, up to six arguments) and wait for its answer."""
        name = _COMMANDS.get(code, str(code))
        async with self._lock:
            at = self._block(0)
            await self.wait_for(
                lambda: self._get32(at + layout.MB_ACK) == self._get32(at + layout.MB_SEQ),
                timeout,
                lambda: "the answer to an earlier command",
            )
            seq = (self._get32(at + layout.MB_SEQ) + 1) & 0xFF
            words = [args[i] if i < len(args) else 0 for i in range(6)]
            self._write(at + layout.MB_COMMAND, struct.pack("<I", code))
            self._write(at + layout.MB_ARG0, struct.pack("<6Q", *words))
            # one byte: the guest obeys whatever differs from the last one, also half a number
            self._write(at + layout.MB_SEQ, bytes([seq]))
            beats = self.heartbeat(0).count
            await self.wait_for(
                lambda: self._get32(at + layout.MB_ACK) == seq,
                timeout,
                lambda: f"{name} ({self.heartbeat(0).count - beats} heartbeats since)",
            )
            status = self._get32(at + layout.MB_STATUS)
            if status != layout.STATUS_OK:
                why = _REFUSALS.get(status, f"status {status}")
                raise OperationFailed(f"the pulse guest refused {name}: {why}")
            stamps = (at + layout.MB_RESULT, at + layout.MB_BEGIN_TSC, at + layout.MB_END_TSC)
            return PulseAnswer(*map(self._get64, stamps))

    async def read_config(self, function: PciAddress, register: int, width: int) -> int:
        """Read a configuration register of 1, 2, 4 or 8 bytes."""
        code = layout.CMD_READ_CONFIG
        return (await self.command(code, function.bdf, register, width)).result

    async def write_config(
        self, function: PciAddress, register: int, value: int, width: int
    ) -> PulseAnswer:
        """Write a configuration register; of 8 bytes the upper four go first, as two writes."""
        _check_value(value, width)
        code = layout.CMD_WRITE_CONFIG
        return await self.command(code, function.bdf, register, width, value)

    async def port_in(self, port: int, width: int) -> int:
        return (await self.command(layout.CMD_IN, port, width)).result

    async def port_out(self, port: int, value: int, width: int) -> PulseAnswer:
        _check_value(value, width)
        return await self.command(layout.CMD_OUT, port, width, value)

    async def peek(self, address: int, width: int) -> int:
        """What the guest reads at a guest-physical address below 4 GiB."""
        return (await self.command(layout.CMD_PEEK, address, width)).result

    async def poke(self, address: int, value: int, width: int) -> None:
        """Let the guest write memory below 4 GiB."""
        _check_value(value, width)
        await self.command(layout.CMD_POKE, address, width, value)

    async def map_bar(self, function: PciAddress, bar: int, address: int) -> PulseAnswer:
        """Give a memory BAR (0 to 5) an address and turn memory decoding on."""
        return await self.command(layout.CMD_MAP_BAR, function.bdf, bar, address)

    async def unmap_bar(self, function: PciAddress) -> PulseAnswer:
        """Turn memory decoding off: all memory BARs of the function vanish."""
        return await self.command(layout.CMD_UNMAP_BAR, function.bdf)

    async def toggle(
        self,
        function: PciAddress,
        register: int,
        values: tuple[int, int],
        count: int,
        *,
        width: int = 1,
        period: int = 0,
        unit: Literal["ticks", "turns"] = "turns",
    ) -> Toggle:
        """Write `values` in turn, `count` times in all, with `period` between two writes.

        Ticks are of the TSC, turns of CPU 0's loop (one heartbeat each).  Returns at once; CPU 0
        keeps beating and obeying meanwhile.  OperationFailed while another toggle runs.
        """
        for value in values:
            _check_value(value, width)
        if count <= 0 or period < 0 or width == 8:
            raise ValueError("count must be positive, period not negative, width 1, 2 or 4")
        how = period << 1 | (layout.UNIT_TURNS if unit == "turns" else layout.UNIT_TICKS)
        both = values[0] | values[1] << 32
        code = layout.CMD_TOGGLE
        await self.command(code, function.bdf, register, width, both, count, how)
        return Toggle(self, count)

    async def place(self, cpu: int, high: High, timeout: float = 10.0) -> None:
        """Choose what of a CPU lies above 1 MiB.  Its statistics begin anew."""
        await self._restart(cpu, timeout, layout.CMD_PLACE, high)

    async def reset(
        self, cpu: int = 0, threshold: int | None = None, timeout: float = 10.0
    ) -> None:
        """Begin the CPU's statistics anew, with another threshold (ticks) if one is given."""
        ticks = self.heartbeat(cpu).threshold if threshold is None else threshold
        await self._restart(cpu, timeout, layout.CMD_RESET, ticks)

    async def wait_for(
        self, true: Callable[[], bool], timeout: float, what: Callable[[], str]
    ) -> None:
        """Poll the guest's memory until `true`; DeadlineExceeded naming `what` otherwise."""
        try:
            async with asyncio.timeout(timeout):
                while not true():  # noqa: ASYNC110 (see _POLL)
                    await asyncio.sleep(_POLL)
        except TimeoutError as exc:
            raise DeadlineExceeded(
                f"the pulse guest did not give {what()} within {timeout:g} s",
                remedy="see whether QEMU still runs the guest (query-status) and what it printed",
            ) from exc

    async def _restart(self, cpu: int, timeout: float, code: int, argument: int) -> None:
        before = self.cpu_state(cpu).generation
        await self.command(code, cpu, argument, timeout=timeout)
        await self.wait_for(
            lambda: self.cpu_state(cpu).generation != before,
            timeout,
            lambda: f"a new generation of CPU {cpu}",
        )

    def _write(self, address: int, data: bytes) -> None:
        os.pwrite(self._fd, data, self._offset + address)

    def _ready(self) -> bool:
        header = self.header()
        return header is not None and header.ready

    async def _sample(self, cpu: int) -> tuple[int, int, int]:
        """TSC, CLOCK_MONOTONIC and error of one heartbeat: the heartbeat that two looks enclose
        tightest.

        A heartbeat reads the TSC and stores it some time later, but not before it has stored the
        one before: the look that showed the last but one is what encloses it.  Looks in quick
        succession see none while we have taken the vCPU's host CPU; then the heartbeats during a
        short sleep must do, with the larger error that this gives.
        """
        read, clock = self.tsc_reader(cpu), time.monotonic_ns
        best = (0, 0, 1 << 63)
        shown, last = clock(), read()  # when the latest look at `last` began
        not_yet: int | None = None
        rounds, until = 0, shown + _NO_BEATS_NS
        while rounds < _SAMPLE_ROUNDS or not best[0]:
            rounds += 1
            for _ in range(200):
                began, tsc, now = clock(), read(), clock()
                if tsc > last:
                    if not_yet is not None and now - not_yet < best[2]:
                        best = (tsc, (not_yet + now) // 2, now - not_yet)
                    not_yet = shown
                shown, last = began, tsc
            if best[2] < _GOOD_SAMPLE_NS:
                break
            if not best[0] and shown > until:
                raise OperationFailed(f"CPU {cpu} of the pulse guest makes no heartbeats")
            await asyncio.sleep(0.001)
        return best


def _check_value(value: int, width: int) -> None:
    if width not in (1, 2, 4, 8) or not 0 <= value < 1 << 8 * width:
        raise ValueError(f"{value:#x} is not a number of {width} bytes")
