"""The SVM guest under TCG: a program runs on its /dev/kvm, and all that it leaves is brought out.

Only image and transport are looked at here; what the lab finds in it is the lab's tests' business.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import tempfile
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path

import pytest

from qmp_memlistener.errors import MissingPrerequisite, OperationFailed
from qmp_memlistener.guests import QemuBuild
from tests.support import svm
from tests.support.live import NO_QEMU, QEMUS
from tests.support.svm import SvmImage, SvmResult, run_in_svm, run_python_in_svm

pytestmark = [pytest.mark.qemu, pytest.mark.full, pytest.mark.asyncio, pytest.mark.timeout(400)]

LABELS = ("6.1", "6.12")
# Every kernel on the oldest QEMU, and the newer kernel on every QEMU: a boot takes its time.
CASES = [*((label, QEMUS[0]) for label in LABELS if QEMUS), *(("6.12", b) for b in QEMUS[1:])]

# A vCPU that comes out of reset reads memory that the host has closed, through a slot that is
# there.  On AMD hardware KVM_RUN then fails with EFAULT (14) and names no exit reason; when the
# memory is open again the same instruction succeeds and the vCPU halts (KVM_EXIT_HLT, 5).
HOLE = """
import ctypes, fcntl, json, mmap, os, struct
libc = ctypes.CDLL(None)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, 0xAE01, 0)
ram = mmap.mmap(-1, 0x10000, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
hva = ctypes.addressof(ctypes.c_char.from_buffer(ram))
ram[0xFFF0:0xFFF5] = bytes.fromhex("2ea00080f4")  # mov al, cs:[0x8000]; hlt
fcntl.ioctl(vm, 0x4020AE46, struct.pack("<IIQQQ", 0, 0, 0xFFFF0000, 0x10000, hva))
vcpu = fcntl.ioctl(vm, 0xAE41, 0)
run = mmap.mmap(vcpu, fcntl.ioctl(kvm, 0xAE04))

def enter():
    run[8:12] = bytes(4)
    try:
        return [fcntl.ioctl(vcpu, 0xAE80, 0), run[8]]
    except OSError as exc:
        return [-exc.errno, run[8]]

libc.mprotect(hva + 0x8000, 0x1000, 0)
closed = enter()
libc.mprotect(hva + 0x8000, 0x1000, 3)
print(json.dumps([os.uname().release, closed, enter()]))
"""

# What is written, in parts and in one piece, and how the process ends.
LOUD = """
import os, signal, sys
import msgspec, qmp_memlistener.memslots, qmp_memlistener.topology
assert sys.stdin.read() == ""
assert sys.argv[1:] == ["a  b", "$HOME", "", "'"], sys.argv
for n in range(20_000):
    print(n)
sys.stdout.flush()
os.write(2, "trouble: \\u00e9\\n".encode())
print("x" * 1_000_000, end="", flush=True)
with open("/dev/kmsg", "w") as log:
    log.write("<1>a warning\\n")
os.kill(os.getpid(), signal.SIGTERM)
"""


def image(label: str) -> SvmImage:
    """The image, if it was built; it is not built here, because that takes the network."""
    try:
        return SvmImage.find(label)
    except MissingPrerequisite as exc:
        pytest.skip(f"{exc.message}; {exc.remedy}")


def oldest() -> QemuBuild:
    if not QEMUS:
        pytest.skip(NO_QEMU)
    return QEMUS[0]


def qemus(place: Path) -> list[str]:
    """QEMUs of this process that have files in `place`."""
    children = Path("/proc/self/task").glob("*/children")
    pids = {pid for path in children for pid in path.read_text().split()}
    return [pid for pid in pids if os.fsencode(place) in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the guests of a test have their files; none may be left, and no QEMU."""
    with tempfile.TemporaryDirectory(prefix="svm-", dir="/tmp") as name:
        monkeypatch.setattr(svm, "_FILES", name)
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)
        assert os.listdir(name) == []
        assert qemus(Path(name)) == []


