"""Notes about what has to be undone in a QEMU, should its author die: one scheme for all of them.

One file for each, KEY.WHAT or KEY.WHAT-TOKEN in our directory (`state`).  KEY is the QEMU
(`Process.key`; the address of a monitor whose process is not visible here).  A note is written,
locked and flushed before the guest is touched, and removed after it has been put back.  One that
can be locked is *stale*: its author is dead.  It goes with its QEMU.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

import msgspec

from .directory import HeldFile, StateDirectory, decoded
from .files import NotRegular
from .processes import Process, boot_id, is_key, process_of
from .state import directories, directory_of, own_directory

__all__ = ["DiskNote", "Stale", "hold", "new_name", "stale"]

SCHEMA = 1
_ADDRESSES = ("unix-", "tcp-")  # `freeze.freeze_key`


class DiskNote(msgspec.Struct, frozen=True, kw_only=True):
    """What every note says: `pid` and `start_ticks` are QEMU's, None where it is not visible."""

    schema: int
    boot: str
    pid: int | None
    start_ticks: int | None

    @classmethod
    def about(cls, process: Process | None, **more: object) -> Self:
        pid, start = (None, None) if process is None else (process.pid, process.start_ticks)
        return cls(schema=SCHEMA, boot=boot_id(), pid=pid, start_ticks=start, **more)

    @property
    def is_current(self) -> bool:
        """Of this boot, in this form, and its QEMU still runs as far as can be seen."""
        if self.schema != SCHEMA or self.boot != boot_id():
            return False
        return self.pid is None or process_of(f"{self.pid}-{self.start_ticks}") is not None


N = TypeVar("N", bound=DiskNote)


@dataclass(frozen=True, slots=True)
class Stale(Generic[N]):
    """A note whose author is dead, about a QEMU that still runs."""

    note: N
    name: str
    directory: StateDirectory

    @property
    def path(self) -> str:
        return f"{self.directory.path}/{self.name}"

    def take(self) -> HeldFile | None:
        """Be its author; None when somebody else is, or when it is gone."""
        return self.directory.hold(self.name, create=False)

    def remove(self) -> None:
        self.directory.remove(self.name)


def new_name(key: str, what: str) -> str:
    """For a note of which there may be several."""
    return f"{key}.{what}-{secrets.token_hex(8)}"


def hold(name: str) -> HeldFile | None:
    """The file of a note, empty or as a dead author left it; None when a live one holds it.

    Raises MissingPrerequisite when there is no directory that is ours alone, OSError.
    """
    return (directory_of(name) or own_directory()).hold(name)


def stale(what: str, kind: type[N], *, key: str | None = None) -> list[Stale[N]]:
    """All of one kind (about the QEMU `key`).

    On the way notes about what is gone are removed, and those that were never acted upon: what is
    cut off, or is no note at all.
    """
    found = []
    for directory in directories():
        for name in directory.names():
            whose, _, rest = name.partition(".")
            if rest != what and not rest.startswith(f"{what}-"):
                continue
            if key is not None and key != whose:
                continue
            if not (is_key(whose) or whose.startswith(_ADDRESSES)):
                continue
            note = _stale(directory, name, kind)
            if note is not None:
                found.append(Stale(note, name, directory))
    return found


def _stale(directory: StateDirectory, name: str, kind: type[N]) -> N | None:
    try:
        os.close(directory.open(name))
    except (NotRegular, PermissionError):
        directory.remove(name)
        return None
    except OSError:
        return None
    # beside others who read it at the same time, so that they are not taken for its author
    try:
        for shared in (True, False):
            held = directory.hold(name, create=False, shared=shared)
            if held is None:
                return None  # its author lives, or somebody else removes it
            with held:
                note = _current(held, name, kind)
                if note is not None:
                    return note
                if not shared:
                    held.remove()
    except OSError:
        pass
    return None


def _current(held: HeldFile, name: str, kind: type[N]) -> N | None:
    note = decoded(held.read(), kind)
    key = name.partition(".")[0]
    gone = is_key(key) and process_of(key) is None
    return None if note is None or gone or not note.is_current else note
