"""The example of docs/glib.md: D-Bus, timers, a subprocess, signals and a guest in one loop."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path

import pytest

from qmp_memlistener import glib_loop
from qmp_memlistener.glib_loop import Integration
from qmp_memlistener.guests import QemuBuild
from tests.support.host import patience
from tests.support.live import QEMUS, best_accel, booted, builds

pytestmark = pytest.mark.qemu

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "docs" / "examples" / "glib_program.py"
SECONDS = 2.0


async def output_of(loop: Integration, target: str) -> dict[str, float]:
    process = await asyncio.create_subprocess_exec(
        *("dbus-run-session", "--", sys.executable, str(PROGRAM), target),
        *("--seconds", str(SECONDS), "--loop", loop),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        async with asyncio.timeout(patience(30.0)):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    found: dict[str, float] = json.loads(out)
    return found


@builds(QEMUS[-1:])
@pytest.mark.asyncio
async def test_everything_in_a_glib_program_proceeds(build: QemuBuild) -> None:
    if shutil.which("dbus-run-session") is None:
        pytest.skip("dbus-run-session is not installed (Debian packages dbus-bin, dbus-daemon)")
    loops = glib_loop.integrations()
    if len(loops) < len(Integration):
        pytest.skip("PyGObject 3.50 and asyncio-glib are not installed (extra glib)")
    async with booted(build, best_accel(build)) as vm:
        toggling = asyncio.create_task(vm.toggle(100_000, 20))
        for loop in loops:
            did = await output_of(loop, vm.target)
            assert did["calls"] >= 2, did
            assert did["subprocesses"] == did["signals"] == did["calls"] == did["round_trips"], did
            assert did["ticks"] >= 5, did
            assert did["transitions"] >= 10, did
        toggling.cancel()
