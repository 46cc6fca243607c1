"""Stalls at moments that nobody foresees, seen by `watch` with its default probes: are they told
within their bracket, and does what the host's scheduler does bear its name?

    python -m tools.soak_stalls foreign [--count 100] [--qemu 7.2] [--json FILE]
    python -m tools.soak_stalls steal [--seconds 20] [--qemu 7.2]

`foreign`: another client keeps the main loop busy for 3 ms to 2 s (it computes, clears memory with
threads, or reads a slow drive in a nested event loop).  The truth is the client's round trip, a
little longer than the stall.  Run it as root and as another user (setpriv --reuid).

`steal`: a pulse guest that toggles PAM shares one CPU with a process that never rests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from qmp_memlistener.guests import (
    HOST_BRIDGE,
    I440FX,
    PAM_RAM,
    GuestSpec,
    LaunchedGuest,
    QemuBuild,
    find_qemus,
    launch,
)
from tools.bench.live import Host, pulse_guest

MS = 1_000_000
WAYS = ("compute", "memory", "drive")
RAM_MIB = 512
LATENCIES_MS = (3, 5, 8, 13, 25, 60, 150, 400, 1000, 2000)
WIDE_NS = 5 * MS


class Client:
    """A QMP client of its own that waits for each answer in its thread."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._file = self._socket.makefile("rwb")
        self._file.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> tuple[int, int]:
        """When it was sent and when it was answered.  Raises RuntimeError for a refusal."""
        text = json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
        start = time.monotonic_ns()
        self._file.write(text)
        self._file.flush()
        while True:
            line = self._file.readline()
            end = time.monotonic_ns()
            answer = json.loads(line)
            if "error" in answer:
                raise RuntimeError(answer["error"]["desc"])
            if "return" in answer:
                return start, end


