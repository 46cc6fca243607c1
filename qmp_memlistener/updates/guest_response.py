"""What the guest does about an update: its signs, whether it has done its part, what refused.

Fed with QMP events and with records of transitions while `operation` waits; asks QEMU only for
what no event reports: the sizes of virtio-mem devices (MEMORY_DEVICE_SIZE_CHANGE comes once a
second at most).  Whether a driver has taken a PCI device is seen in the agent's snapshots.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .. import waits
from ..qmp import Monitor, MonitorEvent
from ..qmp.guest import read_memory_devices
from ..qmp.guest_devices import PERIPHERAL, read_children
from ..records import Cause, CauseType, Record, TransitionRecord
from .guest_view import Seen, look_at
from .model import Awaited, UpdatePlan, mib
from .phases import Marks
from .plans import DIMM_BLOCK
from .settings import Waiting

__all__ = ["GuestAnswer", "GuestResponse"]

QUIET_S = 0.3
"""So long nothing may happen until a guest counts as done; Linux pauses for some 100 ms between
finding a device and its driver."""
FIRST_SIGN_S = 3.0
"""Linux reacts to ACPI and PCIe hotplug within 0.1 s, a busy one within a second or two."""
_POLL_S = 0.05
_LOOK_S = 0.2  # between two looks at BARs
_DRIVER_S = 2.0  # how long a driver is waited for after the last sign of the guest
_DRIVERS = ("virtio-", "vhost-")
"""Device types that a guest's driver is waited for; one with a driver for it takes it soon."""


@dataclass(frozen=True, slots=True)
class GuestAnswer:
    """Whether the guest has done its part; `refused` when it said no; `reason` in words."""

    done: bool
    refused: bool = False
    reason: str | None = None
    remedy: str | None = None
    notes: tuple[str, ...] = ()


