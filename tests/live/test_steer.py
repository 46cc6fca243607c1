"""Strategies inside a running QEMU: what dies under QEMU's own way lives.

CPU 0 toggles PAM, which makes QEMU up to 7.2 delete and add again the slot of all RAM above 1 MiB;
CPU 1 has its code or its page tables there.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qmp_memlistener.guests import (
    GuestSpec,
    High,
    LaunchedGuest,
    Pulse,
    QemuBuild,
    launch,
)
from qmp_memlistener.host.processes import Process
from qmp_memlistener.qmp import Monitor, UnixTarget
from qmp_memlistener.steer import OBJECT, EventKind, Mode, open_channel, state_of
from qmp_memlistener.steer.channel import number_of
from qmp_memlistener.steer.hijack import mappings
from tests.support.host import patience
from tests.support.live import QEMUS, builds, skip_without_kvm
from tests.support.steer import (
    NEEDS,
    STEERED,
    TOGGLES,
    injector_ended,
    racing,
    state,
    steer,
    toggled,
)
from tests.support.verbs import run_verb

pytestmark = NEEDS
PLACES = pytest.mark.parametrize(
    "place",
    [
        pytest.param(High.CODE, id="code"),
        pytest.param(High.TABLES, id="tables", marks=pytest.mark.full),
    ],
)


async def _dies(guest: LaunchedGuest, pulse: Pulse) -> bool:
    """On a busy host CPU 1 may not run in any of the moments without memory."""
    for _ in range(5):
        if await toggled(guest, pulse) != "survived":
            return True
    return False


@pytest.mark.asyncio
@PLACES
async def test_a_guest_that_is_only_observed_dies_as_without_us(place: High) -> None:
    async with racing(place) as (guest, pulse):
        ran = await steer(guest, "observe")
        assert ran.code == 0, ran.err
        assert await _dies(guest, pulse)


@pytest.mark.asyncio
@PLACES
@pytest.mark.parametrize("strategy", ["pause", "inhibit", "hole", "hole --strict"])
async def test_a_guest_lives_under_a_strategy(strategy: str, place: High) -> None:
    async with racing(place) as (guest, pulse):
        ran = await steer(guest, *strategy.split())
        assert ran.code == 0, ran.err
        (said,) = ran.documents
        assert (said["outcome"], said["before"]) == ("done", "off")
        assert said["after"] == strategy.split()[0]
        assert await toggled(guest, pulse) == "survived"
        now = state(guest)
        assert now.transactions >= TOGGLES
        assert now.gave_up == 0
        if strategy == "hole":
            assert now.parks <= 2  # the slot is split once
            assert now.kept >= TOGGLES
        else:
            assert now.parks >= TOGGLES
        off = await steer(guest, "off")
        assert off.code == 0, off.err
        now = state(guest)
        assert (now.mode, now.hooked) == (Mode.OFF, False)
        assert now.slots == now.pieces  # QEMU's own slots again
        assert await _dies(guest, pulse)  # QEMU's own way again


@pytest.mark.asyncio
async def test_run_becomes_a_qemu_with_a_strategy(tmp_path: Path) -> None:
    skip_without_kvm(STEERED[-1], "kvm")
    monitor = tmp_path / "qmp"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmp_memlistener", "run", "--strategy", "hole", "--strict", "--"),
        *(STEERED[-1].binary, *STEERED[-1].args, "-accel", "kvm", "-display", "none", "-S"),
        *("-qmp", f"unix:{monitor},server=on,wait=off"),
        env={**os.environ, **STEERED[-1].env},
    )
    try:
        async with asyncio.timeout(patience(20)):
            while not monitor.exists():  # noqa: ASYNC110 (no event)
                await asyncio.sleep(0.05)
        seen = Process.read(process.pid)
        assert seen is not None
        assert seen.argv[0] == STEERED[-1].binary  # this process, not a child of it
        now = state_of(seen)
        assert now is not None
        assert (now.hooked, now.armed, now.strict) == (True, True, True)
        assert now.want is Mode.HOLE
    finally:
        process.kill()
        await process.wait()


@pytest.mark.asyncio
@pytest.mark.full
@pytest.mark.parametrize("options", ["", "-sandbox on", "-runas nobody"])
@builds()
async def test_the_strategies_of_each_version(build: QemuBuild, options: str) -> None:
    """From 8.0 on `hole` alone is of use beside QEMU's own way."""
    if build not in STEERED:
        options = options.replace("-runas nobody", "-run-with user=nobody")
    async with racing(build=build, args=tuple(options.split())) as (guest, pulse):
        ran = await steer(guest, "hole")
        assert ran.code == 0, ran.err
        assert await toggled(guest, pulse, 40) == "survived"
        now = state(guest)
        assert now.kept >= 40
        assert (await steer(guest, "off")).code == 0
        now = state(guest)
        assert (now.mode, now.slots) == (Mode.OFF, now.pieces)


