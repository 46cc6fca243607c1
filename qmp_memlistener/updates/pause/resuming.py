"""How a pause ends: when, whether the guest runs again, and what is worth telling about that."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from ...errors import CommandFailed, GuestMigrating, ProtocolViolation, TargetError, TargetLost
from ...qmp import Monitor, MonitorEvent
from ...qmp.guest import GuestLook, look
from .guard import RAN_TWICE, ResumeGuard, Settled
from .promise import MIGRATED

__all__ = ["End", "StopAndResume", "lost", "stop_again"]


class StopAndResume:
    """The first STOP event, and the first RESUME after it; within its block."""

    def __init__(self, monitor: Monitor) -> None:
        self._stop: MonitorEvent | None = None
        self._resume: MonitorEvent | None = None
        self._monitor = monitor

    @property
    def window(self) -> tuple[int, int] | None:
        """From STOP to RESUME; None until both were seen.

        Events of one write arrive together, so that only QEMU's stamps show how long it was.
        """
        if self._stop is None or self._resume is None:
            return None
        end, took = self._resume.t_ns, self._resume.t_ns - self._stop.t_ns
        if self._stop.stamp_ns is not None and self._resume.stamp_ns is not None:
            took = max(0, self._resume.stamp_ns - self._stop.stamp_ns)
        return end - took, end

    def __enter__(self) -> Self:
        self._end = self._monitor.subscribe(self._on_event)
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()

    def _on_event(self, event: MonitorEvent) -> None:
        if event.name == "STOP" and self._stop is None:
            self._stop = event
        elif event.name == "RESUME" and self._stop is not None and self._resume is None:
            self._resume = event


@dataclass(slots=True)
class End:
    """What came of the end of a pause."""

    runs: bool = True
    migrated: GuestMigrating | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def note(self) -> str | None:
        return "; ".join(self.notes) or None

    async def hand_over(self, guard: ResumeGuard, why: str, deadline: float) -> None:
        settled = await guard.hand_over(why, deadline=deadline)
        self.runs = settled in (Settled.RUNS, Settled.RESUMED)
        self.notes.append(f"{why}; {_sentence(settled, guard, why)}")
        if guard.obstacle == MIGRATED:
            self._is_migrated(MIGRATED)

    async def check(
        self, monitor: Monitor, before: GuestLook, after: GuestLook, deadline: float
    ) -> None:
        """QEMU has accepted `cont` between the two."""
        if after.ran_twice(before):
            self.runs = not await stop_again(monitor, deadline)
            self._is_migrated(RAN_TWICE)
            self.notes.append(RAN_TWICE)

    async def release(self, guard: ResumeGuard) -> None:
        """The guest has been resumed, by us or by another client."""
        await guard.release()
        if guard.obstacle == MIGRATED and self.migrated is None:
            self.runs = False
            self.notes.append(MIGRATED)
            self._is_migrated(MIGRATED)
        if guard.acted:
            self.notes.append(f"the resume guard resumed the guest: {guard.why}")
        elif not guard.is_alive:
            self.notes.append(
                "the resume guard ended during the update; the guest was resumed without it"
            )

    def _is_migrated(self, why: str) -> None:
        self.migrated = GuestMigrating(
            f"the guest was migrated during our pause: {why}",
            remedy="send `cont` to a monitor of the QEMU that it was migrated to",
        )


async def stop_again(monitor: Monitor, deadline: float) -> bool:
    """Our `cont` has resumed a guest that was to stay stopped: true when it is stopped again."""
    if (await look(monitor, deadline=deadline, untold="running")).status != "running":
        return True  # it was a status that `cont` does not end
    try:
        await monitor.timed("stop", deadline=deadline)
    except CommandFailed:
        return False
    return True


def _sentence(settled: Settled, guard: ResumeGuard, known: str) -> str:
    reason = f": {guard.why}" if guard.why != known else ""
    return {
        Settled.RUNS: "the guest runs",
        Settled.RESUMED: f"the resume guard resumed the guest{reason}",
        Settled.LEFT: f"the guest is still stopped: {guard.obstacle}",
        Settled.UNKNOWN: "whether the guest runs is unknown",
    }[settled]


def lost(error: TargetError, settled: Settled) -> TargetError:
    how = {
        Settled.RUNS: "the guest runs",
        Settled.RESUMED: "the resume guard resumed the guest",
        Settled.LEFT: "the guest could not be resumed",
        Settled.UNKNOWN: "whether the guest runs is unknown; QEMU may be gone",
    }[settled]
    kind = type(error) if isinstance(error, TargetLost | ProtocolViolation) else TargetError
    return kind(f"{error.message} while the guest was being paused; {how}", remedy=error.remedy)
