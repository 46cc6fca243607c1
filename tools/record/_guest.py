"""Throw-away guests for the recorders: QEMU versions, one guest with QMP and qtest, sample files.

Plain sockets and the standard library, on purpose: what is recorded here is the yardstick of the
package, so nothing of the package takes part.  Only guests started here are ever talked to.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tools.side_by_side import cache_dir

__all__ = [
    "SAMPLES",
    "Action",
    "Guest",
    "GuestError",
    "Qemu",
    "Step",
    "config",
    "die_by_sigterm",
    "kvm_usable",
    "outb",
    "parse_arguments",
    "qtest",
    "say",
    "seabios",
    "steady",
    "write_sample",
]

SAMPLES = Path(__file__).resolve().parents[2] / "tests" / "conformance"
DEADLINE_S = 60.0
_FIRMWARE_DIR = Path("/usr/share/seabios")

# Writes "DONE" to 0x600 and halts: SeaBIOS has finished when it starts this.
_BOOT_SECTOR = bytes.fromhex("fa31c08ed866c7060006444f4e45f4ebfd").ljust(510, b"\0") + b"\x55\xaa"
# A firmware whose reset vector is cli; hlt; jmp: a running guest that does nothing.
_QUIET = bytes(0x1FFF0) + bytes.fromhex("faf4ebfd").ljust(16, b"\0")
# An option ROM is only mapped, never run.
_ROM = b"\x55\xaa\x04"


def say(text: str) -> None:
    print(text, flush=True)


def die_by_sigterm() -> None:
    """Make SIGTERM unwind this process, so that a recorder that is killed leaves no guest."""
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))


class GuestError(Exception):
    """QEMU did not start, died, or answered with an error."""


@dataclass(frozen=True, slots=True)
class Qemu:
    """One QEMU version on this machine: `label` is major.minor, `version` what it reports."""

    label: str
    version: str
    x86: str
    aarch64: str | None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] | None = None

    def help(self, what: str, arch: str = "x86_64") -> str:
        """Output of `-machine help` or `-device help`."""
        binary = self.x86 if arch == "x86_64" else self.aarch64
        if binary is None:
            return ""
        argv = [binary, f"-{what}", "help"]
        done = subprocess.run(
            argv, env={**os.environ, **(self.env or {})}, capture_output=True, text=True, check=True
        )
        return done.stdout


def find_qemus() -> list[Qemu]:
    """The installed version and those that tools/side_by_side.py unpacked, oldest first."""
    found = []
    if installed := shutil.which("qemu-system-x86_64"):
        told = subprocess.run([installed, "--version"], capture_output=True, text=True, check=True)
        m = re.search(r"version ((\d+\.\d+)[.\d]*)", told.stdout)
        if m is not None:
            found.append(Qemu(m[2], m[1], installed, shutil.which("qemu-system-aarch64")))
    for path in cache_dir().glob("*/qemu.json"):
        known = json.loads(path.read_text())
        label = ".".join(known["version"].split(".")[:2])
        args, env = tuple(known["args"]), known["env"]
        unpacked = Qemu(label, known["version"], known["binary"], known["aarch64"], args, env)
        if label not in {q.label for q in found}:
            found.append(unpacked)
    return sorted(found, key=lambda q: tuple(map(int, q.version.split("."))))


def parse_arguments(
    description: str, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[Qemu]]:
    """What both recorders are asked for, and the QEMUs to do it with."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--list", action="store_true", help="name the samples, record nothing")
    parser.add_argument("--only", metavar="GLOB", default="*", help="samples by name")
    parser.add_argument("--version", metavar="V", help="one QEMU, as major.minor")
    args = parser.parse_args(argv)
    qemus = [q for q in find_qemus() if args.version in (None, q.label)]
    if not qemus:
        parser.error("no such QEMU here; see tools/side_by_side.py")
    return args, qemus


def kvm_usable() -> bool:
    return os.access("/dev/kvm", os.R_OK | os.W_OK)


