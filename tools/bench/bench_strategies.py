"""What 256 MiB more memory cost a guest under each strategy, and what pipelining is worth.

    python -m tools.bench.bench_strategies

A Linux guest under TCG grows by a DIMM (`direct`; `pause` in one write and step by step) and by
virtio-mem (`hole`), in random order within each round, and shrinks again in between, which is not
measured.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict

from qmp_memlistener import Agent, Strategy, attach
from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.guests.linux import LinuxImage, LinuxSpec, boot_linux
from qmp_memlistener.updates.settings import UpdateOptions
from tools.bench.growth import Figure, Sample, print_table, ratios
from tools.bench.live import hosts

PIPELINED = "pause, one write"
STEPWISE = "pause, step by step"
MODES: dict[str, tuple[Strategy, UpdateOptions]] = {
    "direct": (Strategy.DIRECT, UpdateOptions()),
    PIPELINED: (Strategy.PAUSE, UpdateOptions()),
    STEPWISE: (Strategy.PAUSE, UpdateOptions(pipelined=False)),
    "hole": (Strategy.HOLE, UpdateOptions(wait_s=30.0)),
}
KINDS = ("vcpu_pause", "main_loop", "commit")


def run(quick: bool) -> list[Figure]:
    """Print a table a QEMU; the ratio of the pauses is the figure."""
    found = []
    image = LinuxImage.build()
    seen: set[str] = set()
    for host in hosts(quick, ends=True):
        if host.build.version not in seen:
            seen.add(host.build.version)
            ratio = asyncio.run(_measure(host.build, image, 5 if quick else 20))
            text = f"{ratio.median:.2f} ({ratio.spread(digits=2)}; {host.build.version})"
            what = "vcpu_pause for +256 MiB, stop, update and cont in one write to step by step"
            found.append(Figure(what, "<= 0.7", text))
    return found


async def _measure(build: QemuBuild, image: LinuxImage, rounds: int) -> Sample:
    lost: dict[tuple[str, str], list[float]] = defaultdict(list)
    spec = LinuxSpec(machine="pc", virtio_mem=1 << 30)
    async with (
        boot_linux(image, spec, build) as linux,
        attach(f"unix:{linux.guest.monitors[0]}", guarded=True) as agent,
    ):
        await agent.measuring.wait_started()
        chance = random.Random(1)
        for number in range(rounds + 1):
            modes = list(MODES.items())
            chance.shuffle(modes)
            for mode, (strategy, options) in modes:
                values = await _grow(agent, strategy, options)
                if number:  # the first one of each is slower
                    for kind, value in values.items():
                        lost[mode, kind].append(value)
    samples = {key: Sample(tuple(values)) for key, values in lost.items()}
    print(f"\nQEMU {build.version}, tcg: +256 MiB, ms a round, {rounds} rounds")
    print_table(
        ["", *(f"{kind} {what}" for kind in KINDS for what in ("median", "spread"))],
        [
            [
                mode,
                *(
                    text
                    for kind in KINDS
                    for text in (
                        f"{samples[mode, kind].median:.2f}",
                        samples[mode, kind].spread(digits=2),
                    )
                ),
            ]
            for mode in MODES
        ],
    )
    return ratios(samples[PIPELINED, "vcpu_pause"], samples[STEPWISE, "vcpu_pause"])


async def _grow(agent: Agent, strategy: Strategy, options: UpdateOptions) -> dict[str, float]:
    """By kind: ms lost in all while growing."""
    outcome = await agent.resize("+256M", strategy=strategy, options=options)
    back = strategy if strategy is Strategy.HOLE else Strategy.DIRECT
    undone = await agent.resize("-256M", strategy=back, options=UpdateOptions(wait_s=30.0))
    for each in (outcome, undone):
        if each.outcome != "done":
            raise RuntimeError(f"{strategy}: {each.outcome}: {each.reason}")
    return {
        kind: sum(s.at_most_ns for s in outcome.stalls if s.kind == kind) / 1e6 for kind in KINDS
    }


if __name__ == "__main__":
    for figure in run(quick=False):
        print(f"{figure.what}: {figure.seen}, wanted {figure.wanted}")
