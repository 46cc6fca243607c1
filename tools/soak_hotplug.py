"""Plugs and unplugs devices and memory many times in a busy Linux guest, and looks for what stays.

    python tools/soak_hotplug.py [--times N] [--machine pc|q35] [--qemu VERSION] [--device NAME]

For every QEMU found, machine, device and strategy: N times plug and unplug (or grow and shrink),
each time the guest's own view of its devices and memory is looked at; at the end QEMU's FlatViews
(from its trace log, which the agent therefore leaves alone), file descriptors and memory are
compared with what they were.  Prints a line for each; exit code 1 when anything was lost, left
behind or different.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qmp_memlistener import Agent, attach  # noqa: E402 - the path comes first
from qmp_memlistener.errors import MemListenerError  # noqa: E402
from qmp_memlistener.guests import QemuBuild, find_qemus  # noqa: E402
from qmp_memlistener.guests.linux import LinuxImage, LinuxSpec  # noqa: E402
from qmp_memlistener.updates.model import Intent, Plug, Role, Unplug  # noqa: E402
from qmp_memlistener.updates.options import parse_addition, parse_resize  # noqa: E402
from qmp_memlistener.updates.settings import UpdateOptions  # noqa: E402
from tests.support.linux_guest import LinuxGuest, boot_linux  # noqa: E402

MIB = 1 << 20
PATIENT = UpdateOptions(wait_s=30.0)
WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """A device with what it stands on, or a size; and the strategies that apply."""

    device: str | None
    strategies: tuple[str, ...]
    backend: tuple[Role, str] | None = None
    can_leave: bool = True


CASES = {
    "pc-dimm": Case(
        "pc-dimm,id=d0,memdev=b0",
        ("direct", "pause"),
        (Role.OBJECT, "memory-backend-ram,id=b0,size=256M"),
    ),
    "nvdimm": Case(
        "nvdimm,id=d0,memdev=b0",
        ("direct", "pause"),
        (Role.OBJECT, "memory-backend-ram,id=b0,size=256M"),
        can_leave=False,
    ),
    "virtio-net-pci": Case(
        "virtio-net-pci,id=d0,netdev=b0",
        ("direct", "pause", "hole"),
        (Role.NETDEV, "hubport,id=b0,hubid=7"),
    ),
    "virtio-blk-pci": Case(
        "virtio-blk-pci,id=d0,drive=b0",
        ("direct", "pause", "hole"),
        (Role.BLOCKDEV, "null-co,node-name=b0,size=1M,read-zeroes=on"),
    ),
    "ivshmem-plain": Case(
        "ivshmem-plain,id=d0,memdev=b0",
        ("direct", "pause", "hole"),
        (Role.OBJECT, "memory-backend-ram,id=b0,size=16M,share=on"),
    ),
    "virtio-mem": Case(None, ("hole",)),
}


@dataclass(frozen=True)
class Leftovers:
    """What QEMU holds on to."""

    fds: int
    rss: int
    flatviews: int


async def _view(linux: LinuxGuest) -> tuple[int, int, int, int]:
    """What the guest sees: PCI functions, bytes of memory, disks, network devices."""
    return (
        len(await linux.pci_devices()),
        (await linux.memory_blocks()).online_bytes,
        len(await linux.block_devices()),
        len(await linux.net_devices()),
    )


def _flatviews(log: Path) -> int:
    """How many there are: those that were made, less those that were destroyed."""
    text = log.read_text(errors="replace")
    return text.count("flatview_new ") - text.count("flatview_destroy ")


async def _leftovers(pid: int, log: Path) -> Leftovers:
    """Once RCU has had time for what is to be destroyed."""
    views = _flatviews(log)
    for _ in range(20):
        await asyncio.sleep(0.1)
        last, views = views, _flatviews(log)
        if last == views:
            break
    return Leftovers(len(os.listdir(f"/proc/{pid}/fd")), _rss(pid), views)


def _rss(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    (kib,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    return kib << 10


async def _soak(
    build: QemuBuild, machine: str, name: str, strategy: str, times: int, image: LinuxImage
) -> bool:
    case = CASES[name]
    with TemporaryDirectory(prefix="soak-hotplug-") as directory:
        log = Path(directory) / "trace"
        spec = LinuxSpec(
            machine=machine,
            virtio_mem=1 << 30 if case.device is None else 0,
            args=("-trace", "flatview_new", "-trace", "flatview_destroy", "-D", str(log)),
        )
        async with boot_linux(image, spec, build) as linux:
            await linux.set_workload(True)
            began = time.monotonic()
            async with attach(
                f"unix:{linux.guest.monitors[0]}",
                trace=False,
                probes=("runstate",),
                guarded=strategy == "pause",
            ) as agent:
                run = _Run(linux, agent, case, strategy, log)
                await run.repeat(times if case.can_leave else 1)
                await run.check_running()
    took = time.monotonic() - began
    pauses = run.pauses_ms
    pause = f", pause p50 {statistics.median(pauses):.1f} ms" if pauses else ""
    print(
        f"{build.version} {machine:<4} {name:<15} {strategy:<7} "
        f"{'FAILED' if run.problems else 'ok'} ({run.done} times, {took:.0f} s{pause})",
        flush=True,
    )
    for problem in run.problems:
        print(f"    {problem}", flush=True)
    return not run.problems


class _Run:
    """One guest, plugged and unplugged; `problems` is what went wrong."""

    def __init__(
        self, linux: LinuxGuest, agent: Agent, case: Case, strategy: str, log: Path
    ) -> None:
        self.problems: list[str] = []
        self.pauses_ms: list[float] = []
        self.done = 0
        self._linux = linux
        self._agent = agent
        self._case = case
        self._strategy = strategy
        self._log = log

    async def repeat(self, times: int) -> None:
        """The first `WARM_UP` times are more, and do not count for what is left behind."""
        pid = self._linux.guest.process.pid
        before = await _view(self._linux)
        held = None
        for i in range(times + WARM_UP if self._case.can_leave else times):
            if i == WARM_UP:
                await self._agent.settle()
                held = await _leftovers(pid, self._log)
            if not await self._once(i, before):
                return
            self.done = i + 1 - (WARM_UP if self._case.can_leave else 0)
        if held is not None:
            await self._agent.settle()
            self._compare(held, await _leftovers(pid, self._log))

    async def _once(self, number: int, before: tuple[int, int, int, int]) -> bool:
        outcome = await self._agent.update(self._intent(), self._strategy, PATIENT)
        self.pauses_ms += [s.at_most_ns / 1e6 for s in outcome.stalls if s.kind == "vcpu_pause"]
        if outcome.outcome != "done":
            self.problems.append(f"#{number} {outcome.outcome}: {outcome.reason}")
            return False
        inside = await _view(self._linux)
        if inside == before:
            self.problems.append(f"#{number} the guest does not see it: {inside}")
        if not self._case.can_leave:
            return True
        back = self._strategy if self._case.device is None else self._leaving()
        outcome = await self._agent.update(self._inverse(), back, PATIENT)
        if outcome.outcome != "done":
            self.problems.append(f"#{number} back: {outcome.outcome}: {outcome.reason}")
            return False
        after = await _view(self._linux)
        if after != before:
            self.problems.append(f"#{number} the guest sees {after}, not {before}")
        return True

    def _leaving(self) -> str:
        """A hole strategy is about where things go, not about taking them out."""
        return "direct" if self._strategy == "hole" else self._strategy

    def _intent(self) -> Intent:
        if self._case.device is None or self._case.backend is None:
            return parse_resize("+256M")
        backend = parse_addition(*self._case.backend)
        return Plug(parse_addition(Role.DEVICE, self._case.device), (backend,))

    def _inverse(self) -> Intent:
        if self._case.backend is None:
            return parse_resize("-256M")
        return Unplug("d0", (parse_addition(*self._case.backend),))

    def _compare(self, held: Leftovers, now: Leftovers) -> None:
        if now.flatviews > held.flatviews:
            self.problems.append(f"FlatViews: {held.flatviews} before, {now.flatviews} after")
        if now.fds > held.fds:
            self.problems.append(f"file descriptors: {held.fds} before, {now.fds} after")
        if now.rss > held.rss * 1.02:
            was, is_now = held.rss / MIB, now.rss / MIB
            self.problems.append(f"memory: {was:.1f} MiB before, {is_now:.1f} after")

    async def check_running(self) -> None:
        status = await self._agent.monitor.execute("query-status")
        if not isinstance(status, dict) or status.get("status") != "running":
            self.problems.append(f"the guest is left {status}")


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--machine", choices=("pc", "q35"))
    parser.add_argument("--qemu", help="only this version, such as 10.0")
    parser.add_argument("--device", choices=list(CASES))
    options = parser.parse_args()
    image = LinuxImage.build()
    good = True
    for build in find_qemus():
        if options.qemu is not None and not build.version.startswith(options.qemu):
            continue
        for machine in (options.machine,) if options.machine else ("pc", "q35"):
            for name in (options.device,) if options.device else CASES:
                for strategy in CASES[name].strategies:
                    try:
                        good &= await _soak(build, machine, name, strategy, options.times, image)
                    except MemListenerError as exc:
                        print(f"{build.version} {machine} {name} {strategy} LOST: {exc.message}")
                        good = False
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