@pytest.mark.asyncio
async def test_interrupted_it_is_done_and_says_so() -> None:
    async with racing(High.DATA) as (guest, _):
        verb = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "qmp_memlistener", "steer", f"unix:{guest.monitors[0]}"),
            *("--strategy", "inhibit"),
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        while verb.returncode is None and not _injecting(verb.pid):  # noqa: ASYNC110 (no event)
            await asyncio.sleep(0)
        verb.send_signal(signal.SIGINT)
        async with asyncio.timeout(patience(20)):
            _, err = await verb.communicate()
        now = state(guest)
        assert verb.returncode == 130, err.decode()
        assert f"off -> {now.mode.name.lower()}".encode() in err
        assert now.mode is Mode.INHIBIT


def _injecting(pid: int) -> bool:
    """It has a child: the injector."""
    return bool(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


@pytest.mark.asyncio
async def test_run_applies_a_strategy_from_the_first_slot_on() -> None:
    env = {"LD_PRELOAD": str(OBJECT), "QMP_MEMLISTENER_STEER": str(number_of(Mode.HOLE))}
    async with racing(env=env) as (guest, pulse):
        assert state(guest).mode is Mode.HOLE
        assert await toggled(guest, pulse) == "survived"
        ran = await steer(guest, "inhibit")
        assert ran.documents[0]["before"] == "hole"
        assert ran.documents[0]["stopped_ns"] == 0  # nothing is brought in again
        assert await toggled(guest, pulse) == "survived"
        assert state(guest).mode is Mode.INHIBIT


@pytest.mark.asyncio
async def test_each_operation_is_stamped_by_its_thread() -> None:
    async with racing(High.DATA) as (guest, pulse):
        await steer(guest, "observe")
        process = Process.read(guest.pid)
        assert process is not None
        channel = open_channel(process)
        assert channel is not None
        with channel:
            channel.skip()
            assert await toggled(guest, pulse, 10) == "survived"
            events = channel.read_events()
            vcpus = {v.tid for v in channel.vcpus()}
        ops = [e for e in events if e.kind is EventKind.KVM]
        assert len(ops) == 40
        assert all(e.begin_ns < e.end_ns for e in ops)
        assert all(a.end_ns <= b.begin_ns for a, b in itertools.pairwise(ops))
        assert {e.tid for e in ops} <= vcpus  # the other one may not have left KVM_RUN yet
        assert all(e.rc == 0 for e in ops)


@pytest.mark.asyncio
async def test_an_injector_that_is_killed_leaves_qemu_running() -> None:
    """Before any of its steps: the frame on QEMU's stack puts its registers back."""
    async with racing(High.DATA) as (guest, pulse):
        process = Process.read(guest.pid)
        assert process is not None
        for step in (0, 2, 3, 5, 8, 12, 16, 19):
            verb = "detach" if step % 2 else "attach"
            await injector_ended(process, verb, step, signal.SIGKILL)
            async with await Monitor.connect(UnixTarget(str(guest.monitors[1]))) as monitor:
                await monitor.execute("query-status")
        for strategy in ("inhibit", "off"):
            ran = await steer(guest, strategy)
            assert ran.code == 0, ran.err
        assert await toggled(guest, pulse, 10) == "survived"


@pytest.mark.asyncio
async def test_an_injector_that_does_not_run_any_more_holds_qemu_for_no_longer() -> None:
    """It is stopped while QEMU's main thread is: a timer of the kernel's ends it."""
    async with racing(High.DATA) as (guest, pulse):
        process = Process.read(guest.pid)
        assert process is not None
        ended = await injector_ended(process, "attach", 3, signal.SIGSTOP)
        assert ended == -signal.SIGKILL
        async with await Monitor.connect(UnixTarget(str(guest.monitors[1]))) as monitor:
            await monitor.execute("query-status")
        assert (await steer(guest, "inhibit")).code == 0
        assert await toggled(guest, pulse, 10) == "survived"


@pytest.mark.asyncio
async def test_what_cannot_be_steered_is_refused() -> None:
    async with launch(GuestSpec(machine="pc", accel="tcg").on(STEERED[-1])) as guest:
        ran = await steer(guest, "hole")
        ran.check_error(4, "KVM")
        assert ran.documents[0]["outcome"] == "refused"
        assert Process.read(guest.pid) is not None
    newer = [b for b in QEMUS if b not in STEERED]
    if newer:
        skip_without_kvm(newer[-1], "kvm")
        async with launch(GuestSpec(machine="pc", accel="kvm").on(newer[-1])) as guest:
            ran = await steer(guest, "inhibit")
            ran.check_error(4, newer[-1].version, "observe")


def _without_names(program: Path) -> Path:
    """A QEMU that does not export who holds the BQL, as one that is built without modules."""
    name = b"qemu_mutex_iothread_locked"
    program.write_bytes(Path(STEERED[-1].binary).read_bytes().replace(name, name.swapcase()))
    program.chmod(0o755)
    return program


def _mapped(process: Process) -> tuple[set[str], set[str]]:
    """Files in its memory, and those it has open but for its monitors' sockets."""
    opened = {f.link for f in process.file_descriptors() or ()}
    return {m.path for m in mappings(process.pid)}, {o for o in opened if "socket:" not in o}


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "why", ["names", *(pytest.param(w, marks=pytest.mark.full) for w in ("chroot", "rings"))]
)
async def test_nothing_is_touched_where_it_cannot_work(why: str, tmp_path: Path) -> None:
    skip_without_kvm(STEERED[-1], "kvm")
    build, words = STEERED[-1], ""
    args: tuple[str, ...] = ()
    if why == "chroot":
        if os.geteuid():
            pytest.skip("-chroot needs root")
        args, words = ("-chroot", str(tmp_path)), "chroot"
    elif why == "names":
        build = replace(build, binary=str(_without_names(tmp_path / "qemu-system-x86_64")))
        words = "exports none"
    else:
        args, words = ("-accel", "kvm,dirty-ring-size=4096"), "dirty rings"
    async with racing(High.DATA, build=build, args=args) as (guest, pulse):
        process = Process.read(guest.pid)
        assert process is not None
        before = _mapped(process)
        ran = await steer(guest, "hole")
        ran.check_error(4, words)
        assert ran.documents[0]["outcome"] == "refused"
        doctor = await run_verb("doctor", f"pid:{guest.pid}", "--json")
        (row,) = (c for c in doctor.documents[0]["checks"] if c["name"].startswith("steer"))  # type: ignore[attr-defined]
        assert row["usable"] is (why == "rings")
        assert "hole" not in row["name"]
        assert state_of(process) is None
        assert _mapped(process) == before
        await pulse.wait_beats(2)


