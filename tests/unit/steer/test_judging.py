"""What cannot be steered is refused from what /proc and its program say, before it is touched."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmp_memlistener.errors import MissingPrerequisite
from qmp_memlistener.host.processes import Process
from qmp_memlistener.qmp.connection import QemuVersion
from qmp_memlistener.steer import OBJECT, Mode, judge
from tests.support.host import patience

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the interposer is for x86-64"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
    pytest.mark.skipif(not OBJECT.exists(), reason="not built: needs a C compiler"),
]
OLD, NEW = QemuVersion(7, 2, 22), QemuVersion(8, 0, 0)
_EXPORTS = "int qemu_mutex_iothread_locked(void) { return 0; }\n"
_WITH_LIBC = _EXPORTS + "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n"
_WITHOUT = _EXPORTS + 'void _start(void) { for (;;) __asm__ volatile("syscall" :: "a"(34)); }\n'


@contextmanager
def running(directory: Path, source: str, *options: str, compiler: str = "cc") -> Iterator[Process]:
    """A program that waits for ever."""
    (directory / "program.c").write_text(source)
    program = directory / "program"
    subprocess.run([compiler, *options, "-o", program, directory / "program.c"], check=True)
    with subprocess.Popen([program]) as started:
        try:
            yield _waiting(started.pid)
        finally:
            started.kill()


def _waiting(pid: int) -> Process:
    """It has come to its pause(2), and so has all that it loads."""
    deadline = patience(20)
    while not Path(f"/proc/{pid}/syscall").read_text().startswith("34 "):
        deadline -= 0.01
        assert deadline > 0
        subprocess.run(["sleep", "0.01"], check=True)
    process = Process.read(pid)
    assert process is not None
    return process


def why_not(process: Process, version: QemuVersion = OLD, wanted: Mode = Mode.HOLE) -> str:
    with pytest.raises(MissingPrerequisite) as refused:
        judge(process, version, kvm=True, wanted=wanted)
    return refused.value.message


def test_a_program_that_exports_what_is_needed_is_not_refused(tmp_path: Path) -> None:
    """The control of those below."""
    with running(tmp_path, _WITH_LIBC, "-rdynamic") as process:
        judge(process, OLD, kvm=True, wanted=Mode.HOLE)


def test_a_static_program(tmp_path: Path) -> None:
    with running(tmp_path, _WITH_LIBC, "-static", "-rdynamic") as process:
        assert "no dynamic symbols" in why_not(process)


def test_a_program_without_exports(tmp_path: Path) -> None:
    with running(tmp_path, _WITH_LIBC) as process:
        assert "exports none of the functions" in why_not(process)


def test_a_program_without_glibc(tmp_path: Path) -> None:
    """As one for musl: it exports its functions, and no libc.so.6 is mapped."""
    options = ("-nostdlib", "-pie", "-fPIE", "-Wl,-E")
    with running(tmp_path, _WITHOUT, *options) as process:
        assert "does not use glibc" in why_not(process)


@pytest.mark.skipif(shutil.which("musl-gcc") is None, reason="needs musl-gcc (Debian: musl-tools)")
def test_a_program_for_musl(tmp_path: Path) -> None:
    with running(tmp_path, _WITH_LIBC, "-rdynamic", compiler="musl-gcc") as process:
        assert "does not use glibc" in why_not(process)


@pytest.mark.parametrize("wanted", [Mode.PAUSE, Mode.INHIBIT])
def test_a_qemu_that_keeps_vcpus_out_by_itself(wanted: Mode, tmp_path: Path) -> None:
    with running(tmp_path, _WITH_LIBC, "-rdynamic") as process:
        assert "keeps vCPUs out of KVM itself" in why_not(process, NEW, wanted)
        for other in (Mode.OBSERVE, Mode.HOLE):
            judge(process, NEW, kvm=True, wanted=other)
