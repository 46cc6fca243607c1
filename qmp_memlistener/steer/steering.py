"""Applying a strategy to every transition of a running guest, inside its own QEMU.

`judge` says what is in the way before anything is touched; `steer` brings the interposer in, waits
until it sees every vCPU, and changes its mode; `release` takes it out.  The interposer goes on by
itself when this process ends; the next `steer` finds it.

A vCPU that was inside KVM_RUN when the imports were redirected is not seen until it comes back.  So
nothing but `observe` is asked for before each thread that QEMU's SIG_IPI (SIGUSR1) can reach has
either passed through the interposer or is in another system call than ioctl.

Source: QEMU accel/kvm/kvm-accel-ops.c, softmmu/cpus.c, v7.2.22; Linux proc(5), ptrace(2).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import platform
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import MissingPrerequisite, OperationFailed, TargetLost
from ..host.bounded import in_thread
from ..host.elf import read_elf
from ..host.processes import Process
from ..qmp.connection import QemuVersion
from .channel import Channel, Mode, Refusal, State, open_channel
from .hijack import GLIBC, mappings

__all__ = ["OBJECT", "Steering", "judge", "release", "state_of", "steer"]

OBJECT = Path(__file__).with_name("interposer.elf")
_ARM_S = 2.0
_TAKE_S = 1.0
_STEP_S = 0.002
_INJECT_S = 20.0
_DETACH_S = 15.0
_TRIES = 3
_BUSY = 5
_SYS_TGKILL = 234
_SYS_IOCTL = 16
_USER = "run as root or as the user that QEMU runs as"
_ANSWERS = {
    1: "QEMU has no memory left for the channel",
    2: "it is no QEMU with KVM, or does not export the functions that tell who holds the BQL",
    3: "QEMU's program does not import what is to be redirected",
    4: "QEMU's import table cannot be written",
    _BUSY: "transitions follow one another, or a vCPU cannot be kept out of KVM_RUN",
}
_LOCKED = ("bql_locked", "qemu_mutex_iothread_locked")  # before 9.0 it had the second name
_LATER = "no vCPU runs: it takes effect at the next transition"
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Steering:
    """What came of it.  `stopped_ns`: how long QEMU's main loop was stopped.  Counts since then."""

    before: Mode
    after: Mode
    stopped_ns: int
    transitions: int
    parks: int
    gave_up: int
    reason: str | None = None


def judge(process: Process, version: QemuVersion, *, kvm: bool | None, wanted: Mode) -> None:
    """Raises MissingPrerequisite when `wanted` cannot be applied to this QEMU.

    Nothing is touched.  Reads QEMU's program file: takes some 50 ms, so call it in a thread.
    """
    if platform.machine() != "x86_64":
        raise MissingPrerequisite(f"this is for x86-64 hosts, not {platform.machine()}")
    if not OBJECT.exists():
        raise MissingPrerequisite(
            "the interposer was not built", remedy="install a C compiler and install this again"
        )
    if kvm is not True:
        raise MissingPrerequisite("the guest does not run under KVM: there are no memslots")
    if version.major >= 8 and wanted in (Mode.PAUSE, Mode.INHIBIT):
        raise MissingPrerequisite(
            f"QEMU {version} keeps vCPUs out of KVM itself while it changes memslots",
            remedy="use observe, or hole to compare",
        )
    if wanted is Mode.HOLE and any("dirty-ring-size" in a for a in process.argv):
        raise MissingPrerequisite(Refusal.DIRTY_RINGS.words, remedy="use inhibit or pause")
    tracer = _status(f"/proc/{process.pid}/status").get("TracerPid", "0")
    if tracer != "0":
        raise MissingPrerequisite(
            f"process {tracer} traces QEMU (pid {process.pid})", remedy="end that debugger first"
        )
    _judge_right(process)
    if not os.path.exists(f"/proc/{process.pid}/root/proc/self"):
        raise MissingPrerequisite("QEMU sees no /proc (-chroot), so nothing can be loaded into it")
    _judge_program(process)


def _judge_program(process: Process) -> None:
    if not any(read_elf(f"/proc/{process.pid}/exe", _LOCKED).offsets):
        raise MissingPrerequisite(
            f"QEMU's program exports none of the functions {' and '.join(_LOCKED)}, which say "
            "who holds the BQL",
            remedy="use a QEMU built with modules, such as Debian's",
        )
    if not any(m.path.endswith(GLIBC) for m in mappings(process.pid)):
        raise MissingPrerequisite(
            f"QEMU (pid {process.pid}) does not use glibc ({GLIBC.lstrip('/')}), the only C "
            "library that this works with"
        )


