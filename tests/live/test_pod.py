"""A QEMU in mount, process and network namespaces of its own, as in a pod, watched from outside."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmp_memlistener import attach
from qmp_memlistener.guests import HOST_BRIDGE, I440FX, PAM_RAM, Pulse, QemuBuild, boot_args
from qmp_memlistener.guests.launch import sized_file
from qmp_memlistener.memslots import Rules
from qmp_memlistener.qmp import Guest, Manager, find_guest
from tests.support.host import patience
from tests.support.live import NO_QEMU, QEMUS, Seen, best_accel

NAMESPACES = (
    *("unshare", "--mount", "--propagation", "private", "--pid", "--net"),
    *("--fork", "--kill-child", "--mount-proc"),
)


def can_make_a_pod() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run((*NAMESPACES, "true"), check=False, capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not QEMUS, reason=NO_QEMU),
    pytest.mark.skipif(
        not can_make_a_pod(), reason="unshare(1) may not make namespaces here: root"
    ),
    pytest.mark.asyncio,
]

MEMORY = 64 << 20


@asynccontextmanager
async def pod(build: QemuBuild, directory: Path, ram: Path) -> AsyncIterator[Guest]:
    """A pulse guest whose sockets and binary are in a file system that only it sees."""
    hidden = directory / "run"
    hidden.mkdir()
    backend = f"memory-backend-file,id=pc.ram,share=on,mem-path={ram},size={MEMORY}"
    process = await asyncio.create_subprocess_exec(
        *NAMESPACES,
        *("sh", "-c", f'mount -t tmpfs tmpfs {hidden} && cp "$0" {hidden}/qemu && exec "$@"'),
        *(
            build.binary,
            f"{hidden}/qemu",
            *build.args,
            "-nodefaults",
            "-display",
            "none",
            "-object",
            backend,
        ),
        *("-machine", "pc,memory-backend=pc.ram", "-accel", best_accel(build), "-m", "64"),
        *("-qmp", f"unix:{hidden}/a,server=on,wait=off"),
        *("-qmp", f"unix:{hidden}/b,server=on,wait=off", *boot_args()),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, **build.env},
    )
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        async with asyncio.timeout(patience(20)):
            while True:
                (pid, *_) = (*map(int, await asyncio.to_thread(read_words, children)), 0)
                guest = await asyncio.to_thread(find_guest, pid) if pid else None
                if guest is not None and len(guest.free_targets()) == 2:
                    break
                await asyncio.sleep(0.05)
        yield guest
    finally:
        process.kill()
        await process.wait()


def read_words(path: Path) -> list[str]:
    return path.read_text().split()


async def test_a_guest_in_a_pod_is_found_and_followed(tmp_path: Path) -> None:
    build = QEMUS[-1]
    with sized_file(tmp_path, ".ram", MEMORY) as ram:
        async with pod(build, tmp_path, ram) as guest:
            assert [(o.manager, o.name) for o in guest.owners] == [(Manager.CONTAINER, "")]
            assert not (tmp_path / "run/a").exists()
            assert not (tmp_path / "run/qemu").exists()
            assert guest.version == build.version
            assert not guest.process.shares_network()
            assert {str(t) for t in guest.free_targets()} == {
                f"unix:/proc/{guest.pid}/root{tmp_path}/run/{name}" for name in "ab"
            }
            seen = Seen()
            async with attach(f"pid:{guest.pid}", probes=(), on_record=seen) as agent:
                assert agent.source == "trace", agent.remarks
                assert agent.header.pid == guest.pid
                assert agent.rules.queued == Rules.parse(build.version, 4096).queued
                with Pulse(ram) as pulse:
                    await pulse.wait_ready()
                    toggle = await pulse.toggle(HOST_BRIDGE, I440FX.pam, (PAM_RAM << 4, 0), 20)
                    assert await toggle.wait() == 20
                await agent.settle()
                assert sum(t.merged for t in seen.transitions) == 20
            assert agent.unrestored == []
            assert guest.process.is_alive()
