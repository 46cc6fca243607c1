"""`lab race`: punch and fill a hole many times under each strategy, and say what the guest met.

Each strategy has a machine of its own.  In a round every one of them punches and fills once, in
random order, while the vCPUs of the others are held.  The control, which changes nothing, is one.
"""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import msgspec

from ..distribution import Distribution
from ..errors import InputError, MissingPrerequisite
from ..memslots import Rules
from .abi import Cap
from .competitor import Competitor, keeps_bitmap, repeated_plans
from .layout import Layout
from .measuring import Totals
from .memory import PAGE
from .programs import MAX_VCPUS, GuestKind
from .strategies import CONTROL, LabStrategy, select, why_not
from .system import Cpus
from .vm import Kvm, flavour

__all__ = [
    "RaceOptions",
    "RaceReport",
    "StrategyResult",
    "host_facts",
    "none_ran",
    "race_document",
    "race_of",
    "run_race",
]

_OWN_SLOTS = 4  # the private one, and what a hole takes beside the RAM it is in


class RaceOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to race.  Sizes in bytes; `hole_offset` None is the middle of the slot.

    `updates` counts punches and fills; an odd number is one more.
    """

    strategies: tuple[str, ...] = ("all",)
    updates: int = 400
    guest: GuestKind = GuestKind.DATA
    vcpus: int = 1
    slot_size: int = 64 << 20
    hole_size: int = PAGE
    hole_offset: int | None = None
    slots: int = 0
    dirty_log: bool = False
    rings: bool = False
    populate: bool = False
    touch_hole: bool = False
    seed: int = 0

    def layout(self) -> Layout:
        """The RAM and its hole.  Raises InputError for what does not fit."""
        if not 1 <= self.vcpus <= MAX_VCPUS:
            raise InputError(f"{self.vcpus} vCPUs", remedy=f"the lab has room for 1 to {MAX_VCPUS}")
        if self.updates < 1:
            raise InputError(f"{self.updates} updates", remedy="use 1 or more")
        if self.touch_hole and self.guest not in (GuestKind.DATA, GuestKind.GAP):
            raise InputError(
                f"a {self.guest} guest does not go through addresses",
                remedy="touch the hole with the data guest",
            )
        return Layout(
            size=self.slot_size,
            hole_size=self.hole_size,
            hole_offset=self.hole_offset,
            extra=self.slots,
            logged=self.dirty_log or self.rings or self.guest is GuestKind.WRITER,
        )


class Model(msgspec.Struct, frozen=True):
    """What the plan of a strategy says of one punch: what no kernel runs can still be compared."""

    operations: int
    exposed_bytes: int
    atomic: bool
    slot_ids_kept: bool
    bitmap_dropped_bytes: int


class StrategyResult(msgspec.Struct, frozen=True):
    """One strategy's race.  `skipped` says why it did not run."""

    name: str
    fidelity: str
    model: Model
    skipped: str | None = None
    totals: Totals = Totals()
    bitmap_kept: bool = False


class RaceReport(msgspec.Struct, frozen=True):
    """A race; `host` says where."""

    host: dict[str, object]
    options: RaceOptions
    results: tuple[StrategyResult, ...]
    ram_lost: int


