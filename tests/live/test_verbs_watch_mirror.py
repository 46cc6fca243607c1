"""`watch --mirror` as a user runs it: what it prints, its exit codes, how it leaves the guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from qmp_memlistener.cli.signals import SAME_S
from qmp_memlistener.errors import MissingPrerequisite
from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.kvmlab import Kvm
from qmp_memlistener.qmp import Monitor
from tests.live.verbs_support import is_as_before, one_build
from tests.support.host import patience
from tests.support.leftovers import enabled_events, left_behind
from tests.support.live import Vm, best_accel, booted, builds, qmp
from tests.support.verbs import Ran, Verb, run_in_terminal, run_verb, started_verb

pytestmark = [pytest.mark.qemu, pytest.mark.kvm, pytest.mark.asyncio]

full = pytest.mark.full
strategies = pytest.mark.parametrize(
    "strategy", ["pause", pytest.param("direct", marks=full), pytest.param("hole", marks=full)]
)
"""What each of them does is tested by the API, in test_mirror_kvm."""
BARE = ("--probes", "none")
PATIENCE = 5.0  # seconds with a comparison that does not come to its end
REPORT_KEYS = {
    *("schema", "type", "t_ns", "backend", "strategy", "in_step", "why_not", "compared"),
    *("differences", "transitions", "operations", "slots_added", "slots_deleted"),
    *("flags_changed", "holes_marked", "holes_unmarked", "slots_touched", "exposed"),
    *("bitmaps_dropped", "updates", "pauses", "already_paused", "unpaused", "lag", "rebuilt"),
    *("dropped", "checks", "notes", "lab"),
}
LAB_KEYS = {
    *("vcpus", "slots", "slot_ioctls", "mappings", "placed", "grown", "moved", "holds", "reads"),
    *("differences", "wrong_logs"),
}
LIE = """
from qmp_memlistener.kvmlab.backend import KvmBackend
from qmp_memlistener.kvmlab.real_slot import RealSlot
from qmp_memlistener.kvmlab.vm import Kvm
from qmp_memlistener.kvmlab.vm import LabVm
{lie}
from qmp_memlistener.cli.main import run
run()
"""
FORGETS = """
held = KvmBackend.slots
KvmBackend.slots = lambda self: held(self)[1:]
"""
SHOWS_OTHERS = """
from dataclasses import replace
show = RealSlot.show
RealSlot.show = lambda self, piece, about: show(
    self,
    replace(piece, offset=0x1000) if piece.block and piece.block[0] == "pc.bios" else piece,
    about,
)
"""
CANNOT_DELETE = """
region = LabVm.region
LabVm.region = lambda self, slot, gpa, size, hva, flags=0: (
    region(self, slot, gpa, size, hva, flags) if size else -12
)
"""
# what the backend does wrong, what the user is told of it, and how the report begins
LIES = {
    "forgets": (FORGETS, "the mirror differed from the guest's map in ", "OUT OF STEP"),
    "shows-others": (SHOWS_OTHERS, "the mirror differed from the guest's map in ", "in step"),
    "cannot-delete": (CANNOT_DELETE, "the mirror ", "OUT OF STEP"),
}


@pytest.fixture(autouse=True)
def _has_kvm() -> None:
    """The verb needs it for the lab, whatever the guest runs on."""
    try:
        Kvm().close()
    except MissingPrerequisite as exc:
        pytest.skip(f"{exc.message}: {exc.remedy}")


@asynccontextmanager
async def mirroring(vm: Vm, *args: str) -> AsyncIterator[Verb]:
    """`watch --mirror ...` that follows."""
    async with started_verb("watch", vm.target, "--mirror", *args) as watch:
        await watch.until("in step from now on", 30)
        yield watch


async def running(monitor: Monitor) -> bool:
    status = await monitor.execute("query-status")
    assert isinstance(status, dict)
    return bool(status["status"] == "running")


def mirror_of(ran: Ran) -> dict[str, object]:
    """The one record of it."""
    (found,) = (r for r in ran.documents if r["type"] == "mirror")
    assert found.keys() == REPORT_KEYS
    return found


@builds()
@strategies
async def test_a_mirror_on_kvm_in_json(build: QemuBuild, strategy: str) -> None:
    async with (
        booted(build, best_accel(build), monitors=4) as vm,
        qmp(vm.guest.monitors[1]) as monitor,
    ):
        before = await enabled_events(monitor)
        options = ("kvm", "--strategy", strategy, "--mirror-vcpus", "1", "--json", *BARE)
        async with mirroring(vm, *options) as watch:
            await vm.toggle(10, period_ms=3)
            ran = await watch.signalled(signal.SIGINT)
        assert (ran.code, ran.err) == (0, "")
        assert await is_as_before(vm, monitor, before)
        assert await running(monitor)
    mirror = mirror_of(ran)
    assert (mirror["backend"], mirror["strategy"]) == ("kvm", strategy)
    assert (mirror["in_step"], mirror["compared"], mirror["differences"]) == (True, True, [])
    assert mirror["transitions"] == 1 + sum(r["type"] == "transition" for r in ran.documents)
    assert (mirror["exposed"] != 0) == (strategy == "direct")
    assert (mirror["holes_marked"] != 0) == (strategy == "hole")
    updates, pauses = mirror["updates"], mirror["pauses"]
    assert isinstance(updates, dict)
    assert isinstance(pauses, dict)
    assert updates["count"] >= 2
    assert pauses["count"] == (updates["count"] if strategy == "pause" else 0)
    lab = mirror["lab"]
    assert isinstance(lab, dict)
    assert lab.keys() == LAB_KEYS
    assert (lab["vcpus"], lab["differences"], lab["wrong_logs"]) == (1, [], [])
    assert lab["reads"] >= 10
    assert (lab["slots"] < lab["slot_ioctls"]) == (strategy != "hole")
    assert (lab["holds"]["count"] != 0) == (strategy != "direct")


@builds()
async def test_a_mirror_on_kvm_in_words(build: QemuBuild) -> None:
    async with (
        booted(build, best_accel(build)) as vm,
        mirroring(vm, "kvm", "--mirror-vcpus", "2", *BARE) as watch,
    ):
        await vm.toggle(4, period_ms=3)
        ran = await watch.signalled(signal.SIGINT)
    assert (ran.code, ran.err) == (0, "")
    start = ran.lines.index("mirror on /dev/kvm, strategy hole: in step")
    told = ran.lines[start : ran.lines.index("", start)]
    assert max(map(len, told)) <= 80
    text = " ".join(" ".join(told).split())
    for words in (
        "compared with the guest's map at the end: no difference",
        "holes marked",
        "behind the guest for",
        "lab: 2 slots of KVM's,",
        "lab: 2 vCPUs running, paused for",
        "each from where it should be",
    ):
        assert words in text


@one_build
async def test_on_a_terminal_it_fits(build: QemuBuild) -> None:
    async with booted(build, best_accel(build)) as vm:
        lines = await run_in_terminal(
            "watch", vm.target, "--mirror", "kvm", "--for", "300ms", *BARE, seconds=40.0
        )
    start = lines.index("mirror on /dev/kvm, strategy hole: in step")
    assert len(lines[start:]) > 4
    assert [line for line in lines[start:] if len(line) > 80] == []


@one_build
async def test_a_mirror_in_memory(build: QemuBuild) -> None:
    async with (
        booted(build, best_accel(build)) as vm,
        mirroring(vm, "model", "--strategy", "direct", "--json", *BARE) as watch,
    ):
        await vm.toggle(4, period_ms=3)
        ran = await watch.signalled(signal.SIGTERM)
    assert (ran.code, ran.err) == (0, "")
    mirror = mirror_of(ran)
    assert (mirror["backend"], mirror["lab"]) == ("model", None)
    assert (mirror["in_step"], mirror["compared"], mirror["differences"]) == (True, True, [])


# -- what goes wrong -------------------------------------------------------------------------------


@one_build
@pytest.mark.parametrize(
    "lie",
    [
        "forgets",
        pytest.param("shows-others", marks=full),
        pytest.param("cannot-delete", marks=full),
    ],
)
async def test_a_mirror_that_is_not_in_step_is_exit_code_1(build: QemuBuild, lie: str) -> None:
    how, message, state = LIES[lie]
    strategy = "direct" if lie == "cannot-delete" else "hole"
    async with (
        booted(build, best_accel(build)) as vm,
        qmp(vm.guest.monitors[1]) as monitor,
    ):
        args = ("watch", vm.target, "--mirror", "kvm", "--strategy", strategy, *BARE)
        async with lying(how, *args) as watch:
            await watch.until("in step from now on", 30)
            await vm.toggle(3, period_ms=3)
            ran = await watch.signalled(signal.SIGINT)
        assert await running(monitor)
    assert ran.code == 1
    error, remedy = ran.err.splitlines()[-2:]
    assert error.startswith(f"error: {message}")
    assert remedy.startswith("remedy: ")
    (head,) = (line for line in ran.lines if line.startswith("mirror on /dev/kvm"))
    assert head == f"mirror on /dev/kvm, strategy {strategy}: {state}"
    assert (" instead of " in ran.out) or lie == "cannot-delete"
    assert ("Cannot allocate memory" in ran.out) == (lie == "cannot-delete")


@asynccontextmanager
async def lying(lie: str, *args: str) -> AsyncIterator[Verb]:
    """A verb with a backend that does something wrong."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", LIE.format(lie=lie), *args),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 22,
    )
    try:
        yield Verb(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_without_kvm_nothing_is_attached(tmp_path: Path) -> None:
    """There is no such guest either: that would be exit code 3."""
    no_kvm = 'Kvm.__init__.__defaults__ = ("/dev/no-kvm",)'
    target = str(tmp_path / "no.qmp")
    async with lying(no_kvm, "watch", target, "--mirror", "kvm") as watch:
        ran = await watch.end(30)
    ran.check_error(4, "there is no KVM here", "remedy: ")
    assert ran.out == ""
    (await run_verb("watch", target, "--mirror", "model")).check_error(3)


@one_build
async def test_pause_without_a_monitor_for_the_guard_is_refused(build: QemuBuild) -> None:
    async with booted(build, best_accel(build), monitors=1) as vm:
        options = ("--mirror", "kvm", "--strategy", "pause", *BARE)
        ran = await run_verb("watch", vm.target, *options, seconds=40.0)
        ran.check_error(1, "guard", "remedy: ", "--guard-monitor")
        assert left_behind(vm.guest.pid) == []
        async with qmp(vm.guest.monitors[0]) as monitor:
            assert await running(monitor)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--strategy", "hole"), "--strategy goes with --mirror only"),
        (("--mirror-vcpus", "1"), "--mirror-vcpus goes with --mirror only"),
        (("--mirror", "model", "--mirror-vcpus", "1"), "goes with --mirror kvm only"),
        (("--mirror", "kvm", "--guard-monitor", "x"), "goes with --strategy pause only"),
        (("--mirror", "kvm", "--strategy", "pause", "--freeze"), "--freeze"),
        (("--mirror", "xen"), "'xen'"),
        (("--mirror", "kvm", "--mirror-vcpus", "17"), "17"),
    ],
)
async def test_options_that_do_not_go_together(options: tuple[str, ...], words: str) -> None:
    ran = await run_verb("watch", "/no.qmp", *options)
    assert ran.code == 2
    assert words in ran.err


