"""What a source of knowledge about a guest looks like to the agent, and the one that polls.

`tracing` has the source that misses nothing.  What comes and goes between two snapshots of
`PollSource` is not seen; the header of the records says so.  Both read from the text of a snapshot
the maps that KVM has slots for, and who may do DMA.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from ..errors import DeadlineExceeded, ProtocolViolation
from ..memslots import ADDRESS_SPACES
from ..qmp import IdleRoundTrip, Monitor, take_snapshot
from ..records import Note, Record
from ..topology import Dump, MemoryMap, read_maps
from ..tracking import Tracker

__all__ = [
    "BusMasters",
    "MakeTracker",
    "OwnCommand",
    "Patience",
    "PollSource",
    "Publish",
    "Source",
    "maps_of",
    "snapshot_deadline",
]


Publish = Callable[[Iterable[Record]], None]
"""Takes the records that do not come from the tracker; called, also without any, on news."""

MakeTracker = Callable[[dict[int, MemoryMap], int], Tracker]
"""Makes the tracker from the first snapshot and its time."""

OwnCommand = Callable[[str, int, int], None]
"""Given a command of ours that QEMU carried out: its name, when it began and when it was over."""

SNAPSHOT_DEADLINE_S = 10.0

_BUS_MASTER = re.compile(r"alias bus master @.*?( \[disabled\])? owner:\{dev id=([^}]*)\}")


def snapshot_deadline() -> float:
    """Seconds after which a snapshot is given up for this time."""
    return SNAPSHOT_DEADLINE_S


class Source(Protocol):
    """`snapshot` must be awaited once; then `keep_snapshots` runs as a task."""

    name: str
    tracker: Tracker | None
    masters: BusMasters
    snapshots: int
    snapshot_ns: int

    async def snapshot(self) -> int:
        """Take a snapshot and fold it in; returns its round trip in ns."""

    async def keep_snapshots(self) -> None:
        """Take snapshots when they are needed, for ever."""

    async def settle(self) -> None:
        """Return when everything that has happened so far is reported."""

    def poke(self) -> None:
        """A QMP event came: something may have changed."""

    def reported_to(self) -> int | None:
        """Every change up to this time is reported; None when that cannot be said."""

    async def finish(self) -> None:
        """The guest is gone: take in what it left."""


class Patience:
    """What to do when a snapshot takes too long: a stalled guest is what users look for.

    It is said once, and again when the guest answers; the agent goes on trying.
    """

    def __init__(self, publish: Publish) -> None:
        self._publish = publish
        self._since_ns: int | None = None

    def stalled(self, error: DeadlineExceeded) -> None:
        """A snapshot did not come in time."""
        if self._since_ns is None:
            self._since_ns = time.monotonic_ns()
            self._publish([Note(t_ns=self._since_ns, text=f"no snapshot: {error.message}")])

    def answered(self) -> None:
        """A snapshot came."""
        if self._since_ns is not None:
            now = time.monotonic_ns()
            late_s = (now - self._since_ns) / 1e9
            self._since_ns = None
            self._publish([Note(t_ns=now, text=f"snapshots again, {late_s:.1f} s later")])


def maps_of(text: str | Dump) -> dict[int, MemoryMap]:
    """The maps in a snapshot, parsed or not, by KVM's address-space id.

    Raises MtreeError for text that no QEMU prints, ProtocolViolation when there is no `memory`.
    """
    maps = read_maps(text, list(ADDRESS_SPACES))
    if "memory" not in maps:
        raise ProtocolViolation("`info mtree` shows no address space `memory`")
    return {ADDRESS_SPACES[name]: m for name, m in maps.items()}


class BusMasters:
    """When drivers of the guest took their PCI devices, from the texts of successive snapshots.

    The alias `bus master` of a device is enabled while its command register lets it do DMA
    (pci_init_bus_master and pci_default_write_config, hw/pci/pci.c).  Linux leaves that to drivers
    (pci_set_master): of virtio-net, virtio-blk, virtio-rng and nvme it was enabled exactly when a
    driver was bound, of e1000 and ivshmem without a driver never (Linux 6.1; 7.2.22, 10.0.2,
    11.1.3).  Only devices with an id are known.
    """

    def __init__(self) -> None:
        self._off: dict[str, int] = {}
        self._on: dict[str, int] = {}

    def take(self, text: str, start_ns: int, end_ns: int) -> None:
        """A snapshot, made between these times."""
        found = {m[2]: m[1] is None for m in _BUS_MASTER.finditer(text)}
        self._on = {name: self._on.get(name, end_ns) for name, on in found.items() if on}
        for name, on in found.items():
            if not on:
                self._off[name] = start_ns
        self._off = {name: t_ns for name, t_ns in self._off.items() if name in found}

    def taken(self, device: str) -> tuple[int | None, int] | None:
        """When it was last seen without a driver (None: never) and first with one; None: it has
        none, or that is not known."""
        on = self._on.get(device)
        return None if on is None else (self._off.get(device), on)


# -- snapshots and events ----------------------------------------------------------------------


SHORTEST_S = 0.02
LONGEST_S = 1.0
SLOWER = 1.5
SHARE = 50
"""A snapshot that took `t` is followed by `SHARE * t` without one: at most 2 % of the BQL."""


class PollSource:
    """A `Source` that takes snapshots: often after something happened, rarely otherwise."""

    name = "polling"

    def __init__(
        self,
        monitor: Monitor,
        idle: IdleRoundTrip,
        publish: Publish,
        make_tracker: MakeTracker,
    ) -> None:
        self._monitor = monitor
        self._idle = idle
        self._publish = publish
        self._make_tracker = make_tracker
        self.tracker: Tracker | None = None
        self.masters = BusMasters()
        self.snapshots = 0
        self.snapshot_ns = 0
        self._patience = Patience(publish)
        self._text = ""
        self._poked = asyncio.Event()
        self._lock = asyncio.Lock()

    def poke(self) -> None:
        """Something happened: look soon, and for a while often."""
        self._poked.set()

    async def keep_snapshots(self) -> None:
        """Look again and again, at a pace that follows the changes."""
        pause_s = SHORTEST_S
        while True:
            try:
                async with asyncio.timeout(pause_s):
                    await self._poked.wait()
            except TimeoutError:
                pass
            poked = self._poked.is_set()
            self._poked.clear()
            before = self._text
            try:
                took_s = await self.snapshot() / 1e9
            except DeadlineExceeded as exc:
                self._patience.stalled(exc)
                took_s = LONGEST_S
            else:
                self._patience.answered()
            lively = poked or self._text is not before
            pause_s = SHORTEST_S if lively else min(pause_s * SLOWER, LONGEST_S)
            await asyncio.sleep(min(SHARE * took_s, LONGEST_S))

    async def snapshot(self) -> int:
        """Take one snapshot and fold it in; returns how long it took, in ns."""
        async with self._lock:
            shot = await take_snapshot(self._monitor, self._idle, deadline=snapshot_deadline())
            self.snapshots += 1
            self.snapshot_ns += shot.duration_ns
            self.masters.take(shot.text, shot.t_start_ns, shot.t_end_ns)
            if shot.text != self._text:
                self._text = shot.text
                maps = maps_of(shot.text)
                if self.tracker is None:
                    self.tracker = self._make_tracker(maps, shot.t_end_ns)
                else:
                    self.tracker.snapshot(maps, shot.t_end_ns)
                self._publish(())
            return shot.duration_ns

    async def settle(self) -> None:
        """Take a snapshot now."""
        await self.snapshot()

    def reported_to(self) -> int | None:
        """Nothing can be said of what happened between two snapshots."""
        return None

    async def finish(self) -> None:
        """Nothing is left to take in."""
