"""A guest whose /dev/kvm is that of AMD hardware: Linux with kvm-amd on a CPU that QEMU emulates.

The emulator (TCG) has SVM and nested paging, so KVM in the guest takes the paths that it takes on
real CPUs, whatever the host has.  Counts and return codes are those of hardware; times are not.
`run_in_svm` boots the guest for one run of the lab and brings out what it printed.  The image is
built by vm-images/svm; what is added to it for a run is `svm_files`' business.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import msgspec

from qmp_memlistener.errors import OperationFailed
from qmp_memlistener.guests.images import Description, Images
from qmp_memlistener.guests.launch import GuestSpec, launch
from qmp_memlistener.guests.linux import SerialPort
from qmp_memlistener.guests.qemus import QemuBuild, find_qemu
from qmp_memlistener.host.bounded import in_thread
from tests.support.svm_files import added_files

__all__ = ["SvmImage", "SvmResult", "run_in_svm", "run_python_in_svm"]

LAB = "qmp_memlistener.kvmlab"
MEMORY = 1 << 30
TIMEOUT = 180.0

_IMAGES = Images("svm", "SVM guest", "QMP_MEMLISTENER_SVM")
# With cx16 Linux 6.12 dies on QEMU 7.2 (see linux).  What TCG lacks need not be listed (check).
_CPU = "EPYC-Rome,-cx16,check=off"
_KERNEL_ARGS = (
    "console=ttyS0",
    "loglevel=4",
    "panic=-1",
    "oops=panic",
    # The other CPU is brought up by init (vm-images/svm/hold.py says why).
    "maxcpus=1",
    "noreplace-smp",
    # Half of the detours that they add are emulated one instruction at a time.
    "mitigations=off",
    # A busy host may not run the vCPU for as long as Linux waits for a tick.
    "no_timer_check",
    # The emulated TSC is the host's, and the other clocks are slow to read.
    "tsc=reliable",
)
_FILES = "/tmp"  # a short path, because there will be a socket
_PORTS = ("status", "stdout", "stderr")
_LINES_SHOWN = 8
_TROUBLE = re.compile(r"BUG: |Oops|general protection|Kernel panic")


class _Description(Description):
    """What svm.json has of its own."""

    magic: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{2})+$")]


@dataclass(frozen=True, slots=True)
class SvmImage:
    """A kernel and an initramfs.

    `label` names the kernel's series, `release` is what uname says, `version` the Debian package's.
    `magic` is what compiled files of the guest's Python begin with.
    """

    label: str
    release: str
    version: str
    kernel: Path
    initramfs: Path
    magic: bytes

    @classmethod
    def find(cls, label: str) -> Self:
        """The image as it was built last.

        Looks in `DIR/<label>/svm.json`, DIR being $QMP_MEMLISTENER_SVM or `qmp-memlistener/svm` in
        the user's cache.  Raises MissingPrerequisite when there is none and InputError for a
        description that is not one.
        """
        known = _IMAGES.find(label, _Description)
        return cls(
            known.label,
            known.release,
            known.version,
            Path(known.kernel),
            Path(known.initramfs),
            bytes.fromhex(known.magic),
        )


@dataclass(frozen=True, slots=True)
class SvmResult:
    """What a program in the guest did.

    `exit_code` is 128 + N for a program that signal N ended.  `kernel` is the guest's release;
    `console` has its kernel's warnings, and is empty when there were none.
    """

    stdout: str
    stderr: str
    exit_code: int
    kernel: str
    console: str


async def run_in_svm(
    image: SvmImage,
    argv: Sequence[str],
    build: QemuBuild | None = None,
    *,
    memory: int = MEMORY,
    timeout: float = TIMEOUT,
) -> SvmResult:
    """Run the lab with these arguments: `run_in_svm(image, ["race", "--json"])`.

    See `run_python_in_svm` for the rest.
    """
    return await run_python_in_svm(image, ("-m", LAB, *argv), build, memory=memory, timeout=timeout)


async def run_python_in_svm(
    image: SvmImage,
    arguments: Sequence[str],
    build: QemuBuild | None = None,
    *,
    memory: int = MEMORY,
    timeout: float = TIMEOUT,
) -> SvmResult:
    """Boot the guest, run `python3` with these arguments in it, as root, and end it.

    The guest has two CPUs and `memory` bytes; it runs on `build`, by default the oldest QEMU that
    is here.  Its Python knows this package and msgspec, no other.  A program that fails is a result
    like any other.  Raises MissingPrerequisite when there is no QEMU, and OperationFailed, with the
    last lines of the guest's console, when the kernel panics, /dev/kvm is not there, QEMU ends, or
    the program has not ended `timeout` seconds after the call.  The QEMU and its files are gone
    when this returns, raises or is cancelled.
    """
    if build is None:
        build = await in_thread(find_qemu)
    with tempfile.TemporaryDirectory(prefix="qmp-memlistener-", dir=_FILES) as name:
        run = _Run(image, Path(name))
        try:
            async with asyncio.timeout(timeout):
                added = await in_thread(added_files, arguments, image.magic)
                run.add(added)
                return await run.boot(build, memory)
        except TimeoutError:
            raise run.failed(run.late(timeout)) from None


class _Run:
    """One boot of the guest, with its files in `directory`."""

    def __init__(self, image: SvmImage, directory: Path) -> None:
        self._image = image
        self._directory = directory
        self._initramfs = directory / "initramfs"
        self._console = directory / "console"
        self._status = _Status(directory / "status")

    def add(self, archive: bytes) -> None:
        """Write the image's initramfs with another archive behind it."""
        shutil.copyfile(self._image.initramfs, self._initramfs)
        with self._initramfs.open("ab") as out:
            out.write(archive)

    async def boot(self, build: QemuBuild, memory: int) -> SvmResult:
        spec = GuestSpec(
            machine="pc",
            accel="tcg",
            memory=memory,
            smp=2,
            monitors=1,
            shared_memory=False,
            args=tuple(self._arguments()),
        ).on(build)
        async with self._status as status, launch(spec) as guest:
            outcome = await status.outcome()
            said = guest.stderr()
        # Only now has QEMU certainly written all that the guest gave it.
        if isinstance(outcome, str):
            raise self.failed(f"{outcome}: {said}" if said else outcome)
        return SvmResult(
            self._text("stdout"),
            self._text("stderr"),
            outcome,
            status.release,
            self._text("console"),
        )

    def _arguments(self) -> Iterator[str]:
        yield from ("-cpu", _CPU, "-no-reboot")
        yield from ("-kernel", str(self._image.kernel), "-initrd", str(self._initramfs))
        yield from ("-append", " ".join(_KERNEL_ARGS))
        yield from ("-chardev", f"file,id=console,path={self._console}")
        yield from ("-serial", "chardev:console", "-device", "virtio-serial-pci")
        for number, name in enumerate(_PORTS, start=1):
            kind = "socket" if name == "status" else "file"
            yield from ("-chardev", f"{kind},id={name},path={self._directory / name}")
            yield from ("-device", f"virtserialport,chardev={name},nr={number}")

    def _text(self, name: str) -> str:
        try:
            return (self._directory / name).read_text(errors="replace")
        except FileNotFoundError:  # QEMU has not got as far
            return ""

    def late(self, timeout: float) -> str:
        if not self._status.release:
            return f"was not up within {timeout:g} s"
        return f"was up, but its program did not end within {timeout:g} s"

    def failed(self, what: str) -> OperationFailed:
        """The error, with what was seen last, of a panic what was seen first."""
        console = _lines(self._text("console"))
        first = next((n for n, line in enumerate(console) if _TROUBLE.search(line)), None)
        if first is not None and any("Kernel panic" in line for line in console):
            what = "had a kernel panic"
            console = console[first : first + _LINES_SHOWN]
        stderr = _lines(self._text("stderr"))
        seen = [f"the SVM guest {self._image.label} {what}"]
        for name, lines in (("console", console), ("standard error", stderr)):
            if lines:
                seen.append(f"on its {name}: {' | '.join(lines[-_LINES_SHOWN:])}")
        return OperationFailed("; ".join(seen))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


class _Status(SerialPort):
    """What the guest's init tells on its first port, on a socket at `path`; a context manager.

    The lines are described in vm-images/svm/init.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.release = ""  # of the kernel; empty until the guest is up
        self._changed = asyncio.Event()
        self._outcome: int | str | None = None

    async def outcome(self) -> int | str:
        """The program's exit status, or why there is none."""
        await self._changed.wait()
        assert self._outcome is not None
        return self._outcome

    def line_received(self, line: bytes) -> None:
        word, _, rest = line.decode(errors="replace").partition(" ")
        if word == "up":
            self.release = rest
        elif word == "exit" and rest.isdecimal():
            self._settle(int(rest))
        elif word == "failed":
            self._settle(f"cannot run it: {rest}")

    def connection_lost(self, _exc: Exception | None) -> None:
        self._settle("ended before its program did" if self.release else "ended while it booted")

    def _settle(self, outcome: int | str) -> None:
        if self._outcome is None:
            self._outcome = outcome
            self._changed.set()