# -- how it ends -----------------------------------------------------------------------------------


@one_build
@strategies
async def test_ctrl_c_in_the_middle_of_changes(build: QemuBuild, strategy: str) -> None:
    """A guest that never holds still cannot be compared; that is said, and not waited for.

    A busy host may not run it for long enough: then it is in step.
    """
    async with (
        booted(build, best_accel(build), monitors=4) as vm,
        qmp(vm.guest.monitors[1]) as monitor,
    ):
        before = await enabled_events(monitor)
        options = ("kvm", "--strategy", strategy, "--mirror-vcpus", "1", *BARE)
        async with mirroring(vm, *options) as watch:
            toggling = asyncio.create_task(vm.toggle(30_000, period_ms=5))
            await watch.until("#20 ")
            watch.process.send_signal(signal.SIGINT)
            ran = await watch.end(40)
            toggling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await toggling
        assert ran.code == 0
        # attempts at a comparison may take long enough to be told
        assert ran.err == "" or ran.err.startswith("ending, but waiting")
        assert any(
            line.startswith(f"mirror on /dev/kvm, strategy {strategy}: ") for line in ran.lines
        )
        in_step = f"mirror on /dev/kvm, strategy {strategy}: in step"
        assert {"  not compared with the guest's map at the end", in_step} & {*ran.lines}
        assert await running(monitor)
        assert await is_as_before(vm, monitor, before)