@pytest.mark.asyncio
async def test_a_debugger_is_in_the_way() -> None:
    async with racing(High.DATA) as (guest, _):
        holder = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _HOLD, str(guest.pid)), stdout=asyncio.subprocess.PIPE
        )
        try:
            assert holder.stdout is not None
            assert await holder.stdout.readline() == b"held\n"
            ran = await steer(guest, "hole")
            ran.check_error(4, str(holder.pid))
        finally:
            holder.kill()
            await holder.communicate()


_HOLD = """
import ctypes, sys, time
assert ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), None, None) == 0
print("held", flush=True)
time.sleep(60)
"""


def test_the_layout_is_that_of_the_header(tmp_path: Path) -> None:
    from qmp_memlistener.steer import channel

    header = OBJECT.with_name("interposer.h")
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n"
        f'#include "{header}"\n'
        "#define AT(x) offsetof(struct channel, x)\n"
        'int main(void) { printf("%zu %zu %zu %zu %zu %zu %zu %zu %zu", AT(want), AT(strict), '
        "AT(armed), AT(vcpu), AT(head), AT(ring), sizeof(struct vcpu), sizeof(struct event), "
        "sizeof(struct channel)); }\n"
    )
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-o", tmp_path / "layout", source], check=True)
    said = subprocess.run([tmp_path / "layout"], check=True, capture_output=True, text=True).stdout
    assert [int(n) for n in said.split()] == [
        *(channel._WANT_AT, channel._STRICT_AT, channel._ARMED_AT, channel._VCPU_AT),
        *(channel._NEXT_AT, channel._RING_AT, channel._VCPU.size, channel._EVENT.size),
        channel._SIZE,
    ]


@pytest.mark.asyncio
@pytest.mark.full
async def test_in_and_out_and_in_again() -> None:
    """A vCPU that was seen in the first time may be in KVM_RUN unseen in the second."""
    async with racing() as (guest, pulse):
        for _ in range(3):
            ran = await steer(guest, "inhibit")
            assert ran.code == 0, ran.err
            assert await toggled(guest, pulse, 20) == "survived"
            assert (await steer(guest, "off")).code == 0