def _judge_right(process: Process) -> None:
    if os.geteuid() == 0:
        return
    if process.uid != os.geteuid():
        raise MissingPrerequisite(f"QEMU (pid {process.pid}) belongs to another user", remedy=_USER)
    with contextlib.suppress(OSError), open("/proc/sys/kernel/yama/ptrace_scope") as f:
        if f.read().strip() != "0":
            raise MissingPrerequisite(
                "this host lets nobody trace a process that is not its child (Yama)",
                remedy="run as root, or: sysctl kernel.yama.ptrace_scope=0",
            )


def state_of(process: Process) -> State | None:
    """What the interposer of a QEMU does; None when it has none.

    Raises MissingPrerequisite when that may not be read, TargetLost when QEMU has ended.
    """
    try:
        channel = open_channel(process)
    except PermissionError:
        raise MissingPrerequisite(
            f"what is in QEMU (pid {process.pid}) may not be seen", remedy=_USER
        ) from None
    except FileNotFoundError:
        raise TargetLost(f"QEMU (pid {process.pid}) has ended") from None
    if channel is None:
        return None
    with channel:
        return channel.state()


async def steer(process: Process, wanted: Mode, *, strict: bool = False) -> Steering:
    """Apply `wanted` (not OFF) from the next transition on.

    Raises OperationFailed when it could not be brought in, TargetLost when QEMU has ended.  QEMU
    runs as before then.  When it cannot be armed the mode stays `observe`, and `reason` says why.
    """
    before = await in_thread(state_of, process)
    stopped: list[int] = []
    if before is None or not before.hooked:
        await _inject(process, "attach", stopped)
    channel = await in_thread(open_channel, process)
    if channel is None:
        raise OperationFailed(f"the interposer is not in QEMU (pid {process.pid})")
    with channel:
        start = channel.state()
        reason = None
        if wanted is not Mode.OBSERVE and not start.armed and not await _arm(process, channel):
            reason = "not all vCPUs came out of KVM: nothing is done but observe"
            wanted = Mode.OBSERVE
        channel.want(wanted, strict=strict)
        now = await _taken(process, channel, wanted)
        if now.mode is not wanted:
            reason = _LATER if now.want is wanted else now.refusal.words
        return _steering(_mode(before), now, stopped, start, reason)


async def release(process: Process) -> Steering:
    """QEMU's own slots and imports again.  Raises as `steer` and `state_of`."""
    start = await in_thread(state_of, process)
    if start is None or not start.hooked:
        return Steering(Mode.OFF, Mode.OFF, 0, 0, 0, 0)
    _judge_right(process)
    channel = await in_thread(open_channel, process)
    if channel is None:
        raise TargetLost(f"QEMU (pid {process.pid}) has ended")
    stopped: list[int] = []
    with channel:
        try:
            # slots that were split are put back by a vCPU, and the main loop runs on
            channel.want(Mode.OFF)
            now = await _taken(process, channel, Mode.OFF)
            if now.refusal is Refusal.NOT_STOPPED and now.gave_up != start.gave_up:
                raise OperationFailed(
                    f"QEMU (pid {process.pid}) was left as it was: {now.refusal.words}"
                )
            await _detach(process, stopped)
        except OperationFailed:
            channel.want(start.mode, strict=start.strict)
            raise
    left = await in_thread(state_of, process)
    if left is None:
        raise TargetLost(f"QEMU (pid {process.pid}) has ended")
    return _steering(start.mode, left, stopped, start, None)


async def _detach(process: Process, stopped: list[int]) -> None:
    """As `_inject`; once more when it was busy: no vCPU took the mode before."""
    until = time.monotonic() + _DETACH_S
    while True:
        try:
            await _inject(process, "detach", stopped)
        except OperationFailed:
            state = await in_thread(state_of, process)
            if state is None or state.answer != _BUSY or time.monotonic() > until:
                raise
        else:
            return


def _steering(
    before: Mode, now: State, stopped: list[int], start: State, reason: str | None
) -> Steering:
    return Steering(
        before,
        now.mode,
        sum(stopped),
        now.transactions - start.transactions,
        now.parks - start.parks,
        now.gave_up - start.gave_up,
        reason,
    )


def _mode(state: State | None) -> Mode:
    return state.mode if state is not None and state.hooked else Mode.OFF


