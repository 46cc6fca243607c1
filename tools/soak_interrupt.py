"""Interrupts updates at random moments, and compares what is left in the guest with what was said.

    python tools/soak_interrupt.py [--times N] [--machine pc|q35] [--verb NAME] [--seed N]

For each verb that changes a guest (hotplug, unplug, resize, compare) it is started N times, under
`direct`, `pause` or `hole`, with trace events or without, and gets SIGINT, SIGTERM or SIGHUP at a
random moment of the time that it takes, more often than not just after its first change.  Every
change found in the guest then must have been named, in the document (`--json`) or in words; the
guest must run.  A process that the signal ended without a word must have changed nothing.  Exit
code 1 when anything was left and not told.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qmp_memlistener.guests import GuestSpec, LaunchedGuest, QemuBuild, find_qemus, launch  # noqa: E402
from qmp_memlistener.qmp import Monitor, UnixTarget, hmp  # noqa: E402
from tests.support.any_monitor import AnyMonitor  # noqa: E402

__all__ = ["VERBS", "Bench", "Found", "bench", "one_round"]

MIB = 1 << 20
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 130
PATIENCE_S = 60.0
BARE = ("--no-trace", "--probes", "none")
TRACED = ("--probes", "runstate,trace")
ARGS = (
    *("-m", "64,slots=200,maxmem=64G", "-device", "qemu-xhci,id=xhci"),
    *("-object", "memory-backend-ram,id=vm0-ram,size=1G"),
)
VIRTIO_MEM = "virtio-mem-pci,id=vm0,memdev=vm0-ram,requested-size=0"
PORT = ("-device", "pcie-root-port,id=rp0,chassis=1")
USB = (
    *("--object", "memory-backend-ram,id=m0,size=1M", "--netdev", "hubport,id=n0,hubid=1"),
    *("--device", "usb-net,id=u0,netdev=n0"),
)
NETDEV: dict[str, object] = {"type": "hubport", "id": "n0", "hubid": 1}
MEMORY: dict[str, object] = {"qom-type": "memory-backend-ram", "id": "m0", "size": MIB}
DEVICE: dict[str, object] = {"driver": "usb-net", "id": "u0", "netdev": "n0"}
REMOVING = (("u0", "device_del"), ("n0", "netdev_del"), ("m0", "object-del"))


@dataclass(frozen=True)
class State:
    """What an update can leave in a guest: things by name, and what virtio-mem was asked for."""

    things: frozenset[str]
    requested: int
    status: str


@dataclass(frozen=True)
class Found:
    """How one round ended: `how` in a word, `wrong` what is not as it was told."""

    how: str
    wrong: list[str] = field(default_factory=list)


@dataclass
class Bench:
    """A guest in its firmware, and a monitor of our own; `took` is how long verbs take, s."""

    guest: LaunchedGuest
    monitor: Monitor
    chance: random.Random
    took: dict[tuple[str, ...], float] = field(default_factory=dict)
    dimms: int = 0

    async def state(self) -> State:
        things = set()
        for path in ("/objects", "/machine/peripheral"):
            found = await self.monitor.execute("qom-list", {"path": path})
            assert isinstance(found, list)
            things |= {c["name"] for c in found if c["type"].startswith("child<")}
        if "n0" in await hmp(self.monitor, "info network"):
            things.add("n0")
        size = {"path": "/machine/peripheral/vm0", "property": "requested-size"}
        requested = await self.monitor.execute("qom-get", size)
        status = await self.monitor.execute("query-status")
        assert isinstance(requested, int)
        assert isinstance(status, dict)
        return State(frozenset(things), requested, str(status["status"]))

    async def ready(self, verb: str) -> None:
        """As the verb expects the guest."""
        there = (await self.state()).things
        for name, command in REMOVING:
            if name in there and verb != "unplug":
                await self.monitor.execute(command, {"id": name})
        if verb != "unplug":
            return
        for name, command, arguments in (
            ("m0", "object-add", MEMORY),
            ("n0", "netdev_add", NETDEV),
            ("u0", "device_add", DEVICE),
        ):
            if name not in there:
                await self.monitor.execute(command, arguments)

    def arguments(self, verb: str) -> tuple[str, ...]:
        """Of a run of this verb."""
        how = self.chance.choice((BARE, BARE, TRACED))
        strategy = self.chance.choice(("direct", "pause"))
        target = f"unix:{self.guest.monitors[0]}"
        wait = ("--wait", "300ms")
        match verb:
            case "hotplug" if self.chance.random() < 0.3:
                self.dimms += 1
                name = f"d{self.dimms}"
                memory = f"memory-backend-ram,id={name}m,size=128M"
                dimm = ("--object", memory, "--device", f"pc-dimm,id={name},memdev={name}m")
                return (verb, target, *dimm, "--strategy", strategy, *wait, *how)
            case "hotplug":
                return (verb, target, *USB, "--strategy", strategy, *wait, *how)
            case "unplug":
                return (verb, target, "u0", "--backends", "--strategy", strategy, *wait, *how)
            case "resize":
                size, strategy = self.chance.choice((("+128M", strategy), ("+128M", "hole")))
                return (verb, target, size, "--strategy", strategy, *wait, *how)
        rounds = ("--strategies", "direct,pause", "--repeat", "1", "--window", "50ms")
        return (verb, target, *USB, *rounds, *wait, *how)


VERBS = ("hotplug", "unplug", "resize", "compare")


@asynccontextmanager
async def bench(build: QemuBuild, machine: str, seed: int) -> AsyncIterator[Bench]:
    port = PORT if machine == "q35" else ()
    args = (*ARGS, *port, "-device", VIRTIO_MEM)
    spec = GuestSpec(machine=machine, accel="tcg", shared_memory=False, monitors=4, args=args)
    async with (
        launch(spec.on(build)) as guest,
        await AnyMonitor.connect(UnixTarget(str(guest.monitors[3]))) as monitor,
    ):
        yield Bench(guest, monitor, random.Random(seed))


async def one_round(bench: Bench, verb: str, *, interrupt: bool = True) -> Found:
    """Run the verb once, and interrupt it at a random moment."""
    chance = bench.chance
    await bench.ready(verb)
    before = await bench.state()
    arguments = bench.arguments(verb)
    as_json = chance.random() < 0.7
    argv = [sys.executable, "-m", "qmp_memlistener", *arguments, *(("--json",) if as_json else ())]
    # of the slowest run that was seen; the interpreter starts in the first quarter of it
    known = bench.took.get((verb,), 1.0)
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT
    )
    number = chance.choice(SIGNALS)
    talking = asyncio.ensure_future(process.communicate())
    if interrupt:
        if chance.random() < 0.6:
            await _changed(bench, before, talking)
            await asyncio.wait((talking,), timeout=chance.uniform(0.0, 0.1))
        else:
            await asyncio.wait((talking,), timeout=known * chance.uniform(0.2, 1.05))
        if process.returncode is None:
            process.send_signal(number)
    async with asyncio.timeout(PATIENCE_S):
        out, err = await talking
    if not interrupt or process.returncode == 0:
        took = time.monotonic() - began
        bench.took[(verb,)] = max(took, bench.took.get((verb,), 0.0))
    after = await _settled(bench)
    wrong = _untold(before, after, out.decode(), as_json)
    code = process.returncode
    assert code is not None
    if after.status != "running":
        wrong.append(f"the guest is {after.status}")
    if code not in (0, 1, INTERRUPTED, -number) or (code == -number and out):
        wrong.append(f"exit code {code}")
    if "Traceback" in err.decode() and "qmp_memlistener/__main__.py" in err.decode():
        wrong.append("a traceback")  # not of the interpreter's own start, on a busy host
    if as_json and verb != "compare" and code in (0, 1) and not out:
        wrong.append("no document")
    changed = "changed" if _changes(before, after) else "as before"
    said = f"{out.decode()!r} {err.decode()[-500:]!r}"
    shown = [f"{w}: {' '.join(arguments)} {number.name} {code} {said}" for w in wrong]
    return Found(f"{code}, {changed}", shown)


async def _changed(bench: Bench, before: State, ended: asyncio.Future[tuple[bytes, bytes]]) -> None:
    """Until something is not as before, or the verb ends."""
    while not ended.done() and not _changes(before, await bench.state()):  # noqa: ASYNC110 - QEMU tells of no backend
        await asyncio.sleep(0.005)


async def _settled(bench: Bench) -> State:
    """As the guest is when a guard has done what is left to do."""
    for _ in range(50):
        state = await bench.state()
        if state.status == "running":
            break
        await asyncio.sleep(0.1)
    return state


def _changes(before: State, after: State) -> set[str]:
    """By the names of what came, went or has another size."""
    names = set(before.things ^ after.things)
    return names | ({"vm0"} if before.requested != after.requested else set())


def _untold(before: State, after: State, out: str, as_json: bool) -> list[str]:
    changes = _changes(before, after)
    if not changes:
        return []
    if not out:
        return [f"{', '.join(sorted(changes))} changed, and nothing was said"]
    said = out
    if as_json:
        document = json.loads(out)
        if document.get("outcome") in ("failed", "refused"):
            return [f"{document['outcome']}, and {', '.join(sorted(changes))} changed"]
        if document.get("outcome") == "done" and not document.get("interrupted"):
            return []
        if document.get("outcome") == "done" and "u0" in before.things:
            # (m0 belongs to no device: `--backends` leaves it)
            return [f"done, and {name} is there" for name in ("u0", "n0") if name in after.things]
        told = (document.get(k) for k in ("reason", "remedy", "notes", "placed"))
        said = json.dumps([*told, document.get("ended_early")])
    elif out.startswith(("failed", "refused")):
        return [f"{out.split(':')[0]}, and {', '.join(sorted(changes))} changed"]
    elif out.startswith("done"):
        return []
    # what stands on a device that is named goes with it
    main = {n for n in changes if n in ("u0", "vm0") or n.startswith(("qml-dimm", "d"))}
    main = {n for n in main if not n.endswith("m")} or changes
    return [f"{name} changed, and is not named" for name in sorted(main) if name not in said]


async def soak(machine: str, verb: str, times: int, seed: int) -> bool:
    """True when everything that was left was told."""
    build = find_qemus()[0]
    hows: Counter[str] = Counter()
    wrong: list[str] = []
    async with bench(build, machine, seed) as b:
        await one_round(b, verb, interrupt=False)
        for _ in range(times):
            found = await one_round(b, verb)
            hows[found.how] += 1
            for text in found.wrong:
                print(f"  WRONG {text}", flush=True)
            wrong += found.wrong
    ends = ", ".join(f"{how}: {count}" for how, count in sorted(hows.items()))
    print(f"{machine} {verb}: {times} times, {len(wrong)} not as told ({ends})", flush=True)
    return not wrong


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--machine", choices=("pc", "q35"), action="append")
    parser.add_argument("--verb", choices=VERBS, action="append")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    good = True
    for verb in options.verb or VERBS:
        machines = options.machine or ("pc", "q35")
        ends = [soak(machine, verb, options.times, options.seed) for machine in machines]
        good &= all(await asyncio.gather(*ends))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
