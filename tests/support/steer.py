"""Guests whose QEMU the interposer is in from the start, and a KVM that refuses."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

from qmp_memlistener.records import Mode
from qmp_memlistener.steer import OBJECT
from qmp_memlistener.steer.channel import number_of

__all__ = ["Faults", "build_shared", "build_writer", "preloaded"]

_SUPPORT = Path(__file__).parent


def build_shared(source: Path, directory: Path, *options: str) -> Path:
    """A shared object."""
    built = directory / f"{source.stem}.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run(
        [
            *(compiler, "-O1", "-fPIC", "-shared", "-ftls-model=initial-exec", *options),
            *("-o", str(built), str(source)),
        ],
        check=True,
    )
    return built


def build_writer(directory: Path, memory: int) -> Path:
    """The BIOS of a guest that writes all its RAM while it toggles PAM (steer_writer.S)."""
    built = directory / "writer.o"
    image = directory / "writer.bin"
    compiler = os.environ.get("CC", "cc")
    source = _SUPPORT / "steer_writer.S"
    options = ("-m32", "-c", f"-DEND={memory:#x}", "-o", built, source)
    subprocess.run([compiler, *options], check=True)
    linker = ("ld", "-m", "elf_i386", "--oformat", "binary", "-Ttext", "0xffff0000", "-e", "start")
    subprocess.run([*linker, "-o", image, built], check=True)
    return image


def preloaded(mode: Mode, *before: Path, interposer: Path = OBJECT) -> dict[str, str]:
    """The environment of a QEMU as `run` makes it."""
    return {
        "LD_PRELOAD": ":".join(map(str, (*before, interposer))),
        "QMP_MEMLISTENER_STEER": str(number_of(mode)),
    }


class Faults:
    """What is preloaded before the interposer (steer_faults.c)."""

    def __init__(self, directory: Path, *, without: int = 0) -> None:
        self.object = build_shared(_SUPPORT / "steer_faults.c", directory)
        self._file = directory / "faults"
        self._file.write_bytes(struct.pack("<II", 0, without))
        self.env = {"STEER_FAULTS": str(self._file)}

    def refuse(self, nth: int = 1) -> None:
        """The nth add from now."""
        with self._file.open("r+b") as file:
            file.write(struct.pack("<I", nth))

    @property
    def refused(self) -> bool:
        """It has come to that."""
        return self._file.read_bytes()[:4] == bytes(4)
