"""What a hole that comes and goes costs a guest on real KVM, under each strategy.

    python -m tools.bench.bench_lab

Strategies take turns on machines of their own, update by update, with a control that changes
nothing and a kick that stops the vCPUs for nothing; ratios are of one run's medians.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping
from contextlib import ExitStack

from qmp_memlistener.errors import MissingPrerequisite
from qmp_memlistener.kvmlab.competitor import Competitor
from qmp_memlistener.kvmlab.layout import Layout
from qmp_memlistener.kvmlab.programs import GuestKind
from qmp_memlistener.kvmlab.strategies import CONTROL, select, why_not
from qmp_memlistener.kvmlab.system import Cpus
from qmp_memlistener.kvmlab.vm import Kvm, flavour
from tools.bench.growth import Figure, Sample, print_table, ratios

NAMES = (
    *("naive", "qemu-7.2", "pause", "pause+sync", "inhibit", "batch"),
    *("hole", "hole-munmap", "hole-userfault", "presplit-2m"),
)
GAP, STALL, CALLS, UPDATE, MISSING = "gap", "stall", "calls", "update", "missing"
COLUMNS = (GAP, UPDATE, CALLS, MISSING, STALL)
KICK = "a kick alone"

Medians = dict[tuple[str, str], float]
"""By strategy and column, us."""


def run(quick: bool) -> list[Figure]:
    """A table of medians, and the ratios that matter."""
    try:
        kvm = Kvm()
    except MissingPrerequisite as exc:
        print(f"\nleft out: {exc.message}")
        return []
    runs, rounds = (3, 20) if quick else (7, 100)
    with ExitStack() as stack:
        stack.enter_context(kvm)
        cpus = Cpus.for_vcpus(1)
        layout = Layout()
        with cpus.on(cpus.vcpus):
            contenders = [
                stack.enter_context(Competitor(kvm, s, layout, GuestKind.DATA, populate=True))
                for s in select(NAMES)
                if why_not(s, kvm) is None
            ]
        stack.enter_context(cpus.on(cpus.own))
        found = [_run(contenders, rounds, random.Random(i)) for i in range(runs)]
    names = [c.strategy.name for c in contenders]
    samples = {key: Sample(tuple(m[key] for m in found)) for key in found[0]}
    print(
        f"\n{flavour()} KVM, a hole of 4 KiB in 64 MiB, 1 vCPU: us, medians of {2 * rounds} "
        f"updates, median and spread of {runs} runs"
    )
    print_table(
        ["strategy", *(text for c in COLUMNS for text in (c, "spread"))],
        [
            [
                name,
                *(
                    text
                    for column in COLUMNS
                    for text in (
                        f"{samples[name, column].median:.0f}",
                        samples[name, column].spread(digits=0),
                    )
                ),
            ]
            for name in names
        ],
    )
    print(f"{KICK}: {samples[KICK, STALL].median:.0f} ({samples[KICK, STALL].spread(digits=0)})")
    return _figures(samples)


def _run(contenders: list[Competitor], rounds: int, dice: random.Random) -> Medians:
    first = {c.strategy.name: len(c.updates) for c in contenders}
    kicked: list[int] = []
    for _ in range(rounds):
        for contender in dice.sample(contenders, len(contenders)):
            contender.round()
            if contender.strategy.name == "pause":
                kicked.append(_kick(contender))
    medians: Medians = {(KICK, STALL): statistics.median(kicked) / 1000}
    for contender in contenders:
        name = contender.strategy.name
        updates = contender.updates[first[name] :]
        for column, values in (
            (GAP, [u.gap_ns for u in updates]),
            (STALL, [u.stall_ns for u in updates]),
            (CALLS, [u.calls_ns for u in updates]),
            (UPDATE, [u.took_ns for u in updates]),
            (MISSING, [u.missing_ns for u in updates]),
        ):
            medians[name, column] = statistics.median(values) / 1000
    return medians


def _kick(contender: Competitor) -> int:
    """How long a vCPU is out of the guest when it is stopped for nothing."""
    machine = contender.machine
    machine.release()
    machine.wait_beats(8)
    machine.hold(through_bql=True)
    machine.release()
    stall_ns = machine.stall_ns
    machine.hold()
    return stall_ns


def _figures(samples: Mapping[tuple[str, str], Sample]) -> list[Figure]:
    out = []
    if ("hole", GAP) in samples:
        hole = ratios(samples["hole", GAP], samples[CONTROL, GAP])
        apart = ratios(samples["pause", GAP], samples["hole", GAP])
        out += [
            Figure("guest gap under hole, to the control", "<= 1.2", _text(hole)),
            Figure("guest gap under pause, to hole", ">= 5", _text(apart)),
        ]
    needed = Sample(
        tuple(
            calls + kick
            for calls, kick in zip(
                samples["pause", CALLS].values, samples[KICK, STALL].values, strict=True
            )
        )
    )
    stall = ratios(samples["pause", STALL], needed)
    out.append(Figure("pause: stall, to its ioctls and a kick", "<= 1.5", _text(stall)))
    return out


def _text(ratio: Sample) -> str:
    return f"{ratio.median:.2f} ({ratio.spread(digits=2)})"


if __name__ == "__main__":
    for figure in run(quick=False):
        print(f"{figure.what}: {figure.seen}, wanted {figure.wanted}")
