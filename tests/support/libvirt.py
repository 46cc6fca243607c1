"""A libvirtd of a test's own, and domains that run the pulse guest.

libvirtd sees directories of the test in place of its own, in a mount namespace; nothing of the
host's libvirt is touched.  What it finds out of QEMU, by starting some, is kept between tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qmp_memlistener.guests.pulse import find_image
from tests.support.bare_qemu import NEW_MOUNTS, can_unshare
from tests.support.host import patience

__all__ = [
    "ACCEL",
    "EMULATOR",
    "REAPING",
    "Libvirtd",
    "domain_xml",
    "embedded",
    "libvirtd",
    "needs_libvirt",
]

EMULATOR = "/usr/bin/qemu-system-x86_64"
ACCEL = "kvm" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "qemu"
_LIBVIRTD = "/usr/sbin/libvirtd"
_CAPABILITIES = Path.home() / ".cache/qmp-memlistener/libvirt-capabilities"
REAPING = Path(__file__).with_name("reaping.py")
_OWN = {"lib": "/var/lib/libvirt", "log": "/var/log/libvirt", "cache": "/var/cache/libvirt"}

_QEMU_CONF = """\
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"""


def why_no_libvirt() -> str:
    """Why these tests are skipped; empty when they are not."""
    if importlib.util.find_spec("libvirt") is None:
        return "libvirt-python is missing: pip install '.[libvirt]' (it needs libvirt-dev)"
    if not Path(_LIBVIRTD).exists() or shutil.which("virsh") is None:
        return "libvirt is missing: Debian's libvirt-daemon-system and libvirt-clients"
    if os.geteuid() != 0 or not can_unshare():
        return "libvirtd is started by root, in a mount namespace (CAP_SYS_ADMIN)"
    if not Path(EMULATOR).exists():
        return f"{EMULATOR} is missing: Debian's qemu-system-x86"
    return ""


needs_libvirt = pytest.mark.skipif(bool(why_no_libvirt()), reason=why_no_libvirt() or "none")


def domain_xml(name: str, *devices: str, accel: str = "kvm") -> str:
    """A domain that boots the pulse guest in place of a firmware."""
    return f"""<domain type='{accel if accel == "kvm" else "qemu"}'><name>{name}</name>
<maxMemory slots='4' unit='MiB'>1024</maxMemory><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>
<os><type arch='x86_64' machine='pc'>hvm</type><loader type='rom'>{find_image()}</loader></os>
<cpu><numa><cell id='0' cpus='0' memory='64' unit='MiB' memAccess='shared'/></numa></cpu>
<features><acpi/></features><devices><emulator>{EMULATOR}</emulator>
<controller type='usb' model='none'/><memballoon model='none'/>{"".join(devices)}
</devices></domain>"""


@dataclass(frozen=True, slots=True)
class Libvirtd:
    """One that runs.  `directory` holds its socket, its state and its guests' RAM."""

    directory: Path
    process: subprocess.Popen[bytes]

    @property
    def uri(self) -> str:
        return f"qemu:///system?socket={self.directory}/libvirt-sock"

    def target(self, domain: str) -> str:
        return f"libvirt:{domain}?connect={self.uri}"

    def virsh(self, *args: str) -> str:
        done = subprocess.run(
            ["virsh", "-q", "-c", self.uri, *args],
            capture_output=True,
            text=True,
            check=True,
            timeout=patience(60),
        )
        return done.stdout.strip()

    def create(self, xml: str) -> None:
        """Start a domain."""
        path = self.directory / "domain.xml"
        path.write_text(xml)
        self.virsh("create", str(path))

    def pid(self) -> int:
        """Of libvirtd itself."""
        return int((self.directory / "pid").read_text())

    def qemu_pid(self, domain: str) -> int:
        return int((self.directory / f"run/qemu/{domain}.pid").read_text())

    def ram(self, domain: str) -> Path:
        """The file of the guest's RAM."""
        argv = Path(f"/proc/{self.qemu_pid(domain)}/cmdline").read_text().split("\0")
        return next(
            self.directory / "lib" / a.split('"mem-path":"/var/lib/libvirt/')[1].split('"')[0]
            for a in argv
            if '"mem-path":"' in a
        )

    async def restart(self) -> None:
        """Kill it; another one takes its place."""
        old = self.pid()
        os.kill(old, signal.SIGKILL)
        async with asyncio.timeout(patience(30)):
            while not await asyncio.to_thread(self._is_up, old):  # noqa: ASYNC110 (has no events)
                await asyncio.sleep(0.05)

    def _is_up(self, old: int) -> bool:
        done = subprocess.run(["virsh", "-q", "-c", self.uri, "list"], capture_output=True)
        return done.returncode == 0 and self.pid() != old


