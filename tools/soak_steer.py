"""The interposer on real guests for a long time.

    python -m tools.soak_steer cycles  [--count 200]    in and out again, on a guest under load
    python -m tools.soak_steer kills   [--count 50]     kill -9 of the injector before random steps
    python -m tools.soak_steer toggles [--count 20000]  each strategy, preloaded and injected
    python -m tools.soak_steer migrate [--count 20]     each strategy, and none

`cycles` and `kills` compare QEMU with what it was: its program's mappings and what they hold (text
and import table), threads, descriptors, scheduling; `cycles` says how long QEMU's main loop stood.
`toggles` has CPU 1's code and page tables in the slot that comes and goes.  `migrate` has a guest
that writes all its RAM while it toggles, and compares source and target page by page in the end;
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is hidden from QEMU, which would hide what is lost.  Without a
strategy QEMU 7.2 itself may lose pages: that is the control.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import random
import signal
import statistics
import struct
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from qmp_memlistener.guests import (
    HOST_BRIDGE,
    I440FX,
    PAM_RAM,
    GuestSpec,
    High,
    LaunchedGuest,
    Pulse,
    launch,
)
from qmp_memlistener.host.processes import Process
from qmp_memlistener.qmp import Monitor, UnixTarget
from qmp_memlistener.steer import Mode, release, state_of, steer
from qmp_memlistener.steer.hijack import mappings
from tests.support.any_monitor import AnyMonitor
from tests.support.steer import (
    STEERED,
    Faults,
    build_writer,
    injector_ended,
    preloaded,
    racing,
    toggled,
)

__all__ = ["Cycles", "Print", "cycles", "kills", "migrate", "print_of"]

_ENDLESS = 1 << 31
_MEMORY = 64 << 20
_MANUAL_PROTECT = 168
_STRATEGIES = (
    (Mode.PAUSE, False),
    (Mode.INHIBIT, False),
    (Mode.HOLE, False),
    (Mode.HOLE, True),
)


@dataclass(frozen=True, slots=True)
class Print:
    """What of a process must be as it was: of its program, and in number."""

    mappings: tuple[tuple[int, int, str], ...]
    content: str
    threads: int
    descriptors: tuple[str, ...]
    scheduler: int


def print_of(pid: int) -> Print:
    """Of the read-only parts alone the content: text, and the import table."""
    program = os.readlink(f"/proc/{pid}/exe")
    own = [m for m in mappings(pid) if m.path == program]
    content = hashlib.sha256()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for m in own:
            if "w" not in m.perms:
                content.update(os.pread(memory.fileno(), m.end - m.start, m.start))
    return Print(
        tuple((m.start, m.end, m.perms) for m in own),
        content.hexdigest(),
        len(os.listdir(f"/proc/{pid}/task")),
        tuple(sorted(_descriptors(pid))),
        os.sched_getscheduler(pid),
    )


def _descriptors(pid: int) -> list[str]:
    found = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            link = os.readlink(f"/proc/{pid}/fd/{number}")
        except FileNotFoundError:
            continue
        found.append("socket" if link.startswith("socket:") else link)
    return found


def _process(guest: LaunchedGuest) -> Process:
    process = Process.read(guest.pid)
    assert process is not None
    return process


async def _begin_load(pulse: Pulse) -> Callable[[], Coroutine[None, None, int]]:
    toggle = await pulse.toggle(HOST_BRIDGE, I440FX.pam, (PAM_RAM << 4, 0), _ENDLESS, period=20)
    return toggle.stop


@dataclass(frozen=True, slots=True)
class Cycles:
    """What came of it: how long QEMU stood in each, and what was not as before."""

    stopped_ns: tuple[int, ...]
    wrong: tuple[str, ...]


async def cycles(count: int) -> Cycles:
    """In and out again, in each strategy by turns.

    The first time leaves the channel and the object in QEMU, for ever: that is "before".
    """
    stopped: list[int] = []
    wrong: list[str] = []
    async with racing(High.DATA) as (guest, pulse):
        process = _process(guest)
        await steer(process, Mode.OBSERVE)
        await release(process)
        before = print_of(guest.pid)
        stop = await _begin_load(pulse)
        for n in range(count):
            mode, strict = _STRATEGIES[n % len(_STRATEGIES)]
            brought = await steer(process, mode, strict=strict)
            if brought.after is not mode:
                wrong.append(f"cycle {n}: {mode}: {brought.reason}")
            taken = await release(process)
            stopped += (brought.stopped_ns, taken.stopped_ns)
            after = print_of(guest.pid)
            if after != before:
                wrong.append(f"cycle {n}: {_difference(before, after)}")
        await stop()
        if await toggled(guest, pulse, 20) != "survived":
            wrong.append("the guest does not run")
    return Cycles(tuple(stopped), tuple(wrong))


def _difference(before: Print, after: Print) -> str:
    names = ("mappings", "content", "threads", "descriptors", "scheduler")
    return ", ".join(
        f"{name} {getattr(before, name)} -> {getattr(after, name)}"
        for name in names
        if getattr(before, name) != getattr(after, name)
    )


async def kills(count: int, seed: int = 1) -> list[str]:
    """What is wrong after the injector was killed `count` times, on its way in or out by turns."""
    rng = random.Random(seed)
    wrong: list[str] = []
    async with racing(High.DATA) as (guest, pulse):
        process = _process(guest)
        await steer(process, Mode.OBSERVE)
        await release(process)
        before = print_of(guest.pid)
    async with racing(High.DATA) as (guest, pulse):
        process = _process(guest)
        stop = await _begin_load(pulse)
        for n in range(count):
            verb = "detach" if n % 2 else "attach"
            await injector_ended(process, verb, rng.randrange(24), signal.SIGKILL)
            await pulse.wait_beats(2)
            if print_of(guest.pid).threads != before.threads:
                wrong.append(f"kill {n}: threads")
        brought = await steer(process, Mode.INHIBIT)
        if brought.after is not Mode.INHIBIT:
            wrong.append(f"it does not come in any more: {brought.reason}")
        await release(process)
        await stop()
        after = print_of(guest.pid)
        if after.scheduler != before.scheduler:
            wrong.append(f"scheduler {after.scheduler}")
        if [m[2] for m in after.mappings] != [m[2] for m in before.mappings]:
            wrong.append(f"protections {after.mappings}")
        left = [d for d in after.descriptors if d.startswith("/memfd:qmp-memlistener")]
        if len(left) != 1:  # the channel
            wrong.append(f"descriptors left: {left}")
        if await toggled(guest, pulse, 20) != "survived":
            wrong.append("the guest does not run")
    return wrong


# -- migration ------------------------------------------------------------------------------------


async def migrate(mode: Mode | None, strict: bool) -> int:
    """How many pages differ."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        faults = Faults(directory, without=_MANUAL_PROTECT)
        env = {"LD_PRELOAD": str(faults.object)}
        if mode is not None:
            env = preloaded(mode, faults.object)
            if strict:
                env["QMP_MEMLISTENER_STRICT"] = "1"
        env |= faults.env
        args = ("-bios", str(build_writer(directory, _MEMORY)), "-nodefaults")
        spec = GuestSpec(machine="pc", accel="kvm", memory=_MEMORY, smp=2, args=args, env=env)
        waiting = replace(spec, args=(*args, "-incoming", f"unix:{directory}/m", "-S"), env={})
        async with (
            launch(spec.on(STEERED[-1])) as source,
            launch(waiting.on(STEERED[-1])) as target,
        ):
            assert source.ram is not None
            assert target.ram is not None
            await _writing(source.ram)
            target_of = UnixTarget(str(source.monitors[0]))
            async with await AnyMonitor.connect(target_of) as monitor:
                await _migrated(monitor, f"unix:{directory}/m")
            if mode is not None:
                state = state_of(_process(source))
                assert state is not None
                assert (state.mode, state.gave_up) == (mode, 0), state
            return _different(source.ram, target.ram)


