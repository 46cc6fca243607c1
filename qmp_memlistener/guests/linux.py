"""A small Linux guest for hotplug: its image, and booting it.

The image (vm-images/linux: kernel, initramfs, agent, pulse program) is built by a script there and
kept in the user's cache.  `boot_linux` starts it with `launch`; monitors stay free for the caller.
"""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from ..errors import DeadlineExceeded, MissingPrerequisite, TargetError, TargetLost
from . import layout
from .images import Description, Images
from .launch import GuestSpec, LaunchedGuest, launch, sized_file
from .qemus import QemuBuild

__all__ = ["AgentPort", "LinuxGuest", "LinuxImage", "LinuxSpec", "SerialPort", "boot_linux"]

BOOT_TIMEOUT = 90.0
DEFAULT_LABEL = "6.1"

_IMAGES = Images("linux", "Linux guest", "QMP_MEMLISTENER_LINUX")
ARM64_LABEL = "6.1-arm64"

_KERNEL_ARGS = (
    "loglevel=4",
    "panic=-1",
    "preempt=full",
    "memhp_default_state=online_movable",
)
# QEMU 7.2's cmpxchg16b leaves garbage in EFLAGS: its helper computes them from a cc_op that was not
# stored (case 0x1c7 in target/i386/tcg/translate.c), and an interrupt right after it saves them.
# Linux 6.12 dies of that at boot or soon after.  Without cx16 Linux does not use the instruction.
_TCG_CPU = "qemu64,-cx16"
# the default of `virt` has 32 bits; `max` spends its time on pointer authentication
_ARM64_CPU = "cortex-a57"


class _Description(Description):
    """What linux.json has of its own."""

    pulse: bool
    why_no_pulse: str | None = None


@dataclass(frozen=True, slots=True)
class LinuxImage:
    """A kernel and an initramfs.

    `label` names the kernel's series, `release` is what uname says, `version` the Debian package's.
    `modules` are in the initramfs and loaded at boot, in this order; of those that were wanted,
    `builtin` are in the kernel itself.  `why_no_pulse` is None when the pulse program is in it.
    """

    label: str
    release: str
    version: str
    kernel: Path
    initramfs: Path
    modules: tuple[str, ...]
    builtin: tuple[str, ...]
    why_no_pulse: str | None

    @property
    def has_pulse(self) -> bool:
        return self.why_no_pulse is None

    @classmethod
    def find(cls, label: str = DEFAULT_LABEL) -> Self:
        """The image as it was built last.

        Looks in `DIR/<label>/linux.json`, DIR being $QMP_MEMLISTENER_LINUX or
        `qmp-memlistener/linux` in the user's cache.  Raises MissingPrerequisite when there is
        none and InputError for a description that is not one.
        """
        known = _IMAGES.find(label, _Description)
        why = known.why_no_pulse or "the image was built without it"
        return cls(
            known.label,
            known.release,
            known.version,
            Path(known.kernel),
            Path(known.initramfs),
            known.modules,
            known.builtin,
            None if known.pulse else why,
        )

    @classmethod
    def build(cls, label: str = DEFAULT_LABEL) -> Self:
        """The image, built first if it is not there or if something it is made of has changed.

        Blocks: for a tenth of a second when there is nothing to do, else for as long as it takes
        to download some 30 MB.  Outside a checkout it can only be found.  Raises
        MissingPrerequisite that says what is missing.
        """
        _IMAGES.build(label)
        return cls.find(label)


@dataclass(frozen=True, slots=True)
class LinuxSpec:
    """The machine of a Linux guest; sizes are bytes.

    `machine` is `pc`, `q35` or (aarch64) `virt`, options included; NVDIMMs are enabled on all.
    There is room for `slots` DIMMs and NVDIMMs and for `hotplug_memory` in them and in virtio-mem
    together.  On q35
    there are `ports` empty root ports `rp0`, `rp1`, …, each with `port_options`; without any, the
    firmware gives a port a window too small for a device with a BAR above 1 MiB, and Linux finds no
    room for it.  On pc devices go to `pci.0`.  `virt` has root ports as q35 has; without firmware
    there is no ACPI, and so no hotplug of DIMMs: memory is plugged as virtio-mem.
    `virtio_mem`, when not 0, is the size of a virtio-mem device `vmem0`, of which the guest has
    nothing at first.  The pulse program starts with `pulse_us` microseconds between two heartbeats,
    or not at all when that is None; its memory is an ivshmem-plain device `pulse0` in any case.  Of
    what the caller adds, `args` are options of QEMU and `kernel_args` of the kernel.
    """

    machine: str = "q35"
    accel: str = "tcg"
    memory: int = 512 << 20
    smp: int = 1
    monitors: int = 3
    slots: int = 8
    hotplug_memory: int = 4 << 30
    ports: int = 4
    port_options: str = "pref64-reserve=32M"
    virtio_mem: int = 0
    pulse_us: int | None = 1000
    args: tuple[str, ...] = ()
    kernel_args: tuple[str, ...] = ()

    @property
    def is_arm64(self) -> bool:
        return self.machine.split(",")[0].startswith("virt")

    @property
    def has_ports(self) -> bool:
        """Devices are plugged into root ports."""
        return self.is_arm64 or self.machine.startswith("q35")


