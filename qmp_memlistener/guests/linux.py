"""A small Linux guest for hotplug: its image, booting it, and what it sees.

The image (vm-images/linux: kernel, initramfs, agent, pulse program) is built by a script there and
kept in the user's cache.  `boot_linux` starts it with `launch`; monitors stay free for the caller.
The console's protocol is in `linux_console`, the parsers of what the guest prints in `linux_views`.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from ..errors import DeadlineExceeded, OperationFailed
from ..host.bounded import in_thread
from . import layout, linux_views
from .launch import Guest, GuestSpec, launch, sized_file
from .linux_console import Console, Outcome
from .linux_images import Description, Images
from .linux_views import BlockDevice, MemoryBlocks, NetDevice, PciDevice
from .qemus import KvmProbe, QemuBuild, kvm_usable

__all__ = ["LinuxGuest", "LinuxImage", "LinuxSpec", "boot_linux", "linux_kvm_usable"]

BOOT_TIMEOUT = 90.0
DEFAULT_LABEL = "6.1"

_IMAGES = Images("linux", "Linux guest", "QMP_MEMLISTENER_LINUX")
_POLL = 0.1  # seconds between two looks of the guest at itself; each look costs it some forks
_KERNEL_ARGS = (
    "console=ttyS0",
    "loglevel=4",
    "panic=-1",
    "preempt=full",
    "memhp_default_state=online_movable",
)
# QEMU 7.2's cmpxchg16b leaves garbage in EFLAGS: its helper computes them from a cc_op that was not
# stored (case 0x1c7 in target/i386/tcg/translate.c), and an interrupt right after it saves them.
# Linux 6.12 dies of that at boot or soon after.  Without cx16 Linux does not use the instruction.
_TCG_CPU = "qemu64,-cx16"

T = TypeVar("T")


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

    `machine` is `pc` or `q35`, options included; NVDIMMs are enabled on both.  There is room for
    `slots` DIMMs and NVDIMMs and for `hotplug_memory` in them and in virtio-mem together.  On q35
    there are `ports` empty root ports `rp0`, `rp1`, …, each with `port_options`; without any, the
    firmware gives a port a window too small for a device with a BAR above 1 MiB, and Linux finds no
    room for it.  On pc devices go to `pci.0`.  `virtio_mem`, when not 0, is the size of
    a virtio-mem device `vmem0`, of which the guest has nothing at first.  The pulse program
    starts with `pulse_us` microseconds between two beats, or not at all when that is None; its
    memory is an ivshmem-plain device `pulse0` in any case.  Of what the caller adds, `args`
    are options of QEMU and `kernel_args` of the kernel.
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


@dataclass(frozen=True, slots=True)
class LinuxGuest:
    """A running Linux guest; paths are valid until the `boot_linux` block is left.

    `guest` has the process and the free monitors.  `page` is the memory that the pulse program
    writes, for `Pulse(page)`.  Methods that ask the guest raise what `run` raises, and
    OperationFailed when its command fails.
    """

    spec: LinuxSpec
    image: LinuxImage
    guest: Guest
    page: Path
    console: Console
    log_path: Path

    async def wait_booted(self, boots: int = 1, timeout: float = BOOT_TIMEOUT) -> None:
        """Until the guest has come up `boots` times since QEMU started: 2 after one reset.

        Raises DeadlineExceeded, and TargetLost when QEMU has ended.
        """
        await self.console.wait_boot(boots, timeout)

    async def run(self, command: str, timeout: float = 10.0) -> Outcome:
        """`status, text = await guest.run("cat /proc/meminfo")`; a shell runs it, as root.

        Standard error is part of the text.  Raises DeadlineExceeded (the command is killed after
        `timeout` seconds), OperationFailed when the guest boots meanwhile, TargetLost when QEMU
        ends.
        """
        return await self.console.run(command, timeout)

    async def check(self, command: str, timeout: float = 10.0) -> str:
        """What a command prints.  Raises OperationFailed unless its exit status is 0."""
        status, text = await self.run(command, timeout)
        if status:
            raise OperationFailed(
                f"{command!r} failed in the Linux guest ({status}): {text[-400:]}"
            )
        return text

    async def until(
        self, look: Callable[[], Awaitable[T]], true: Callable[[T], bool], timeout: float = 20.0
    ) -> T:
        """Look again and again until `true` of it, and return that.

        Raises DeadlineExceeded that tells the last look.
        """
        seen: list[T] = []
        try:
            async with asyncio.timeout(timeout):
                while True:
                    seen[:] = [await look()]
                    if true(seen[0]):
                        return seen[0]
                    await asyncio.sleep(_POLL)
        except TimeoutError:
            last = seen[0] if seen else "nothing"
            raise DeadlineExceeded(
                f"the Linux guest still sees {last} after {timeout:g} s"
            ) from None

    async def memory_total(self) -> int:
        """MemTotal in bytes."""
        return linux_views.parse_meminfo(await self.check(linux_views.MEMINFO_COMMAND))

    async def memory_blocks(self) -> MemoryBlocks:
        """Blocks of memory that are online; they change by exactly what was plugged."""
        return linux_views.parse_memory(await self.check(linux_views.MEMORY_COMMAND))

    async def pci_devices(self) -> tuple[PciDevice, ...]:
        """PCI functions with their BARs and drivers, by address."""
        return linux_views.parse_pci(await self.check(linux_views.PCI_COMMAND))

    async def net_devices(self) -> tuple[NetDevice, ...]:
        """Network interfaces but the loopback, by name."""
        return linux_views.parse_net(await self.check(linux_views.NET_COMMAND))

    async def block_devices(self) -> tuple[BlockDevice, ...]:
        """Disks and pmem devices, by name."""
        return linux_views.parse_block(await self.check(linux_views.BLOCK_COMMAND))

    async def set_workload(self, on: bool) -> None:
        """Keep every CPU and a part of the memory busy, or no longer."""
        await self.check(f"workload {'start' if on else 'stop'}")

    async def set_pulse(self, on: bool, period_us: int = 1000) -> None:
        """Let the CPUs beat, `period_us` apart (0: all the time that is left), or no longer.

        A pulse that runs goes on as it is.  `Pulse(page).wait_ready()` waits until it beats.
        """
        await self.check(f"pulse start {period_us}" if on else "pulse stop")

    def log(self) -> str:
        """What the kernel has printed on its console: warnings, mostly; `dmesg` tells the rest."""
        return self.log_path.read_text(errors="replace")


@asynccontextmanager
async def boot_linux(
    image: LinuxImage,
    spec: LinuxSpec | None = None,
    build: QemuBuild | None = None,
    *,
    timeout: float = BOOT_TIMEOUT,
    wait: bool = True,
) -> AsyncIterator[LinuxGuest]:
    """Boot a Linux guest on `build` (default: the installed QEMU); ends it when the block is left.

    The block is entered when the guest takes commands; with `wait=False` as soon as QEMU has a
    monitor, for a guest that begins stopped (`args=("-S",)`), and `wait_booted` is the caller's.
    An image without the pulse program boots as well; `image.why_no_pulse` tells.  Raises
    DeadlineExceeded with the end of the kernel's log when the guest is not up within `timeout`
    seconds, and what `launch` raises.
    """
    spec = spec or LinuxSpec()
    where = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())
    with _directory() as directory, sized_file(where, ".pulse", layout.RAM_NEEDED) as page:
        agent, log = directory / "agent", directory / "log"
        machine = GuestSpec(
            machine=f"{spec.machine},nvdimm=on",
            accel=spec.accel,
            memory=spec.memory,
            smp=spec.smp,
            monitors=spec.monitors,
            args=tuple(_arguments(image, spec, agent, log, page)),
        )
        if build is not None:
            machine = machine.on(build)
        async with Console(agent) as console, launch(machine) as guest:
            linux = LinuxGuest(spec, image, guest, page, console, log)
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
    image: LinuxImage, spec: LinuxSpec, agent: Path, log: Path, page: Path
) -> Iterator[str]:
    pulse = () if spec.pulse_us is None else (f"guest.pulse={spec.pulse_us}",)
    yield from ("-kernel", str(image.kernel), "-initrd", str(image.initramfs))
    yield from ("-append", " ".join((*_KERNEL_ARGS, *pulse, *spec.kernel_args)))
    if spec.slots:
        most = spec.memory + spec.hotplug_memory
        yield from ("-m", f"slots={spec.slots},maxmem={most}B")
    # The first serial port is the kernel's, the second one the agent's.
    yield from ("-chardev", f"file,id=log,path={_quoted(log)}", "-serial", "chardev:log")
    yield from ("-chardev", f"socket,id=agent,path={_quoted(agent)}", "-serial", "chardev:agent")
    backend = f"memory-backend-file,id=pulse,share=on,mem-path={_quoted(page)}"
    yield from ("-object", f"{backend},size={layout.RAM_NEEDED}")
    yield from ("-device", "ivshmem-plain,memdev=pulse,id=pulse0")
    if spec.virtio_mem:
        yield from ("-object", f"memory-backend-ram,id=vmem0-ram,size={spec.virtio_mem}")
        yield from ("-device", "virtio-mem-pci,id=vmem0,memdev=vmem0-ram,requested-size=0")
    if spec.machine.startswith("q35"):
        options = f",{spec.port_options}" if spec.port_options else ""
        for n in range(spec.ports):
            yield from ("-device", f"pcie-root-port,id=rp{n},chassis={n + 1}{options}")
    if spec.accel.startswith("tcg"):
        yield from ("-cpu", _TCG_CPU)
    yield from spec.args


def _quoted(path: Path) -> str:
    """A comma in an option's value is written twice."""
    return str(path).replace(",", ",,")


@contextmanager
def _directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="qmp-memlistener-", dir="/tmp") as name:
        yield Path(name)


async def linux_kvm_usable(
    image: LinuxImage, build: QemuBuild | None = None, *, timeout: float = 10.0
) -> KvmProbe:
    """Whether the guest boots under KVM within `timeout` seconds: by booting it.

    That KVM works is not enough: where it has no hardware to use it runs kernels in an emulator,
    and a boot takes longer than anybody waits.
    """
    basic = await in_thread(kvm_usable, build or "qemu-system-x86_64")
    if not basic:
        return basic
    spec = LinuxSpec(accel="kvm", pulse_us=None, monitors=1)
    try:
        async with boot_linux(image, spec, build, timeout=timeout):
            return KvmProbe(True)
    except DeadlineExceeded:
        return KvmProbe(False, f"Linux does not boot under KVM within {timeout:g} s here")
    except OperationFailed as exc:
        return KvmProbe(False, exc.message)