async def _inject(process: Process, verb: str, stopped: list[int]) -> None:
    """`stopped` is told how long QEMU's main loop was so, in ns."""
    answers = _answers(await in_thread(state_of, process))
    for _ in range(_TRIES):
        code, out, err = await _injector(process, verb)
        if code != -signal.SIGKILL:  # its own bound, see `hijack`
            break
        if _answers(await in_thread(state_of, process)) != answers:
            out = b'{"stopped_ns": [], "error": null}'  # it had come so far
            break
    else:
        raise OperationFailed(
            f"QEMU (pid {process.pid}) goes on: what was to {verb} the interposer was ended each "
            "time, because it had no processor for 50 ms while QEMU's main thread stood",
            remedy="try again when the host is less busy",
        )
    try:
        told = json.loads(out)
    except ValueError:
        raise OperationFailed(
            f"the injector failed: {err.decode(errors='replace').strip()[-300:]}"
        ) from None
    stopped += told["stopped_ns"]
    if told["error"] is not None:
        if not process.is_alive():
            raise TargetLost(f"QEMU (pid {process.pid}) has ended")
        raise OperationFailed(f"QEMU (pid {process.pid}) was left alone: {told['error']}")
    state = await in_thread(state_of, process)
    if state is None or state.answers == answers:
        raise OperationFailed(
            f"QEMU (pid {process.pid}) did not answer the {verb} within its time; it goes on"
        )
    if state.answer:
        why = _ANSWERS.get(state.answer, f"answer {state.answer}")
        raise OperationFailed(f"QEMU (pid {process.pid}) was left as it was: {why}")


async def _injector(process: Process, verb: str) -> tuple[int | None, bytes, bytes]:
    """How it ended, and what it wrote."""
    try:
        injector = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "qmp_memlistener.steer.injector"),
            *(verb, process.key, str(OBJECT)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is not for it
        )
    except OSError as failed:
        raise OperationFailed(
            f"QEMU (pid {process.pid}) was left alone: a helper process could not be started "
            f"({sys.executable}: {failed.strerror})"
        ) from failed
    try:
        async with asyncio.timeout(_INJECT_S):
            out, err = await injector.communicate()
    except TimeoutError:
        raise OperationFailed(
            f"QEMU (pid {process.pid}) could not be stopped to {verb} the interposer within "
            f"{_INJECT_S:g} s: its main thread hangs in the kernel",
            remedy="look at its process state (`ps`); it goes on by itself",
        ) from None
    finally:
        if injector.returncode is None:  # QEMU goes on by itself, see `hijack`
            injector.kill()
            await injector.wait()
    return injector.returncode, out, err


def _answers(state: State | None) -> int:
    return state.answers if state is not None else 0


async def _arm(process: Process, channel: Channel) -> bool:
    until = time.monotonic() + _ARM_S
    while True:
        unseen = await in_thread(_unseen, process.pid, {v.tid for v in channel.vcpus() if v.seen})
        if not unseen:
            channel.arm()
            return True
        if time.monotonic() > until:
            return False
        for tid in unseen:
            _kick(process.pid, tid)
        await asyncio.sleep(_STEP_S)


def _unseen(pid: int, seen: set[int]) -> list[int]:
    """Threads that may be in a KVM_RUN that did not come through the interposer."""
    found = []
    for name in os.listdir(f"/proc/{pid}/task"):
        tid = int(name)
        if tid in seen:
            continue
        task = f"/proc/{pid}/task/{name}"
        blocked = int(_status(f"{task}/status").get("SigBlk", "f" * 16), 16)
        if blocked >> (signal.SIGUSR1 - 1) & 1:
            continue  # no vCPU: they alone take SIG_IPI
        try:
            with open(f"{task}/syscall") as f:
                number = f.read(16).split()[0]
        except OSError:
            continue  # it has ended
        if number == "running" or int(number) == _SYS_IOCTL:
            found.append(tid)
    return found


async def _taken(process: Process, channel: Channel, wanted: Mode) -> State:
    """Vcpus take a new mode on their way into KVM_RUN: bring them there."""
    until = time.monotonic() + _TAKE_S
    while True:
        state = channel.state()
        if state.mode is wanted or state.want is not wanted or time.monotonic() > until:
            return state
        for vcpu in channel.vcpus():
            _kick(process.pid, vcpu.tid)
        await asyncio.sleep(_STEP_S)


def _kick(pid: int, tid: int) -> None:
    """As QEMU's own qemu_cpu_kick: the thread leaves KVM_RUN and comes back."""
    _libc.syscall(_SYS_TGKILL, pid, tid, signal.SIGUSR1)


def _status(path: str) -> dict[str, str]:
    try:
        with open(path) as f:
            pairs = (line.partition(":") for line in f)
            return {key: value.strip() for key, _, value in pairs}
    except OSError:
        return {}
