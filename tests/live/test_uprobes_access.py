"""What the uprobes probe needs, and QEMUs that are not as usual: stripped, in other namespaces."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.probes import ProbeUnavailable, StallKind
from qmp_memlistener.probes.uprobes import Batch, UprobeReader, UprobesProbe
from qmp_memlistener.probes.uprobes.observing import ThreadNames
from qmp_memlistener.probes.uprobes.program import examine
from qmp_memlistener.qmp import find_guest
from qmp_memlistener.qmp.guest import read_vcpus
from tests.support.live import QEMUS, Vm, booted, builds, qmp
from tests.support.probes import guest_context

pytestmark = [pytest.mark.qemu, pytest.mark.asyncio]

ONE = QEMUS[:1]
EXAMINE = """
import sys
from qmp_memlistener.probes import ProbeUnavailable
from qmp_memlistener.probes.uprobes.program import examine
try:
    examine(int(sys.argv[1]))
except ProbeUnavailable as why:
    print(why.message, why.remedy, sep="|")
else:
    print("usable")
"""


def needs(*tools: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("this takes root")
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def probed(vm: Vm) -> None:
    try:
        examine(vm.guest.process.pid)
    except ProbeUnavailable as why:
        pytest.skip(f"uprobes: {why.message}")


def moved(build: QemuBuild, binary: Path) -> QemuBuild:
    """The same QEMU at another place, from where it would not find its modules by itself."""
    root = Path(build.binary).parent.parent
    places = (root / "lib" / "x86_64-linux-gnu" / "qemu", root / "lib64" / "qemu")
    modules = next((str(place) for place in places if place.is_dir()), str(root))
    return replace(build, binary=str(binary), env={"QEMU_MODULE_DIR": modules, **build.env})


async def said(*argv: str) -> str:
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    return out.decode()


async def commits_seen(vm: Vm) -> int:
    """How many commits a reader sees while the guest toggles ten times."""
    batches: list[Batch] = []
    reader = UprobeReader(vm.guest.process.pid, batches.append)
    await asyncio.to_thread(reader.start)
    try:
        since = time.monotonic_ns()
        await vm.toggle(10)
        await asyncio.wrap_future(reader.flush())
    finally:
        await asyncio.to_thread(reader.stop)
    windows = [w for b in batches for w in b.windows if w.start_ns >= since]
    return sum(1 for w in windows if w.kind is StallKind.COMMIT and not w.inner)


@builds(ONE)
@pytest.mark.parametrize("uid", [65534])
async def test_who_may_not_probe_is_told_what_it_takes(build: QemuBuild, uid: int) -> None:
    needs("setpriv")
    async with booted(build, "tcg") as vm:
        probed(vm)
        pid = str(vm.guest.process.pid)
        ids = (f"--reuid={uid}", f"--regid={uid}", "--clear-groups")
        python = (sys.executable, "-c", EXAMINE, pid)
        if not (await said("setpriv", *ids, sys.executable, "-c", "print(1)")).strip():
            pytest.skip("the Python here may be used by root only")
        message, remedy = (await said("setpriv", *ids, *python)).strip().split("|")
        assert "does not let this user probe" in message
        assert "perf_event_paranoid" in message
        assert "CAP_PERFMON" in remedy
        # root in name only
        dropped = await said("setpriv", "--bounding-set=-all", "--inh-caps=-all", *python)
        assert "does not let this user probe" in dropped


@builds(ONE)
async def test_qemus_that_cannot_be_seen_or_are_gone(build: QemuBuild) -> None:
    async with booted(build, "tcg") as vm:
        probed(vm)
        async with guest_context(vm.guest) as context:
            verdict = await UprobesProbe(replace(context, guest=None)).check()
        pid = vm.guest.process.pid
    assert not verdict.usable
    assert "not visible" in str(verdict.reason)
    assert "host" in str(verdict.remedy)
    with pytest.raises(ProbeUnavailable, match="went away"):
        examine(pid)


async def test_programs_without_the_functions_or_without_symbols(tmp_path: Path) -> None:
    needs("cc")
    source = tmp_path / "empty.c"
    source.write_text("#include <unistd.h>\nint main(void) { return pause(); }\n")
    for options, reason in (((), "none of the functions"), (("-static",), "no dynamic symbols")):
        binary = str(tmp_path / "qemu-system-none")
        if await (
            await asyncio.create_subprocess_exec("cc", "-o", binary, *options, str(source))
        ).wait():
            pytest.skip("cc cannot link statically")
        process = await asyncio.create_subprocess_exec(binary)
        try:
            with pytest.raises(ProbeUnavailable, match=reason) as caught:
                examine(process.pid)
            assert caught.value.remedy
        finally:
            process.kill()
            await process.wait()


@builds(ONE)
async def test_a_stripped_binary(build: QemuBuild, tmp_path: Path) -> None:
    needs("strip")
    stripped = tmp_path / "qemu-system-stripped"
    assert await said("strip", "-s", "-o", str(stripped), build.binary) == ""
    async with booted(build, "tcg", binary=moved(build, stripped)) as vm:
        probed(vm)
        assert await commits_seen(vm) >= 10


def child_of(pid: int) -> int:
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return int(children.read())


def wrapped(build: QemuBuild, script: Path, command: str) -> QemuBuild:
    """The same QEMU, started by a shell script."""
    script.write_text(f"#!/bin/sh\n{command}\n")
    script.chmod(0o755)
    return moved(build, script)


@builds(ONE)
async def test_a_qemu_in_another_mount_namespace(build: QemuBuild, tmp_path: Path) -> None:
    """Its file is at a path that does not exist here."""
    needs("unshare")
    there = tmp_path / "there"
    there.mkdir()
    inside = there / "qemu-inside"
    inner = f'mount -t tmpfs none {there} && cp "$0" {inside} && exec {inside} "$@"'
    command = f"exec unshare -m sh -c '{inner}' {build.binary} \"$@\""
    unshared = wrapped(build, tmp_path / "start", command)
    async with booted(build, "tcg", binary=unshared) as vm:
        assert os.readlink(f"/proc/{vm.guest.process.pid}/exe") == str(inside)
        assert list(there.iterdir()) == []
        probed(vm)
        assert await commits_seen(vm) >= 10


@builds(ONE)
async def test_a_qemu_in_another_process_namespace(build: QemuBuild, tmp_path: Path) -> None:
    """QEMU tells thread ids as they are counted there; names are found all the same."""
    needs("unshare")
    command = f'exec unshare --pid --fork --kill-child {build.binary} "$@"'
    apart = wrapped(build, tmp_path / "start", command)
    async with booted(build, "tcg", binary=apart) as vm, qmp(vm.guest.monitors[0]) as monitor:
        shell = vm.guest.process.pid
        pid = child_of(shell)
        assert find_guest(pid) is not None
        names = ThreadNames(pid)
        names.learn_vcpus(await read_vcpus(monitor, deadline=10.0) or ())
        threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
        assert sorted(names[tid] for tid in threads).count("CPU 0") == 1
        assert names[pid] == "main"
        try:
            examine(pid)
        except ProbeUnavailable as why:
            pytest.skip(f"uprobes: {why.message}")
        batches: list[Batch] = []
        reader = UprobeReader(pid, batches.append)
        await asyncio.to_thread(reader.start)
        await vm.toggle(10)
        await asyncio.to_thread(reader.stop)
        seen = {names[w.tid] for b in batches for w in b.windows}
        assert "CPU 0" in seen
