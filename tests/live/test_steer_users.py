"""Steering by QEMU's own user, who is not root: where Yama allows it, and where it does not."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmp_memlistener.host.processes import Process
from qmp_memlistener.steer import state_of
from tests.support.bare_qemu import NEW_MOUNTS, can_unshare, running
from tests.support.host import patience
from tests.support.live import skip_without_kvm
from tests.support.steer import NEEDS, STEERED

pytestmark = [
    *NEEDS,
    pytest.mark.asyncio,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user"),
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv(1)"),
    pytest.mark.skipif(not can_unshare(), reason="unshare(1) may not make a mount namespace here"),
]
NOBODY = pwd.getpwnam("nobody")
_PYTHON = shutil.which(f"python3.{sys.version_info.minor}", path="/usr/bin") or sys.executable
"""One that others than root may read."""
AS_NOBODY = ("setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}", "--clear-groups")


@pytest.fixture
def nobodys() -> Iterator[Path]:
    """A directory of that user's, with a /dev/kvm for him and a host that has Yama."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        os.chown(directory, NOBODY.pw_uid, NOBODY.pw_gid)
        kvm = directory / "kvm"
        os.mknod(kvm, stat.S_IFCHR, os.stat("/dev/kvm").st_rdev)
        kvm.chmod(0o666)
        (directory / "sysctl/yama").mkdir(parents=True)
        (directory / "sysctl/yama/ptrace_scope").write_text("1\n")
        yield directory


def _in_mounts(script: str) -> tuple[str, ...]:
    """In a mount namespace of its own, as nobody."""
    return (*NEW_MOUNTS, "sh", "-c", f'{script} && exec "$@"', "sh", *AS_NOBODY)


async def _said(directory: Path, prefix: tuple[str, ...], *words: str) -> tuple[int, str]:
    """Exit code and what a verb of nobody's printed on both outputs."""
    verb = await asyncio.create_subprocess_exec(
        # setpriv executes with root's rights, the shell with nobody's
        *(*prefix, "sh", "-c", 'exec "$@"', "sh", _PYTHON, "-m", "qmp_memlistener", *words),
        env={
            **os.environ,
            "HOME": str(directory),
            "XDG_RUNTIME_DIR": str(directory),
            "PYTHONPATH": ":".join(p for p in sys.path if p and not p.startswith(sys.base_prefix)),
        },
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(patience(30)):
        out, _ = await verb.communicate()
    assert verb.returncode is not None
    return verb.returncode, out.decode()


async def test_its_own_user_steers_it_and_measures_it(nobodys: Path) -> None:
    skip_without_kvm(STEERED[-1], "kvm")
    if (await _said(nobodys, AS_NOBODY, "--version"))[0]:
        pytest.skip("the user nobody may not read this: needs a checkout and a Python that all can")
    prefix = _in_mounts(f"mount --bind {nobodys}/kvm /dev/kvm")
    async with running(STEERED[-1], nobodys, prefix=prefix, accel="kvm") as qemu:
        process = Process.read(qemu.pid)
        assert process is not None
        assert process.uid == NOBODY.pw_uid
        how = (f"{qemu.a}", "--strategy", "observe", "--json")
        with_yama = _in_mounts(f"mount --bind {nobodys}/sysctl /proc/sys/kernel")
        code, said = await _said(nobodys, with_yama, "steer", *how)
        assert code == 4, said
        assert "Yama" in said
        assert "ptrace_scope" in said
        assert state_of(process) is None
        code, said = await _said(nobodys, AS_NOBODY, "steer", *how)
        assert code == 0, said
        watch = (
            "watch",
            f"{qemu.a}",
            "--probes",
            "interposer",
            "--no-trace",
            "--for",
            "1s",
            "--json",
        )
        code, said = await _said(nobodys, AS_NOBODY, *watch)
        assert code == 0, said
        (summary,) = (x for x in map(json.loads, said.splitlines()) if x["type"] == "summary")
        assert [p["name"] for p in summary["probes"] if p["active"]] == ["interposer"]
        code, said = await _said(nobodys, AS_NOBODY, "steer", f"{qemu.a}", "--strategy", "off")
        assert code == 0, said
