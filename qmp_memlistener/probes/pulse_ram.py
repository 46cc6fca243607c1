"""Where a QEMU's guest RAM can be read from here, and whether a pulse guest runs in it.

Only memory that QEMU maps shared can be: `memory-backend-file`, `-memfd` or `-ram` with `share=on`,
or a file descriptor that QEMU was given.  /proc/PID/maps lists it whatever it is called, and the
same file is then opened for reading by its path, by a descriptor of QEMU's, or by its mapping.
Where the maps may not be read (another user's QEMU) the command line's `mem-path` is tried.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from ..errors import InputError
from ..guests import PulseMemory, layout
from ..host.files import open_foreign
from ..host.processes import Process, path_seen_by
from ..qmp.chardevs import parse_options
from .model import ProbeUnavailable

__all__ = ["SharedMapping", "named_file", "open_pulse", "parse_maps"]

_START = (
    "start QEMU with its RAM shared, -object memory-backend-file,id=MEM,share=on,mem-path=FILE,"
    "size=SIZE -machine TYPE,memory-backend=MEM, and boot the pulse guest in it"
)
_BOOT = "boot the pulse guest: see vm-images/pulse/README.md"

# address range, permissions, offset, device, inode, path; proc(5)
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ...s ([0-9a-f]+) [0-9a-f]+:[0-9a-f]+ (\d+) *(.*)")


@dataclass(frozen=True, slots=True)
class SharedMapping:
    """A mapping that a process shares with others: `offset` in the file with this `inode`.

    `entry` is its name in /proc/PID/map_files.
    """

    start: int
    end: int
    offset: int
    inode: int
    path: str
    entry: str


@dataclass(frozen=True, slots=True)
class _Place:
    """Ways to open a file, where in it a RAM block begins, and the file's inode if known."""

    paths: tuple[Path, ...]
    offset: int
    inode: int | None

    def open(self, path: Path) -> int | None:
        """That file, if it is the one.  Raises OSError: also for what is no regular file."""
        handle = open_foreign(str(path), follow=True)
        if self.inode in (None, os.fstat(handle).st_ino):
            return handle
        os.close(handle)
        return None


def open_pulse(process: Process) -> PulseMemory:
    """The memory of the pulse guest that this QEMU runs, for reading.

    Raises ProbeUnavailable, with the remedy, when there is none that can be read.
    """
    refused: OSError | None = None
    try:
        places = _mapped(process)
    except PermissionError as exc:
        refused = exc
        places = _named(process)
    except OSError as exc:
        raise ProbeUnavailable(f"QEMU (pid {process.pid}) is gone: {exc.strerror}") from exc
    for place in places:
        for path in place.paths:
            try:
                handle = place.open(path)
                if handle is None:
                    continue
                memory = PulseMemory(handle, offset=place.offset)
            except PermissionError as exc:
                refused = exc
                continue
            except (OSError, ValueError, InputError):
                continue  # gone, or another file by now, or not one that can be read
            if _is_pulse(memory):
                return memory
            break
    if refused is not None:
        raise ProbeUnavailable(
            f"the guest's RAM may not be read: {refused.strerror}",
            remedy=f"run as root or as QEMU's user (uid {process.uid})",
        )
    if not places:
        raise ProbeUnavailable("QEMU shares no guest RAM with other processes", remedy=_START)
    raise ProbeUnavailable("no pulse guest runs in the RAM that QEMU shares", remedy=_BOOT)


def _is_pulse(memory: PulseMemory) -> bool:
    """The memory is closed unless it is."""
    try:
        header = memory.header()
    except (OSError, InputError):
        header = None  # truncated meanwhile, or a file that cannot be read, only mapped
    if header is not None and header.version == layout.LAYOUT_VERSION:
        return True
    memory.close()
    if header is not None:
        raise ProbeUnavailable(
            f"the pulse guest has layout {header.version}, "
            f"this library knows {layout.LAYOUT_VERSION}",
            remedy="use the image and the library of the same version",
        )
    return False


def parse_maps(text: str) -> list[SharedMapping]:
    """The shared mappings of a file in /proc/PID/maps, large enough for the pulse guest.

    Mappings that touch and go on in the same file are one: mprotect and mbind split them.
    """
    found: list[SharedMapping] = []
    for line in text.splitlines():
        match = _MAPPING.fullmatch(line)
        if match is None:
            continue
        start, end, offset = (int(match[n], 16) for n in (1, 2, 3))
        inode, path = int(match[4]), match[5]
        last = found[-1] if found else None
        if (
            last is not None
            and (last.end, last.inode, last.path) == (start, inode, path)
            and last.offset + (last.end - last.start) == offset
        ):
            found[-1] = replace(last, end=end)
        else:
            found.append(SharedMapping(start, end, offset, inode, path, f"{start:x}-{end:x}"))
    return [m for m in found if m.end - m.start >= layout.RAM_NEEDED]


def _mapped(process: Process) -> list[_Place]:
    """What the process maps shared.  Raises OSError when that may not be read."""
    mappings = parse_maps(Path(f"/proc/{process.pid}/maps").read_text())
    descriptors = process.file_descriptors() or ()
    places = []
    for mapping in mappings:
        paths = [
            Path(f"/proc/{process.pid}/fd/{d.number}")
            for d in descriptors
            if d.inode == mapping.inode
        ]
        path = path_seen_by(process, mapping.path) if mapping.path.startswith("/") else None
        if path is not None:
            paths.insert(0, Path(path))
        # needs CAP_CHECKPOINT_RESTORE, and works for files without a name
        paths.append(Path(f"/proc/{process.pid}/map_files/{mapping.entry}"))
        places.append(_Place(tuple(paths), mapping.offset, mapping.inode))
    return places


def _named(process: Process) -> list[_Place]:
    """What `-object memory-backend-file,share=on` names on the command line."""
    places = []
    for option, value in pairwise(process.argv):
        if option.lstrip("-") != "object":
            continue
        path = named_file(value)
        seen = path_seen_by(process, path) if path is not None else None
        if seen is not None:
            places.append(_Place((Path(seen),), 0, None))
    return places


def named_file(value: str) -> str | None:
    """The file of a shared memory backend, from the value of `-object`, plain or JSON."""
    if value.startswith("{"):
        try:
            options = json.loads(value)
        except ValueError:
            return None
        path, share = options.get("mem-path"), options.get("share") is True
    else:
        plain = parse_options(value, "qom-type")
        path, share = plain.get("mem-path"), plain.get("share") in ("on", "yes", "true", "y")
    return path if isinstance(path, str) and share else None
