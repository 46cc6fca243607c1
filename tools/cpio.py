"""Archives in the format that Linux unpacks as its initramfs.

Only writing, from bytes to bytes.  A kernel takes several archives one after the other, so a second
one adds files to the first; each is a multiple of 4 bytes long, which is what the next one needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

__all__ = ["Entry", "cpio", "directories"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the initramfs.

    `name` is its path without the leading slash, `mode` as stat(2) has it, type included; `device`
    is a character device's major and minor number.
    """

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directories(names: Iterable[str]) -> Iterable[Entry]:
    """The directories in which these files lie, each after the one it is in."""
    parents = {str(p) for name in names for p in PurePosixPath(name).parents} - {"."}
    return (Entry(name, 0o40755) for name in sorted(parents))


def cpio(entries: Iterable[Entry]) -> bytes:
    """The entries as one archive, in the newc format.

    Everything belongs to root and was changed at the beginning of time.  The format is Linux'
    Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    out = bytearray()
    for number, e in enumerate([*entries, Entry("TRAILER!!!", 0)], start=1):
        name = e.name.encode() + b"\0"
        fields = (number, e.mode, 0, 0, 1, 0, len(e.data), 0, 0, *e.device, len(name), 0)
        out += b"070701" + b"".join(b"%08X" % f for f in fields) + name
        out += bytes(-len(out) % 4) + e.data
        out += bytes(-len(out) % 4)
    return bytes(out)