async def failing(run: Awaitable[SvmResult]) -> str:
    """The message of a run that fails."""
    with pytest.raises(OperationFailed) as caught:
        await run
    return caught.value.message


@pytest.mark.parametrize(
    ("label", "build"), CASES, ids=[f"{label}-{build.version}" for label, build in CASES]
)
async def test_kvm_in_the_guest_is_that_of_amd_hardware(label: str, build: QemuBuild) -> None:
    found = image(label)
    result = await run_python_in_svm(found, ("-c", HOLE), build)
    assert (result.exit_code, result.stderr, result.console) == (0, "", "")
    assert json.loads(result.stdout) == [found.release, [-14, 0], [0, 5]]
    assert result.kernel == found.release


async def test_everything_comes_out_and_in() -> None:
    result = await run_python_in_svm(image("6.1"), ("-c", LOUD, "a  b", "$HOME", "", "'"), oldest())
    assert result.stderr == "trouble: \u00e9\n"
    assert result.stdout == "".join(f"{n}\n" for n in range(20_000)) + "x" * 1_000_000
    assert result.exit_code == 128 + 15
    assert "a warning" in result.console


async def test_a_program_that_fails_is_a_result_and_one_that_hangs_is_not() -> None:
    found, build = image("6.1"), oldest()
    began = time.monotonic()
    result = await run_python_in_svm(found, ("-c", "import no_such_thing"), build)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "ModuleNotFoundError: No module named 'no_such_thing'" in result.stderr

    seconds = 5 + 2 * (time.monotonic() - began)
    program = "import os, signal; os.write(2, b'so far'); signal.pause()"
    began = time.monotonic()
    said = await failing(run_python_in_svm(found, ("-c", program), build, timeout=seconds))
    assert "the SVM guest 6.1 was up, but its program did not end within" in said
    assert said.endswith("on its standard error: so far")
    assert time.monotonic() - began < seconds + 20


async def test_a_guest_that_is_not_up_in_time() -> None:
    run = run_in_svm(image("6.1"), ["race"], oldest(), timeout=2.0)
    assert await failing(run) == "the SVM guest 6.1 was not up within 2 s"


async def test_a_kernel_panic() -> None:
    program = "open('/proc/sysrq-trigger', 'w').write('c')"
    said = await failing(run_python_in_svm(image("6.12"), ("-c", program), oldest()))
    assert said.startswith("the SVM guest 6.12 had a kernel panic; on its console: ")
    assert "not syncing: sysrq triggered crash" in said


async def test_a_cpu_without_svm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svm, "_CPU", "qemu64,-svm,-cx16")
    said = await failing(run_python_in_svm(image("6.1"), ("-c", ""), oldest()))
    why = "insmod: can't insert '/lib/modules/kvm_amd.ko'"
    assert f"the SVM guest 6.1 cannot run it: no /dev/kvm: {why}" in said
    assert re.search(r"on its console: .*svm not available", said)


async def test_a_qemu_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svm, "_CPU", "no-such-cpu")
    assert "no-such-cpu" in await failing(run_python_in_svm(image("6.1"), ("-c", ""), oldest()))


async def test_cancelled(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = asyncio.Event()
    outcome = svm._Status.outcome

    async def told(status: svm._Status) -> int | str:
        launched.set()
        return await outcome(status)

    monkeypatch.setattr(svm._Status, "outcome", told)
    run = asyncio.create_task(run_python_in_svm(image("6.1"), ("-c", ""), oldest()))
    async with asyncio.timeout(60):
        await launched.wait()
    assert len(qemus(place)) == 1
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run


async def test_no_qemu(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    found = image("6.1")
    for name in ("PATH", "QMP_MEMLISTENER_QEMUS"):
        monkeypatch.setenv(name, str(place))
    with pytest.raises(MissingPrerequisite, match="no qemu-system-x86_64 is installed"):
        await run_python_in_svm(found, ("-c", ""))