async def _writing(ram: Path) -> None:
    """Until it toggles and has written everything once."""
    async with asyncio.timeout(30):
        while 0 in struct.unpack("<II", _words(ram)):  # noqa: ASYNC110 (no event)
            await asyncio.sleep(0.02)


def _words(ram: Path) -> bytes:
    with ram.open("rb") as file:
        return os.pread(file.fileno(), 8, 0x9000)


async def _migrated(monitor: Monitor, uri: str) -> None:
    # not at once: its dirty pages are asked for some times
    slow = {"max-bandwidth": 150 << 20, "downtime-limit": 1}
    await monitor.execute("migrate-set-parameters", slow)
    await monitor.execute("migrate", {"uri": uri})
    await asyncio.sleep(0.8)
    await monitor.execute("migrate-set-parameters", {"downtime-limit": 20_000})
    async with asyncio.timeout(60):
        while True:
            value = await monitor.execute("query-migrate")
            assert isinstance(value, dict)
            if value.get("status") == "completed":
                return
            assert value.get("status") not in ("failed", "cancelled"), value
            await asyncio.sleep(0.02)


def _different(one: Path, other: Path) -> int:
    a, b = one.read_bytes(), other.read_bytes()
    return sum(a[at : at + 4096] != b[at : at + 4096] for at in range(0, _MEMORY, 4096))