def run_race(
    options: RaceOptions,
    *,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RaceReport:
    """Run it.  `progress` gets rounds done and rounds in all.

    Raises InputError; MissingPrerequisite when KVM cannot be used here; OperationFailed when KVM
    refuses something or a vCPU does not go on.  Whatever it raises, nothing is left behind.
    """
    layout = options.layout()
    chosen = select(options.strategies)
    order = random.Random(options.seed)
    with ExitStack() as stack:
        kvm = stack.enter_context(Kvm(device) if device else Kvm())
        skipped = {s.name: why_not(s, kvm, slots=slots_of(s, layout)) for s in chosen}
        kept = {s.name: keeps_bitmap(kvm, s) for s in chosen if skipped[s.name] is None}
        cpus = Cpus.for_vcpus(options.vcpus)
        with cpus.on(cpus.vcpus):  # where the threads of the vCPUs stay
            competitors = {
                s.name: stack.enter_context(
                    Competitor(
                        kvm,
                        s,
                        layout,
                        options.guest,
                        vcpus=options.vcpus,
                        populate=options.populate,
                        touch_hole=options.touch_hole,
                        rings=options.rings,
                    )
                )
                for s in chosen
                if skipped[s.name] is None
            }
        stack.enter_context(cpus.on(cpus.own))
        rounds = (options.updates + 1) // 2
        running = list(competitors.values())
        for i in range(rounds):
            order.shuffle(running)
            for competitor in running:
                competitor.round()
            if progress is not None:
                progress(i + 1, rounds)
        results = tuple(
            StrategyResult(
                s.name,
                s.fidelity,
                model_of(s, layout),
                skipped[s.name],
                Totals.of(competitors[s.name].updates) if s.name in competitors else Totals(),
                kept.get(s.name, False),
            )
            for s in chosen
        )
        low, high = layout.lost
        return RaceReport(host_facts(kvm, cpus), options, results, high - low - options.hole_size)


def none_ran(results: Iterable[tuple[str, str | None]]) -> MissingPrerequisite | None:
    """The error when, the control apart, all of them were skipped: `results` are names and why."""
    asked = [(name, why) for name, why in results if name != CONTROL]
    if any(why is None for _, why in asked):
        return None
    reasons = "; ".join(f"{name}: {why}" for name, why in asked)
    return MissingPrerequisite(
        f"none of the requested strategies can run here: {reasons}",
        remedy="`lab strategies` lists those that can",
    )


def slots_of(strategy: LabStrategy, layout: Layout) -> int:
    """Slots that its machine needs at most."""
    chunks = 1 if strategy.chunk is None else -(-layout.size // strategy.chunk)
    return chunks + layout.extra + _OWN_SLOTS


def model_of(strategy: LabStrategy, layout: Layout) -> Model:
    """What its plan says, whether a kernel runs it or not."""
    if strategy.idle:
        return Model(0, 0, True, True, 0)
    rules = Rules(strategy.order, PAGE)
    full, _ = layout.views(strategy.chunk)
    punch, _ = repeated_plans(strategy, layout, rules, layout.table(full, rules))
    return Model(
        sum(op.slot >= 0 for op in punch.ops),
        sum(m.size for m in punch.missing),
        punch.atomic,
        not punch.exposure.slot_ids_changed,
        punch.dirty.dropped,
    )


def host_facts(kvm: Kvm, cpus: Cpus) -> dict[str, object]:
    """Where something was measured: kernel, KVM, CPUs, capabilities.

    `cpus_apart`: the thread that changed slots had a CPU of its own.
    """
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "kvm": flavour(),
        "cpus": os.cpu_count() or 0,
        "cpus_apart": cpus.apart,
        "capabilities": {cap.name: kvm.capability(cap) for cap in Cap},
    }


def race_document(report: RaceReport) -> dict[str, object]:
    """The document of `lab race --json`; docs/json.md has its keys."""
    o = report.options
    return {
        "schema": 1,
        "host": report.host,
        "options": msgspec.to_builtins(o),
        "ram_lost_bytes": report.ram_lost,
        "strategies": [_entry(r) for r in report.results],
    }


def _entry(r: StrategyResult) -> dict[str, object]:
    t = r.totals
    measured: dict[str, object] = {
        "updates": t.updates,
        "updates_hit": t.hit,
        **t.as_json(),
        "dirty_pages_changed": t.pages_changed,
        "dirty_pages_lost": t.pages_lost,
        "slot_ids_kept": not t.ids_changed,
        "bitmap_kept": r.bitmap_kept,
    }
    return {
        "name": r.name,
        "skipped": r.skipped,
        "fidelity": r.fidelity,
        **(measured if r.skipped is None else dict.fromkeys(measured)),
        "model": msgspec.to_builtins(r.model),
    }


def race_of(document: bytes) -> RaceReport:
    """The race that such a document tells of.  Raises msgspec.ValidationError or DecodeError.

    How often slot ids changed is not in it, only whether.
    """
    found = msgspec.json.decode(document, type=_Document)
    return RaceReport(
        found.host,
        found.options,
        tuple(entry.result() for entry in found.strategies),
        found.ram_lost_bytes,
    )


class _Us(msgspec.Struct, frozen=True):
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None

    def times(self, n: int) -> Distribution:
        if self.max is None:
            return Distribution()
        return Distribution(
            n, *(round((t or 0) * 1000) for t in (self.p50, self.p90, self.p99, self.max))
        )


class _Deaths(msgspec.Struct, frozen=True):
    internal_error: int = 0
    shutdown: int = 0


class _Competitor(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    fidelity: str
    model: Model
    skipped: str | None = None
    updates: int | None = None
    updates_hit: int | None = None
    spurious_exits: int | None = None
    deaths: _Deaths | None = None
    hole_exits: int | None = None
    guest_gap_us: _Us | None = None
    update_us: _Us | None = None
    ioctl_us: _Us | None = None
    missing_us: _Us | None = None
    vcpu_stall_us: _Us | None = None
    dirty_pages_changed: int | None = None
    dirty_pages_lost: int | None = None
    slot_ids_kept: bool | None = None
    bitmap_kept: bool | None = None

    def result(self) -> StrategyResult:
        n, deaths = self.updates or 0, self.deaths or _Deaths()
        totals = Totals(
            updates=n,
            hit=self.updates_hit or 0,
            spurious=self.spurious_exits or 0,
            hole=self.hole_exits or 0,
            internal_errors=deaths.internal_error,
            shutdowns=deaths.shutdown,
            ids_changed=self.slot_ids_kept is False,
            pages_changed=self.dirty_pages_changed or 0,
            pages_lost=self.dirty_pages_lost or 0,
            guest_gap=(self.guest_gap_us or _Us()).times(n),
            update=(self.update_us or _Us()).times(n),
            ioctl=(self.ioctl_us or _Us()).times(n),
            missing=(self.missing_us or _Us()).times(n),
            vcpu_stall=(self.vcpu_stall_us or _Us()).times(n),
        )
        return StrategyResult(
            self.name, self.fidelity, self.model, self.skipped, totals, bool(self.bitmap_kept)
        )


class _Document(msgspec.Struct, frozen=True, kw_only=True):
    host: dict[str, object]
    options: RaceOptions
    ram_lost_bytes: int
    strategies: list[_Competitor]