@one_build
async def test_a_second_ctrl_c_does_without_the_comparison(build: QemuBuild) -> None:
    async with (
        booted(build, best_accel(build), monitors=4) as vm,
        mirroring(vm, "kvm", "--strategy", "pause", *BARE) as watch,
    ):
        toggling = asyncio.create_task(vm.toggle(30_000, period_ms=5))
        await watch.until("#20 ")
        watch.process.send_signal(signal.SIGINT)
        await asyncio.sleep(SAME_S + 0.05)  # it goes on for the comparison; sooner it is the same
        watch.process.send_signal(signal.SIGINT)
        ran = await watch.end(40)
        toggling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await toggling
    assert (ran.code, ran.err) == (0, "")
    assert "the wait was ended" in " ".join(ran.out.split())
    assert ran.seconds < patience(PATIENCE)


@one_build
async def test_killed_while_it_pauses_the_guest_runs_again(build: QemuBuild) -> None:
    async with (
        booted(build, best_accel(build), monitors=4) as vm,
        qmp(vm.guest.monitors[1]) as monitor,
    ):
        async with mirroring(vm, "kvm", "--strategy", "pause", *BARE) as watch:
            toggling = asyncio.create_task(vm.toggle(300, period_ms=10))
            await watch.until("#20 ")
            await watch.signalled(signal.SIGKILL)
            toggling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await toggling
        async with asyncio.timeout(patience(5)):
            while not await running(monitor):  # noqa: ASYNC110 (the guard tells nobody)
                await asyncio.sleep(0.01)
        ran = await run_verb("watch", vm.target, "--for", "100ms", *BARE)
        assert ran.code == 0
        assert left_behind(vm.guest.pid) == []