async def _toggles(mode: Mode, strict: bool, injected: bool, count: int) -> str:
    """One line of what came of it."""
    env = None if injected else preloaded(mode)
    if env and strict:
        env["QMP_MEMLISTENER_STRICT"] = "1"
    began = time.monotonic()
    async with racing(High.CODE | High.TABLES, env=env) as (guest, pulse):
        process = _process(guest)
        if injected:
            await steer(process, mode, strict=strict)
        outcome, done = "survived", 0
        while outcome == "survived" and done < count:
            step = min(2000, count - done)
            outcome = await toggled(guest, pulse, step)
            done += step
        state = state_of(process)
        assert state is not None
        return (
            f"{mode}{' strict' if strict else ''}, "
            f"{'injected' if injected else 'preloaded'}: {outcome} {done} toggles in "
            f"{time.monotonic() - began:.0f} s; transitions {state.transactions}, "
            f"parks {state.parks}, gave up {state.gave_up}, "
            f"longest park {state.park_max_ns / 1e6:.1f} ms"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["cycles", "kills", "toggles", "migrate"])
    parser.add_argument("--count", type=int)
    parser.add_argument("--only", default="", help="toggles: lines that begin with this")
    options = parser.parse_args()
    if not STEERED:
        parser.error("needs QEMU 7.2 or older")
    wrong: list[str] = []
    if options.what == "cycles":
        done = asyncio.run(cycles(options.count or 200))
        wrong += done.wrong
        ms = [ns / 1e6 for ns in done.stopped_ns]
        print(
            f"{len(ms) // 2} cycles; QEMU stood {statistics.median(ms):.1f} ms (median of an "
            f"attach or detach), at most {max(ms):.1f} ms; load {os.getloadavg()[0]:.1f}"
        )
    elif options.what == "kills":
        count = options.count or 50
        wrong += asyncio.run(kills(count))
        print(f"{count} injectors killed")
    elif options.what == "migrate":
        for mode, strict in (None, False), *_STRATEGIES:
            name = f"{mode or 'none'}{' strict' if strict else ''}"
            if options.only and name != options.only:
                continue
            found = [asyncio.run(migrate(mode, strict)) for _ in range(options.count or 20)]
            print(f"{name}: {len(found)} migrations, wrong pages {sorted(found)}", flush=True)
            if mode is not None and any(found):
                wrong.append(f"{name}: pages are wrong")
    else:
        for mode, strict in _STRATEGIES:
            for injected in (False, True):
                name = f"{mode}{' strict' if strict else ''}"
                if options.only and name != options.only:
                    continue
                line = asyncio.run(_toggles(mode, strict, injected, options.count or 20_000))
                print(line, flush=True)
                if ": survived" not in line or "gave up 0" not in line:
                    wrong.append(line)
    for each in wrong:
        print(f"    WRONG: {each}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
