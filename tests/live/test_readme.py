"""The library example of the README runs when it is pasted."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from qmp_memlistener.guests import QemuBuild
from tests.support.live import QEMUS, best_accel, booted, builds

pytestmark = pytest.mark.qemu

README = Path(__file__).parents[2] / "README.md"
PATH = "unix:/run/vm.qmp"
_DEADLINE = 20.0


@builds(QEMUS[-1:])
@pytest.mark.asyncio
async def test_the_library_example_prints_the_hole(build: QemuBuild) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert PATH in example
    async with booted(build, best_accel(build)) as vm:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-u", "-c", example.replace(PATH, vm.target)),
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(_DEADLINE):
                assert re.match(rb"removed 0 ranges, added \d+\n", await process.stdout.readline())
                await vm.open_pam()
                assert re.match(rb"removed [1-9]\d* ranges", await process.stdout.readline())
                await vm.close_pam()
                hole = await process.stdout.readline()
                os.kill(vm.guest.pid, signal.SIGTERM)
                rest = await process.stdout.read()
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert hole == b"pc.ram: 0xf0000+0x10000 behind pc.bios\n"
    assert vm.target.removeprefix("unix:").encode() in rest.splitlines()[-1]