class Guest:
    """A stopped guest (`-S`) with a QMP and a qtest socket; a context manager.

    `argv` may hold `{tmp}`, the guest's own directory, which holds `boot.img` (a disk that says
    when SeaBIOS is done), `quiet.bin` (a firmware that halts), `flash0.img` (SeaBIOS as pflash),
    `flash1.img`, `flash32.img` and `flash64.img` (empty), `rom8k.bin` and `rom2k.bin` (option
    ROMs).  `events` collects QMP events in order.

    Raises GuestError from everything that talks to QEMU.
    """

    def __init__(self, qemu: Qemu, argv: Sequence[str], *, arch: str = "x86_64") -> None:
        binary = qemu.x86 if arch == "x86_64" else qemu.aarch64
        if binary is None:
            raise GuestError(f"QEMU {qemu.label} has no {arch} binary here")
        self.events: list[dict[str, object]] = []
        self.tmp = Path(tempfile.mkdtemp(prefix="qmpml-record."))
        self._qemu = qemu
        self._argv = [binary, *qemu.args, "-nodefaults", "-display", "none", "-S"]
        self._argv += ["-qmp", f"unix:{self.tmp}/qmp,server=on,wait=off"]
        self._argv += ["-qtest", f"unix:{self.tmp}/qtest,server=on,wait=off", "-qtest-log", "none"]
        self._argv += [a.replace("{tmp}", str(self.tmp)) for a in argv]
        self._process: subprocess.Popen[bytes] | None = None
        self._unread: dict[socket.socket, bytes] = {}

    def __enter__(self) -> Self:
        try:
            self._write_files()
            with (self.tmp / "stderr").open("wb") as err:
                self._process = subprocess.Popen(
                    self._argv,
                    env={**os.environ, **(self._qemu.env or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=err,
                    stderr=err,
                )
            self._qmp = self._connect("qmp")
            self._qtest = self._connect("qtest")
            self._read_qmp()
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        for s in self._unread:
            s.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.tmp, ignore_errors=True)

    def execute(self, command: str, **arguments: object) -> object:
        """Run a QMP command and return its answer."""
        ask = {"execute": command, "arguments": arguments} if arguments else {"execute": command}
        self._send(self._qmp, json.dumps(ask))
        while True:
            answer = self._read_qmp()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise GuestError(f"{command}: {answer['error']}")

    def hmp(self, line: str) -> str:
        """Run a human monitor command; the text with QEMU's CRLF made LF."""
        text = self.execute("human-monitor-command", **{"command-line": line})
        return str(text).replace("\r\n", "\n")

    def wait_event(self, name: str, **data: object) -> None:
        """Wait for an event of that name that has `data` among its data; drops those before it."""
        while True:
            while not self.events:
                self._read_qmp()
            event = self.events.pop(0)
            told = event.get("data")
            if event["event"] == name and (
                not data or (isinstance(told, dict) and data.items() <= told.items())
            ):
                return

    def qtest(self, line: str) -> str:
        """One qtest command, e.g. `outl 0xcf8 0x80000058`; the answer behind its OK."""
        self._send(self._qtest, line)
        answer = self._readline(self._qtest).split()
        if not answer or answer[0] != "OK":
            raise GuestError(f"qtest {line}: {' '.join(answer)}")
        return " ".join(answer[1:])

    def outb(self, port: int, value: int) -> None:
        self.qtest(f"outb {port:#x} {value:#x}")

    def config_write(
        self, slot: int, reg: int, value: int, width: int = 1, *, bus: int = 0, function: int = 0
    ) -> None:
        """Write a PCI config register through ports 0xcf8 and 0xcfc, as a guest does."""
        address = 0x80000000 | bus << 16 | slot << 11 | function << 8 | reg & ~3
        self.qtest(f"outl 0xcf8 {address:#x}")
        size = {1: "b", 2: "w", 4: "l"}[width]
        self.qtest(f"out{size} {0xCFC + (reg & 3):#x} {value:#x}")

    def wait_boot_sector(self) -> None:
        """Wait until SeaBIOS has started the boot sector of `boot.img`."""
        end = time.monotonic() + DEADLINE_S
        while "0x454e4f44" not in self.hmp("xp /1xw 0x600"):
            if time.monotonic() > end:
                raise GuestError(f"SeaBIOS did not boot the disk within {DEADLINE_S:.0f} s")
            time.sleep(0.1)

    def _write_files(self) -> None:
        (self.tmp / "boot.img").write_bytes(_BOOT_SECTOR.ljust(1 << 20, b"\0"))
        (self.tmp / "quiet.bin").write_bytes(_QUIET)
        (self.tmp / "rom8k.bin").write_bytes(_ROM.ljust(8192, b"\xff"))
        (self.tmp / "rom2k.bin").write_bytes(_ROM.ljust(2048, b"\xff"))
        dirs = [*map(Path, self._qemu.args[1::2]), _FIRMWARE_DIR]
        for d in dirs:
            if (d / "bios-256k.bin").exists():
                shutil.copyfile(d / "bios-256k.bin", self.tmp / "flash0.img")
                break
        (self.tmp / "flash1.img").write_bytes(bytes(0x20000))
        for mib in (32, 64):
            with (self.tmp / f"flash{mib}.img").open("wb") as sparse:
                sparse.truncate(mib << 20)

    def _connect(self, name: str) -> socket.socket:
        end = time.monotonic() + DEADLINE_S
        while True:
            s = socket.socket(socket.AF_UNIX)
            s.settimeout(DEADLINE_S)
            try:
                s.connect(str(self.tmp / name))
            except OSError as exc:
                s.close()
                if self._process is None or self._process.poll() is not None:
                    raise GuestError(self._last_words()) from exc
                if time.monotonic() > end:
                    raise GuestError(f"no {name} socket within {DEADLINE_S:.0f} s") from exc
                time.sleep(0.02)
            else:
                self._unread[s] = b""
                return s

    def _send(self, s: socket.socket, line: str) -> None:
        try:
            s.sendall(line.encode() + b"\n")
        except OSError as exc:
            raise GuestError(self._last_words()) from exc

    def _readline(self, s: socket.socket) -> str:
        while b"\n" not in self._unread[s]:
            try:
                data = s.recv(1 << 20)
            except TimeoutError as exc:
                raise GuestError(f"no answer within {DEADLINE_S:.0f} s") from exc
            except OSError as exc:
                raise GuestError(self._last_words()) from exc
            if not data:
                raise GuestError(self._last_words())
            self._unread[s] += data
        line, _, self._unread[s] = self._unread[s].partition(b"\n")
        return line.decode()

    def _read_qmp(self) -> dict[str, object]:
        """The next QMP message; events are put aside as well as returned."""
        message: dict[str, object] = json.loads(self._readline(self._qmp))
        if "event" in message:
            self.events.append(message)
        return message

    def _last_words(self) -> str:
        text = (self.tmp / "stderr").read_text(errors="replace").strip()
        return text.replace(str(self.tmp), "{tmp}") or "QEMU is gone and said nothing"


# Steps: what leads from one recorded state to the next.

Action = Callable[[Guest], None]
Step = tuple[str, Action]


def seabios(g: Guest) -> None:
    """SeaBIOS has run and started the boot sector; the guest is stopped again."""
    g.execute("cont")
    g.wait_boot_sector()
    g.execute("stop")


def config(slot: int, *writes: tuple[int, int], width: int = 1, bus: int = 0) -> Action:
    """Config writes (register, value) to function 0 of a slot."""

    def act(g: Guest) -> None:
        for reg, value in writes:
            g.config_write(slot, reg, value, width, bus=bus)

    return act


def qtest(*lines: str) -> Action:
    """qtest commands as they are."""

    def act(g: Guest) -> None:
        for line in lines:
            g.qtest(line)

    return act


def outb(*writes: tuple[int, int]) -> Action:
    """Byte writes (port, value)."""
    return qtest(*(f"outb {port:#x} {value:#x}" for port, value in writes))


def steady(read: Callable[[], str], times: int = 3, pause_s: float = 0.5) -> str:
    """Call `read` until it gave the same text `times` times in a row; that text."""
    end = time.monotonic() + DEADLINE_S
    last, same = read(), 1
    while same < times:
        if time.monotonic() > end:
            raise GuestError(f"still changing after {DEADLINE_S:.0f} s")
        time.sleep(pause_s)
        now = read()
        last, same = now, same + 1 if now == last else 1
    return last


def write_sample(path: Path, document: Mapping[str, object]) -> int:
    """Write gzip-compressed JSON with no time stamp and sorted keys; its size in bytes."""
    raw = io.BytesIO()
    with gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=9, mtime=0, filename="") as z:
        z.write(json.dumps(document, sort_keys=True, indent=1).encode())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw.getvalue())
    return len(raw.getvalue())