@one_build
@strategies
async def test_a_guest_that_is_killed(build: QemuBuild, strategy: str) -> None:
    async with booted(build, best_accel(build), monitors=4) as vm:
        options = ("kvm", "--strategy", strategy, "--json", *BARE)
        async with mirroring(vm, *options) as watch:
            toggling = asyncio.create_task(vm.toggle(300, period_ms=10))
            await watch.until('"type":"transition","schema":1,"seq":10,')
            os.kill(vm.guest.pid, signal.SIGKILL)
            ran = await watch.end(15)
            toggling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await toggling
        ran.check_error(3, "remedy: ")
        mirror = mirror_of(ran)
        assert mirror["compared"] is False
        notes = mirror["notes"]
        assert isinstance(notes, list)
        assert any("not compared at the end" in note for note in notes)
        assert left_behind(vm.guest.pid) == []


@one_build
async def test_a_reader_that_has_gone(build: QemuBuild) -> None:
    """As in `watch --mirror kvm TARGET | head`; who is not there is told of no comparison."""
    ours, theirs = os.pipe()
    async with booted(build, best_accel(build)) as vm, qmp(vm.guest.monitors[1]) as monitor:
        before = await enabled_events(monitor)
        args = ("watch", vm.target, "--mirror", "kvm", *BARE)
        async with started_verb(*args, stdout=theirs) as watch:
            os.close(theirs)
            with os.fdopen(ours, "rb") as reader:
                await asyncio.to_thread(read_until, reader, b"in step from now on")
            end = asyncio.create_task(watch.end(40))
            while not end.done():
                await vm.toggle(2)
            ran = await end
        assert (ran.code, ran.err) == (0, "")
        assert await is_as_before(vm, monitor, before)


def read_until(reader: BinaryIO, text: bytes) -> None:
    while text not in (line := reader.readline()):
        assert line