@asynccontextmanager
async def watched(guest: LaunchedGuest, *options: str) -> AsyncIterator[list[dict[str, Any]]]:
    """`watch` as a process of its own; its records are in the list when the block is left."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryFile() as out:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "qmp_memlistener", "watch", f"unix:{guest.monitors[0]}"),
            *("--json", *options),
            stdout=out,
            stderr=subprocess.DEVNULL,
        )
        try:
            await asyncio.sleep(4.0)  # uprobes take seconds
            yield found
        finally:
            process.send_signal(2)
            await asyncio.wait_for(process.wait(), 30)
        out.seek(0)
        found += [json.loads(line) for line in out]


def hold(client: Client, way: str, wanted_ns: int, pace: dict[str, int]) -> tuple[int, int]:
    """Keep the main loop busy for about so long."""
    if way == "drive":
        latency = min(LATENCIES_MS, key=lambda ms: abs(ms * MS - wanted_ns))
        line = f'qemu-io slow{latency} "read 0 4k"'
        return client.execute("human-monitor-command", **{"command-line": line})
    mib = max(1, wanted_ns // pace[way])
    if way == "compute":
        mib = min(mib, RAM_MIB)
        start, end = client.execute("pmemsave", val=0, size=mib << 20, filename="/dev/null")
    else:
        mib = min(mib, 1024)
        backend = {"qom-type": "memory-backend-ram", "id": "m", "size": mib << 20}
        threads = {"prealloc": True, "prealloc-threads": 2}
        start, end = client.execute("object-add", **backend, **threads)
        time.sleep(0.05)
        client.execute("object-del", id="m")
    pace[way] = min(pace[way], max(MS // 50, (end - start) // mib))
    return start, end


async def foreign(build: QemuBuild, count: int, out: str | None) -> None:
    """Stalls of another client's making."""
    drives = []
    for ms in LATENCIES_MS:
        node = f"driver=null-co,node-name=slow{ms},size=1048576,read-zeroes=on"
        drives += ["-blockdev", f"{node},latency-ns={ms * MS}"]
    spec = GuestSpec(
        machine="pc", accel="tcg", memory=RAM_MIB << 20, monitors=3, args=("-S", *drives)
    )
    spans: list[tuple[str, int, int]] = []
    pace = {"compute": MS // 2, "memory": MS}
    async with launch(spec.on(build)) as guest, watched(guest) as records:
        client = Client(str(guest.monitors[2]))
        for way in ("compute", "memory"):
            hold(client, way, 20 * MS, pace)
        for _ in range(count):
            await asyncio.sleep(random.uniform(0.05, 0.4))
            way = random.choice(WAYS)
            wanted = int(3.5 * MS * (2000 / 3.5) ** random.random())
            start, end = hold(client, way, wanted, pace)
            if end - start >= 3 * MS:
                spans.append((way, start, end))
        await asyncio.sleep(0.5)
    judge(f"QEMU {build.version}, uid {os.geteuid()}", spans, records, out)


def judge(
    title: str,
    spans: list[tuple[str, int, int]],
    records: list[dict[str, Any]],
    out: str | None,
) -> None:
    """The figures, and the stalls that are not as wanted."""
    loops = [r for r in records if r["type"] == "stall" and r["kind"] == "main_loop"]
    probes: Counter[str] = Counter()
    tally: Counter[str] = Counter()
    cases = []
    for way, start, end in spans:
        truth = end - start
        found = [s for s in loops if s["start_ns"] < end and s["end_ns"] > start]
        case: dict[str, Any] = {"way": way, "truth_ns": truth, "seen": bool(found)}
        if found:
            stall = max(found, key=lambda s: s["at_most_ns"])
            low, high = stall["at_least_ns"], stall["at_most_ns"]
            # the client's round trip is longer than the stall by its way there and back
            near = low <= truth and truth - high <= MS
            narrow = high - low <= max(WIDE_NS, truth // 10)
            tally["seen"] += 1
            tally["inside"] += low <= truth <= high
            tally["inside, the way there and back up to 1 ms"] += near
            tally["bracket <= 5 ms or 10 %"] += narrow
            probes[stall["probe"]] += 1
            case |= {"low_ns": low, "high_ns": high, "probe": stall["probe"], "narrow": narrow}
            if not (near and narrow):
                print(f"  {way}: {truth / MS:.2f} ms, [{low / MS:.2f}, {high / MS:.2f}]")
        else:
            print(f"  {way}: {truth / MS:.2f} ms, not seen")
        cases.append(case)
    lengths = [(end - start) / MS for _, start, end in spans]
    print(f"{title}: {len(spans)} stalls of {min(lengths):.1f} to {max(lengths):.0f} ms")
    for what, number in tally.items():
        print(f"  {what}: {number} ({number * 100 / len(spans):.1f} %)")
    print(f"  seen best by {dict(probes)}; load {os.getloadavg()[0]:.1f}")
    for record in records:
        if record["type"] == "measurement" and record["probe"] == "threads":
            took = record["end_ns"] - record["start_ns"]
            share = record["values"]["own_cpu_ns"] * 100 / took
            print(f"  the sampler took {share:.2f} % of a CPU, {record['values']['looks']} looks")
    if out is not None:
        Path(out).write_text(json.dumps(cases))


async def steal(build: QemuBuild, seconds: float) -> None:
    """A hog on the guest's CPU, then none."""
    cpus = sorted(os.sched_getaffinity(0))
    async with pulse_guest(Host(build, "kvm")) as (guest, pulse):
        for tid in os.listdir(f"/proc/{guest.pid}/task"):
            os.sched_setaffinity(int(tid), {cpus[-1]})
        async with watched(guest) as records:
            hog = await asyncio.create_subprocess_exec(sys.executable, "-c", "while True: pass")
            try:
                os.sched_setaffinity(hog.pid, {cpus[-1]})
                start = time.monotonic_ns()
                await asyncio.sleep(seconds / 2)
                toggle = await pulse.toggle(
                        HOST_BRIDGE, I440FX.pam, (PAM_RAM << 4, 0), 100, period=60_000_000,
                        unit="ticks",
                    )  # fmt: skip
                await asyncio.sleep(seconds / 2)
                end = time.monotonic_ns()
                await toggle.wait()
            finally:
                hog.kill()
                await hog.wait()
    gaps = [
        r
        for r in records
        if r["type"] == "stall" and r["kind"] == "vcpu_gap" and start <= r["start_ns"] < end
    ]
    seen = [g for g in gaps if g["probe"] == "pulse" or "pulse" in g["witnesses"]]
    causes = Counter(g["cause"]["type"] for g in seen)
    long = Counter(g["cause"]["type"] for g in seen if g["at_least_ns"] >= MS)
    transitions = sum(r["type"] == "transition" for r in records)
    named = [g for g in gaps if g["cause"]["type"] == "scheduler"]
    own = causes["transition"]
    alone = [g for g in seen if not g["during"]]
    theirs = sum(g["cause"]["type"] == "scheduler" for g in alone)
    print(f"QEMU {build.version}, uid {os.geteuid()}, load {os.getloadavg()[0]:.1f}:")
    print(f"  {len(seen)} gaps that the guest saw beside a hog: {dict(causes)}")
    print(f"  of them 1 ms or longer: {dict(long)}")
    print(f"  {len(alone)} share no time with a transition, {theirs} of them are the scheduler's: "
          f"{theirs * 100 / max(1, len(alone)):.1f} %")  # fmt: skip
    print(f"  {transitions} transitions; {own} gaps are theirs")
    print(f"  gaps with the scheduler as cause that share time with a transition: "
          f"{sum(bool(g['during']) for g in named)}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("foreign", "steal"))
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--qemu", help="the version, or its beginning")
    parser.add_argument("--json", help="write each stall of `foreign` to this file")
    options = parser.parse_args()
    builds = [b for b in find_qemus() if b.version.startswith(options.qemu or "")]
    if not builds:
        raise SystemExit("there is no such QEMU here")
    if options.what == "foreign":
        asyncio.run(foreign(builds[0], options.count, options.json))
    else:
        asyncio.run(steal(builds[0], options.seconds))


if __name__ == "__main__":
    main()