class SerialPort(asyncio.Protocol):
    """A serial port of a guest: a context manager that listens at `path` for QEMU.

    QEMU connects when it starts, so nothing that the guest prints is lost; who connects later is
    ignored.  What the lines mean is up to the derived class.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._server: asyncio.Server | None = None
        self._transport: asyncio.Transport | None = None
        self._input = bytearray()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(
            lambda: self if self._transport is None else asyncio.Protocol(), str(self.path)
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._server is not None:
            self._server.close()
        if self._transport is not None:
            self._transport.abort()

    def line_received(self, line: bytes) -> None:
        """A whole line, without its end."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        start = len(self._input)
        self._input += data
        while (end := self._input.find(b"\n", start)) >= 0:
            line = bytes(self._input[:end])
            del self._input[: end + 1]
            start = 0
            self.line_received(line)


class AgentPort(SerialPort):
    """The serial port of the guest's agent, which says `ready` whenever the guest has come up."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.boots = 0
        """How often the guest has come up since QEMU started."""
        self._said_ready = asyncio.Event()
        self._lost: TargetError | None = None

    async def wait_boot(self, number: int = 1, timeout: float = 60.0) -> None:
        """Until the guest has come up `number` times.

        Raises DeadlineExceeded after `timeout` seconds and TargetLost when QEMU has ended.
        """
        try:
            async with asyncio.timeout(timeout):
                while self.boots < number:
                    self.check_lost()
                    self._said_ready.clear()
                    await self._said_ready.wait()
        except TimeoutError:
            raise DeadlineExceeded(
                f"the Linux guest was not up within {timeout:g} s",
                remedy="its kernel's messages are in the log; under KVM inside a VM try TCG",
            ) from None

    def check_lost(self) -> None:
        """Raises TargetLost when QEMU has ended."""
        if self._lost is not None:
            raise self._lost

    def line_received(self, line: bytes) -> None:
        if re.fullmatch(rb"\s*ready\s+\S+\s*", line):
            self.boots += 1
            self._said_ready.set()

    def connection_lost(self, exc: Exception | None) -> None:
        why = f" ({exc})" if exc is not None else ""
        self._lost = TargetLost(f"QEMU has ended, or closed the Linux guest's console{why}")
        self._said_ready.set()


@dataclass(frozen=True, slots=True)
class LinuxGuest:
    """A running Linux guest; paths are valid until the `boot_linux` block is left.

    `guest` has the process and the free monitors.  `page` is the memory that the pulse program
    writes, for `Pulse(page)`.
    """

    spec: LinuxSpec
    image: LinuxImage
    guest: LaunchedGuest
    page: Path
    agent: AgentPort
    log_path: Path

    async def wait_booted(self, boots: int = 1, timeout: float = BOOT_TIMEOUT) -> None:
        """Until the guest has come up `boots` times since QEMU started: 2 after one reset.

        Raises DeadlineExceeded, and TargetLost when QEMU has ended.
        """
        await self.agent.wait_boot(boots, timeout)

    def log(self) -> str:
        """What the kernel has printed on its console: warnings, mostly; `dmesg` has the rest."""
        return self.log_path.read_text(errors="replace")


@asynccontextmanager
async def boot_linux(
    image: LinuxImage,
    spec: LinuxSpec | None = None,
    build: QemuBuild | None = None,
    *,
    timeout: float = BOOT_TIMEOUT,
    wait: bool = True,
    port: Callable[[Path], AgentPort] = AgentPort,
) -> AsyncIterator[LinuxGuest]:
    """Boot a Linux guest on `build` (default: the installed QEMU); ends it when the block is left.

    The block is entered when the guest is up; with `wait=False` as soon as QEMU has a monitor, for
    a guest that begins stopped (`args=("-S",)`), and `wait_booted` is the caller's.  `port` makes
    the agent's serial port at a path.  An image without the pulse program boots as well;
    `image.why_no_pulse` says so.  Raises DeadlineExceeded with the end of the kernel's log when the
    guest is not up within `timeout` seconds, and what `launch` raises.
    """
    spec = spec or LinuxSpec()
    where = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())
    with _directory() as directory, sized_file(where, ".pulse", layout.RAM_NEEDED) as page:
        socket, log = directory / "agent", directory / "log"
        machine = GuestSpec(
            machine=f"{spec.machine},nvdimm=on",
            accel=spec.accel,
            memory=spec.memory,
            smp=spec.smp,
            monitors=spec.monitors,
            args=tuple(_arguments(image, spec, socket, log, page)),
        )
        if spec.is_arm64:
            machine = replace(machine, binary="qemu-system-aarch64")
        if build is not None:
            machine = machine.on(_for(spec, build))
        async with port(socket) as agent, launch(machine) as guest:
            linux = LinuxGuest(spec, image, guest, page, agent, log)
            try:
                if wait:
                    await linux.wait_booted(timeout=timeout)
            except DeadlineExceeded as exc:
                end = linux.log()[-600:].strip() or "nothing"
                raise DeadlineExceeded(
                    f"{exc.message}; its kernel said: {end}", remedy=exc.remedy
                ) from None
            yield linux


def _arguments(
    image: LinuxImage, spec: LinuxSpec, socket: Path, log: Path, page: Path
) -> Iterator[str]:
    pulse = () if spec.pulse_us is None else (f"guest.pulse={spec.pulse_us}",)
    yield from ("-kernel", str(image.kernel), "-initrd", str(image.initramfs))
    ports = ("console=ttyAMA0", "guest.agent=ttyS0") if spec.is_arm64 else ("console=ttyS0",)
    yield from ("-append", " ".join((*ports, *_KERNEL_ARGS, *pulse, *spec.kernel_args)))
    if spec.slots:
        most = spec.memory + spec.hotplug_memory
        yield from ("-m", f"slots={spec.slots},maxmem={most}B")
    # The first serial port is the kernel's, the second one the agent's.
    yield from ("-chardev", f"file,id=log,path={_quoted(log)}", "-serial", "chardev:log")
    yield from ("-chardev", f"socket,id=agent,path={_quoted(socket)}")
    # `virt` has one port; a PCI card is the second.
    second = (
        ("-device", "pci-serial,chardev=agent") if spec.is_arm64 else ("-serial", "chardev:agent")
    )
    yield from second
    backend = f"memory-backend-file,id=pulse,share=on,mem-path={_quoted(page)}"
    yield from ("-object", f"{backend},size={layout.RAM_NEEDED}")
    yield from ("-device", "ivshmem-plain,memdev=pulse,id=pulse0")
    if spec.virtio_mem:
        yield from ("-object", f"memory-backend-ram,id=vmem0-ram,size={spec.virtio_mem}")
        yield from ("-device", "virtio-mem-pci,id=vmem0,memdev=vmem0-ram,requested-size=0")
    if spec.has_ports:
        options = f",{spec.port_options}" if spec.port_options else ""
        for n in range(spec.ports):
            yield from ("-device", f"pcie-root-port,id=rp{n},chassis={n + 1}{options}")
    if spec.is_arm64:
        yield from ("-cpu", _ARM64_CPU)
    elif spec.accel.startswith("tcg"):
        yield from ("-cpu", _TCG_CPU)
    yield from spec.args


def _for(spec: LinuxSpec, build: QemuBuild) -> QemuBuild:
    """The emulator of this build for the guest's architecture.  Raises MissingPrerequisite."""
    if not spec.is_arm64:
        return build
    if build.aarch64_binary is None:
        raise MissingPrerequisite(
            f"there is no qemu-system-aarch64 {build.version}",
            remedy="install the Debian package qemu-system-arm, or run `make qemus`",
        )
    return replace(build, binary=build.aarch64_binary)


def _quoted(path: Path) -> str:
    """A comma in an option's value is written twice."""
    return str(path).replace(",", ",,")


@contextmanager
def _directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="qmp-memlistener-", dir="/tmp") as name:
        yield Path(name)
