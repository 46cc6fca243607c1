"""The `kvmstats` probe: KVM's own counters before and after, through QEMU's query-stats.

It measures no stall; it says what KVM did meanwhile (exits, TLB flushes, page-table work).
query-stats is there since QEMU 7.1 (qapi/stats.json) and needs KVM_CAP_BINARY_STATS_FD, Linux 5.14.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..errors import CommandFailed, MemListenerError
from ..qmp import Monitor
from ..records import MeasurementRecord
from .delivery import Progress
from .model import Context, ProbeInfo, ProbeUnavailable, Sink, Verdict

__all__ = ["Counters", "KvmStatsProbe", "changes", "read_counters"]

_PROVIDER = "kvm"
_TARGETS = ("vm", "vcpu")
_DEADLINE_S = 5.0
_SINCE = (7, 1)

Key = tuple[str, str]
"""The QOM path of a vCPU, "" for the VM; the name of the statistic."""


@dataclass(frozen=True, slots=True)
class Counters:
    """All counters at one time: `from_ns` and `to_ns` are the times of the commands."""

    values: Mapping[Key, int]
    from_ns: int
    to_ns: int


class KvmStatsProbe:
    """Delivers a measurement for every burst, and one for the whole attachment when it ends.

    Its values are the differences of KVM's counters under KVM's own names, vCPUs added up: of
    cumulative ones (`exits`, `mmio_exits`, `tlb_flush`, …) and of gauges (`pages_4k`, …; these may
    go down).  Peaks, booleans and histograms have no difference that means anything and are left
    out, and so are counters that did not change.  Names in `_ns` are nanoseconds, the others
    counts.  Of a vCPU that came or went meanwhile nothing is known (one that is plugged again goes
    on with the counters it had, kvm_unpark_vcpu in accel/kvm/kvm-all.c): `vcpus_left_out` counts
    these, and is absent when there are none.
    """

    info = ProbeInfo(
        name="kvmstats",
        measures=(),
        needs="KVM, QEMU 7.1 or later, Linux 5.14 or later",
        resolution_ns=0,
        cost="two commands before and two after: 1 to 5 ms of main loop, and an exit of each vCPU",
        share=0.0,
    )

    def __init__(self, context: Context) -> None:
        self._context = context
        self._progress = Progress(self._tell)
        self._sink: Sink | None = None
        self._bursts = 0
        self._kept: frozenset[str] = frozenset()
        self._at_start: Counters | None = None
        self._at_burst: Counters | None = None

    async def check(self) -> Verdict:
        """Usable when query-stats has something to say of KVM."""
        monitor = self._context.monitor
        if self._context.facts.kvm is not True:
            return Verdict.no("the guest does not run under KVM", "run it with -accel kvm")
        if monitor.version.release < _SINCE:
            return Verdict.no(
                f"QEMU {monitor.version} has no query-stats", "QEMU 7.1 and later have it"
            )
        try:
            if not await _kept_names(monitor):
                return Verdict.no(
                    "the host's KVM keeps no statistics that QEMU can read",
                    "Linux 5.14 and later do",
                )
        except MemListenerError as error:
            return Verdict.no(error.message, error.remedy)
        return Verdict(True)

    async def start(self, sink: Sink) -> None:
        """Read the counters a first time."""
        try:
            self._kept = await _kept_names(self._context.monitor)
            self._at_start = await read_counters(self._context.monitor, self._kept)
        except MemListenerError as error:
            raise ProbeUnavailable(error.message, remedy=error.remedy) from error
        self._sink = sink
        self._progress.start()

    async def burst(self, on: bool) -> None:
        """Read them before the operation and after it; bursts may be nested."""
        self._bursts = max(0, self._bursts + (1 if on else -1))
        if on and self._bursts == 1:
            self._at_burst = await self._read()
        elif not on and self._bursts == 0:
            before, self._at_burst = self._at_burst, None
            if before is not None:
                self._deliver(before, await self._read())

    async def flush(self) -> None:
        """There are no windows to deliver."""
        self._tell()

    async def stop(self) -> None:
        """Deliver the whole span, unless QEMU is gone."""
        self._progress.stop()
        before, self._at_start = self._at_start, None
        try:
            if before is not None and self._context.monitor.is_connected:
                self._deliver(before, await self._read())
        finally:
            self._sink = None

    def _tell(self) -> None:
        if self._sink is not None:
            self._sink.advance(self.info.name, time.monotonic_ns())

    async def _read(self) -> Counters | None:
        """The counters, or None: that is said, unless QEMU is gone."""
        try:
            return await read_counters(self._context.monitor, self._kept)
        except MemListenerError as error:
            if self._sink is not None and not self._context.monitor.lost.done():
                self._sink.lost(self.info.name, f"no counters: {error.message}")
            return None

    def _deliver(self, before: Counters, after: Counters | None) -> None:
        if self._sink is not None and after is not None:
            values: dict[str, int | float | str] = {**changes(before, after)}
            self._sink.measure(
                MeasurementRecord(
                    probe=self.info.name,
                    start_ns=before.from_ns,
                    end_ns=after.to_ns,
                    values=values,
                )
            )


async def read_counters(monitor: Monitor, kept: frozenset[str]) -> Counters:
    """The counters named `kept`, of the VM and of each vCPU.  Raises as `Monitor.timed` does."""
    values: dict[Key, int] = {}
    times: list[int] = []
    for target in _TARGETS:
        reply = await monitor.timed(
            "query-stats",
            {"target": target, "providers": [{"provider": _PROVIDER}]},
            deadline=_DEADLINE_S,
        )
        times += [reply.t_start_ns, reply.t_end_ns]
        for entry in _objects(reply.value):
            path = str(entry.get("qom-path", ""))
            for stat in _objects(entry.get("stats")):
                name, value = str(stat.get("name")), stat.get("value")
                if name in kept and isinstance(value, int):
                    values[path, name] = value
    return Counters(values, times[0], times[-1])


def changes(before: Counters, after: Counters) -> dict[str, int]:
    """What changed, by name; see `KvmStatsProbe`."""
    found: Counter[str] = Counter()
    for key in after.values.keys() & before.values.keys():
        found[key[1]] += after.values[key] - before.values[key]
    one_time = {path for path, _ in after.values.keys() ^ before.values.keys()}
    both_times = {path for path, _ in after.values.keys() & before.values.keys()}
    found["vcpus_left_out"] = len(one_time - both_times)
    return {name: found[name] for name in sorted(found) if found[name]}


async def _kept_names(monitor: Monitor) -> frozenset[str]:
    """The counters and gauges among the statistics of this QEMU and kernel."""
    try:
        schemas = await monitor.execute(
            "query-stats-schemas", {"provider": _PROVIDER}, deadline=_DEADLINE_S
        )
    except CommandFailed:
        return frozenset()  # a provider that is not there is an error
    return frozenset(
        str(stat.get("name"))
        for schema in _objects(schemas)
        if schema.get("target") in _TARGETS
        for stat in _objects(schema.get("stats"))
        if stat.get("type") in ("cumulative", "instant") and stat.get("unit") != "boolean"
    )


def _objects(value: object) -> Iterator[Mapping[str, object]]:
    """The objects in a list; nothing for anything else."""
    for entry in value if isinstance(value, list) else ():
        if isinstance(entry, Mapping):
            yield entry