class GuestResponse:
    """Collects signs from the moment it is made.  `event` and `record` are callbacks."""

    def __init__(
        self,
        plan: UpdatePlan,
        marks: Marks,
        monitor: Monitor,
        driver_taken: Callable[[str], tuple[int | None, int] | None],
        waiting: Waiting,
    ) -> None:
        self._plan = plan
        self._driver_taken = driver_taken
        self._marks = marks
        self._monitor = monitor
        self._news = asyncio.Event()
        self._enough = waiting.enough
        self._gone: set[str] = set()
        self._backends_gone: list[str] = []
        self._refusal: str | None = None
        self._ost: list[str] = []
        self._lost = False
        self._transitions: list[TransitionRecord] = []
        self._seen: dict[str, Seen] | None = None
        """Our devices as they were found last; None until they were looked for."""
        self._still = False
        self._cut_short = False

    # -- what comes in -----------------------------------------------------------------------

    def record(self, record: Record) -> None:
        """A record of the agent."""
        if isinstance(record, TransitionRecord):
            self._transitions.append(record)
            if self._seen is not None:
                self._sort_in(record)
            self._news.set()

    def look(self, seen: Iterable[Seen]) -> None:
        """How the devices are now: transitions, past and future, are attributed by that."""
        self._seen = {s.placed.id: s for s in seen}
        for record in self._transitions:
            self._sort_in(record)

    def _sort_in(self, record: TransitionRecord) -> None:
        """Whose doing a transition is.  What concerns none of our devices says nothing."""
        for seen in (self._seen or {}).values():
            plugged = _plugs(record.cause, seen)
            sections = (*record.removed, *record.added)
            memory = seen.placed.memory
            inside = [s for s in sections if memory is not None and memory.holds(s.start, s.size)]
            if plugged or inside:
                # QEMU maps memory before it notifies the guest, and unmaps it when the guest ejects
                if self._plan.awaited is Awaited.GONE:
                    self._marks.sign(record.t_ns, surely=True)
                else:
                    self._marks.own(record.t_ns)
            bars = any(s.owner in seen.owners and s not in inside for s in sections)
            if _programs(record.cause, seen) or (seen.function is not None and bars):
                # BARs are mapped when the guest programs them, never by plugging (hw/pci/pci.c)
                self._marks.sign(record.t_ns, surely=True)

    def event(self, event: MonitorEvent) -> None:
        """A QMP event: of our devices, or of the guest's end."""
        data = event.data
        if event.name == "ACPI_DEVICE_OST":
            self._take_ost(data.get("info"), event.t_ns)
        elif event.name == "DEVICE_DELETED":
            self._take_deleted(data, event.t_ns)
        elif event.name in ("DEVICE_UNPLUG_GUEST_ERROR", "MEM_UNPLUG_ERROR"):
            self._take_refusal(event.name, data, event.t_ns)
        elif event.name == "MEMORY_DEVICE_SIZE_CHANGE" and data.get("id") in self._plan.devices:
            self._marks.sign(event.t_ns, surely=True)
        self._news.set()

    def _take_ost(self, info: object, t_ns: int) -> None:
        """_OST of ACPI 6.3, 6.3.5: source 1 device check, 3 ejection request, 0x103 ejection
        processing; status 0 success, 0x84 ejection in progress, the rest are refusals."""
        if not isinstance(info, Mapping) or info.get("device") not in self._plan.devices:
            return
        source, status = info.get("source"), info.get("status")
        self._marks.sign(t_ns, surely=True)
        self._ost.append(f"{info['device']}: source {source}, status {status}")
        if status not in (0, 0x84) and isinstance(status, int):
            what = {1: "general failure", 2: "unrecognised notification", 0x80: "not supported",
                    0x81: "in use", 0x82: "busy", 0x83: "a dependency is busy"}  # fmt: skip
            why = what.get(status, f"status {status:#x}")
            self._refusal = f"the guest refused {info['device']} by ACPI _OST: {why}"

    def _take_deleted(self, data: Mapping[str, object], t_ns: int) -> None:
        """The device itself has its id in `device`; a backend of it has only a path below it."""
        name, path = data.get("device"), str(data.get("path", ""))
        ours = [d for d in self._plan.devices if path.startswith(f"{PERIPHERAL}/{d}/")]
        if name in self._plan.devices:
            self._gone.add(str(name))
        elif ours:
            self._backends_gone.append(path.rpartition("/")[2])
        for device in (name, *ours):
            seen = (self._seen or {}).get(str(device))
            if seen is not None and seen.why_unseen is None:
                self._marks.sign(t_ns)
            elif seen is not None:
                self._marks.own(t_ns)  # QEMU takes it out without the guest

    def _take_refusal(self, name: str, data: Mapping[str, object], t_ns: int) -> None:
        path = str(data.get("path", "")).rpartition("/")[2]
        if data.get("device") in self._plan.devices or path in self._plan.devices:
            self._marks.sign(t_ns)
            why = f": {data['msg']}" if data.get("msg") else ""
            self._refusal = (
                f"the guest refused to release {data.get('device') or path} ({name}{why})"
            )

    # -- waiting -----------------------------------------------------------------------------

    async def wait(self, wait_s: float) -> GuestAnswer:
        """Until the guest has done its part, refused, `wait_s` seconds are over, or the update is
        ended.  Raises TargetError."""
        with waits.waiting("for the guest to do its part; Ctrl-C ends that"):
            return await self._wait(time.monotonic() + wait_s)

    async def still(self) -> GuestAnswer:
        """How things are with a guest that does not run: it does nothing."""
        self._still = True
        self._marks.still = True
        return await self._wait(0.0)

    async def _wait(self, end: float) -> GuestAnswer:
        match self._plan.awaited:
            case Awaited.GONE:
                answer = await self._wait_gone(end)
            case Awaited.SIZE:
                answer = await self._wait_sizes(end)
            case Awaited.REACTION | Awaited.TAKEN:
                answer = await self._wait_reaction(end)
        if not answer.refused and self._marks.first_sign is not None:
            await self._wait_quiet(max(end, time.monotonic() + QUIET_S))
        if not self._enough.is_set():
            return answer
        note = "interrupted: the guest was not waited for any longer"
        notes = (*answer.notes, note)
        if answer.done and self._plan.awaited is not Awaited.GONE and self._cut_short:
            why = "it was changed, and the guest's part was not waited for"
            return GuestAnswer(
                False, reason=why, remedy="nothing: it continues by itself", notes=(note,)
            )
        return replace(answer, notes=notes)

    async def _wait_gone(self, end: float) -> GuestAnswer:
        wanted = set(self._plan.devices)
        while not wanted <= self._gone and self._refusal is None and self._left(end):
            await self._until(end)
        if wanted <= self._gone:
            return GuestAnswer(True)
        if self._refusal is not None:
            return GuestAnswer(
                False, True, self._refusal, "stop using it in the guest, and try again"
            )
        left = wanted - self._gone
        if left.isdisjoint(await read_children(self._monitor, PERIPHERAL)):
            return GuestAnswer(
                False,
                reason=f"{', '.join(sorted(left))} left the guest, and QEMU has not freed it yet: "
                "a vCPU or a request still uses it",
                remedy="it continues by itself; wait longer (--wait)",
            )
        so_far = []
        if self._backends_gone:
            so_far.append(f"its {', '.join(self._backends_gone)} is gone, the device itself not")
        if self._ost:
            so_far.append(f"the guest reported {self._ost[-1]}")
        if not so_far:
            so_far.append("the guest was asked and has not answered")
        are = "is" if len(left) == 1 else "are"
        return GuestAnswer(
            False,
            reason=f"{', '.join(sorted(left))} {are} still there: {'; '.join(so_far)}",
            remedy="wait longer (--wait); is the guest's hotplug driver loaded, and is it running?",
        )

    async def _wait_sizes(self, end: float) -> GuestAnswer:
        sizes: dict[str, int] = {}
        while self._plan.sizes:
            before = sizes
            sizes = await self._read_sizes()
            if before and sizes != before:
                self._marks.sign(time.monotonic_ns(), surely=True)
            if sizes == self._plan.sizes:
                return GuestAnswer(True)
            if not self._left(end):
                break
            await self._until(min(end, time.monotonic() + _POLL_S))
        if not self._plan.sizes:
            return GuestAnswer(True)
        have = ", ".join(
            f"{name} has {sizes[name] >> 20} of {size >> 20} MiB"
            if name in sizes
            else f"QEMU lists no memory device {name}"
            for name, size in self._plan.sizes.items()
        )
        return GuestAnswer(
            False,
            reason=f"the guest has not plugged or unplugged all of it: {have}",
            remedy="it continues as the guest can; wait longer (--wait), or ask for another size",
        )

    async def _read_sizes(self) -> dict[str, int]:
        return {
            d.id: d.size
            for d in await read_memory_devices(self._monitor)
            if d.id in self._plan.sizes and d.id is not None and d.size is not None
        }

    async def _wait_reaction(self, end: float) -> GuestAnswer:
        devices = list((self._seen or {}).values())
        unseen = [s.why_unseen for s in devices if s.why_unseen is not None]
        if devices and len(unseen) == len(devices):
            note = f"realised in QEMU; what the guest does with it is unknown: {unseen[0]}"
            return GuestAnswer(True, notes=(note,))
        first = min(end, time.monotonic() + FIRST_SIGN_S)
        while self._marks.first_sign is None and self._left(first):
            await self._look_at_bars()
            await self._until(min(first, time.monotonic() + _LOOK_S))
        if self._marks.first_sign is None:
            return self._silent(devices)
        await self._wait_quiet(end)
        if self._refusal is not None:
            return GuestAnswer(False, True, self._refusal, "see the guest's log")
        return next(filter(None, map(_unusable, devices)), GuestAnswer(True))

    def _silent(self, devices: Sequence[Seen]) -> GuestAnswer:
        memory = [s.placed for s in devices if s.answers and s.placed.memory is not None]
        unusable = next(filter(None, map(_unusable, devices)), None)
        if unusable is not None:
            return unusable
        if memory and self._plan.awaited is Awaited.TAKEN and not self._still:
            size = sum(p.memory.size for p in memory if p.memory is not None)
            return GuestAnswer(
                False,
                reason=f"{mib(size)} were given, and the guest has not answered: whether it uses "
                "them is unknown",
                remedy="is its memory hotplug driver there (CONFIG_ACPI_HOTPLUG_MEMORY)? unplug it "
                "otherwise",
            )
        self._cut_short = self._enough.is_set()
        note = "the guest has not reacted: it may have no driver"
        return GuestAnswer(True, notes=() if self._still or self._cut_short else (note,))

    async def _look_at_bars(self) -> None:
        """Whether the guest has given a BAR an address, where there is no trace."""
        for name, before in list((self._seen or {}).items()):
            if before.function is None or self._marks.first_sign is not None:
                continue
            asked = time.monotonic_ns()
            now = await look_at(self._monitor, name)
            if now is None:
                continue
            assert self._seen is not None
            self._seen[name] = now
            if any(bar.start is not None for bar in now.bars or ()):
                self._marks.sign(asked, surely=True)

    async def _wait_quiet(self, end: float) -> None:
        """Until nothing has come for `QUIET_S`; looks after the driver meanwhile."""
        while self._left(end):
            last = self._marks.last_sign or self._marks.accepted or self._marks.begun
            bound = self._marks.bound is not None or not self._look_for_driver()
            # a guest that is busy takes its time between the last BAR and the driver
            quiet = (QUIET_S if bound else _DRIVER_S) - (time.monotonic_ns() - last) / 1e9
            if quiet <= 0:
                return
            nap = quiet if bound else min(quiet, _POLL_S)
            await self._until(min(end, time.monotonic() + nap))

    def _look_for_driver(self) -> bool:
        """Whether there is a driver to wait for, still."""
        marks = self._marks
        if self._plan.awaited is not Awaited.REACTION or marks.first_sign is None:
            return False
        taken = self._driver_taken(self._plan.devices[0])
        sent = marks.sent or 0  # what was seen before was another device of that id
        if taken is not None and taken[1] >= sent:
            since, marks.bound = taken
            first = marks.first_sign if since is None or since < sent else since
            marks.unbound = min(marks.bound, first)
        return marks.bound is None and any(
            step.addition is not None and step.addition.type.startswith(_DRIVERS)
            for step in self._plan.update
        )

    async def _until(self, end: float) -> None:
        """Until something comes, or `end`."""
        self._news.clear()
        events = [asyncio.ensure_future(e.wait()) for e in (self._news, self._enough)]
        try:
            left = max(0.0, end - time.monotonic())
            await asyncio.wait(events, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for event in events:
                event.cancel()

    def _left(self, end: float) -> bool:
        return time.monotonic() < end and not self._enough.is_set()


def _causes(cause: Cause, kind: CauseType) -> Iterator[Cause]:
    if cause.type is kind:
        yield cause
    for each in cause.causes or ():
        yield from _causes(each, kind)


def _plugs(cause: Cause, seen: Seen) -> bool:
    """QEMU traced that it maps or unmaps this memory device."""
    return any(c.device == seen.placed.id for c in _causes(cause, CauseType.MEMORY_DEVICE))


def _programs(cause: Cause, seen: Seen) -> bool:
    """QEMU traced a BAR of this device: `driver bus:slot.function`, the bus as the guest numbers
    it."""
    if seen.function is None:
        return False
    slot, function = seen.function
    for each in _causes(cause, CauseType.PCI_BAR):
        name, _, where = (each.device or "").rpartition(" ")
        if name == seen.placed.driver and where.endswith(f":{slot:02x}.{function}"):
            return seen.placed.pci in (None, where)
    return False


def _unusable(seen: Seen) -> GuestAnswer | None:
    """A DIMM that Linux takes no part of; its _OST says success all the same (acpi_memhotplug,
    6.1): add_memory wants whole blocks, at addresses of blocks."""
    placed = seen.placed
    memory = placed.memory
    if not seen.answers or memory is None:
        return None
    if not memory.size % DIMM_BLOCK and not memory.start % DIMM_BLOCK:
        return None
    return GuestAnswer(
        False,
        reason=f"{placed.id} is in the map, {mib(memory.size)} at {memory.start:#x}; Linux uses 0 "
        f"bytes of it: it takes whole blocks of {mib(DIMM_BLOCK)} at least, at multiples of that",
        remedy="unplug it, and any DIMM of odd size before it; choose a multiple of "
        f"{mib(DIMM_BLOCK)}",
    )