@contextlib.contextmanager
def libvirtd(*, log_daemon: bool = False) -> Iterator[Libvirtd]:
    """A libvirtd; its domains end with it when the block is left.

    With `log_daemon` QEMU's messages go to virtlogd over a pipe, as Debian has it.
    """
    with _directory() as directory:
        for name in ("etc", "run", *_OWN):
            (directory / name).mkdir()
        _keep(_CAPABILITIES, directory / "cache/qemu/capabilities")
        handler = "logd" if log_daemon else "file"
        (directory / "etc/qemu.conf").write_text(_QEMU_CONF.replace('"file"', f'"{handler}"'))
        (directory / "etc/libvirtd.conf").write_text(
            f'unix_sock_dir = "{directory}"\nauth_unix_rw = "none"\n'
            f'log_outputs = "3:file:{directory}/libvirtd.log"\n'
        )
        mounts = [f"mount --bind {directory}/{name} {path}" for name, path in _OWN.items()]
        script = " && ".join(
            (
                "mount -t tmpfs tmpfs /run && mkdir /run/libvirt",
                f"mount --bind {directory}/run /run/libvirt",
                f"mount --bind {directory}/etc /etc/libvirt",
                *mounts,
            )
        )
        script += "; virtlogd -d" if log_daemon else ""
        script += f"; while :; do {_LIBVIRTD} -p {directory}/pid; done"
        with open(directory / "out", "wb") as out:
            process = subprocess.Popen(
                [*NEW_MOUNTS, sys.executable, str(REAPING), "sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        daemon = Libvirtd(directory, process)
        try:
            _wait_up(daemon)
            yield daemon
            _keep(directory / "cache/qemu/capabilities", _CAPABILITIES)
        finally:
            process.terminate()
            process.wait(patience(30))


def _wait_up(daemon: Libvirtd) -> None:
    connect = ["virsh", "-q", "-c", daemon.uri, "list"]
    for _ in range(int(patience(300))):
        if subprocess.run(connect, capture_output=True).returncode == 0:
            return
        try:
            daemon.process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
        break
    raise AssertionError((daemon.directory / "out").read_text())


@contextlib.contextmanager
def embedded() -> Iterator[tuple[Path, Any]]:
    """A directory for libvirt's driver in this process, and a connection to it.

    To be used in a process below `reaping`.
    """
    with _directory() as root:
        (root / "etc").mkdir()
        (root / "etc/qemu.conf").write_text(_QEMU_CONF)
        _keep(_CAPABILITIES, root / "cache/qemu/capabilities")
        from qmp_memlistener.qmp.libvirt_session import load

        api, _ = load()
        connection = api.open(f"qemu:///embed?root={root}")
        try:
            yield root, connection
        finally:
            for domain in connection.listAllDomains():
                domain.destroy()
            connection.close()


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="lv", dir="/tmp"))  # sockets' names are short
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _keep(what: Path, where: Path) -> None:
    if what.is_dir():
        shutil.copytree(what, where, dirs_exist_ok=True)
