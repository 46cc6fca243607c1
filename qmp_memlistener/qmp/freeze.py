"""A lock on a guest: while real-time work runs, no other process of ours touches it.

A freeze is a file that its holder keeps locked:

    /dev/shm/qmp-memlistener-UID/freeze-KEY.TOKEN       one for each freeze, 0644

KEY is the QEMU process (pid and start time), so all its monitors are the same guest; or the address
of a monitor whose QEMU is not visible here.  The lock is an open-file-description lock
(F_OFD_SETLK, fcntl(2)).  Why this and not something else:

- The kernel drops it with its holder, however that ends.  The file of a dead one means nothing, and
  the next process that looks removes it: a file is locked before it gets its name, and its name is
  never used again, so one that is not locked is dead.
- A write lock needs a file that was opened for writing, and only its owner may do that; a stranger
  who opens it for reading can neither lock it nor keep its holder from doing so.  (flock(2) would
  let him do both.)  Strangers' directories do not count: only those of root, of ourselves and of
  the user that QEMU runs as, and only if nobody else may write there.  Squatting on a name is of no
  use, since the owner counts and not the name.
- An abstract UNIX socket with SO_PEERCRED would leave no file, but anybody may take its name first,
  it is seen within one network namespace only, and its holder would have to answer to tell since
  when and why.
- Pods share neither network namespace nor /dev/shm with the node or with each other.  But every
  process that sees a QEMU and may look into its file system (root; its own user) can meet there: so
  the same file is also kept in /dev/shm as QEMU sees it, under the pid that QEMU has in there.  No
  symbolic link is followed on the way.  From outside a user namespace nothing can be written there;
  `Freeze.remarks` then says so.

A guest can be frozen once.  A second freeze would have to attach, which is what the first one rules
out; so it is refused.  Of several that begin at once exactly one wins: each shows its claim, then
looks; the one of the lowest user id and token waits until the others have given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import ipaddress
import os
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import msgspec

from ..errors import GuestFrozen, MissingPrerequisite
from ..host import state
from ..host.directory import LONGEST, StateDirectory, decoded, is_write_locked, set_lock
from ..host.files import open_in_root
from ..host.processes import Process
from ..text import json_bytes
from .discovery import Guest
from .targets import PidTarget, Target, TcpTarget, UnixTarget

__all__ = [
    "Freeze",
    "FreezeKey",
    "Holder",
    "check_not_frozen",
    "freeze_key",
    "frozen_by",
    "hold_freeze",
    "process_key",
]

_FILE = "freeze-"
# Byte 0 is locked as long as the holder lives, byte 1 until its claim has become a freeze: the
# other way round a stranger's read lock on byte 1 could keep it from becoming one.
_ALIVE, _CLAIMED = 0, 1

_PATIENCE = 2.0
_POLL = 0.005
_REASON_LENGTH = 200
_PID_MAX = 1 << 22  # PID_MAX_LIMIT, include/linux/threads.h

_ours: set[str] = set()
"""Tokens of the freezes that this process holds."""


@dataclass(frozen=True, slots=True)
class FreezeKey:
    """What is frozen: `who` in words, `name` in file names, `owner` the user that QEMU runs as.

    `process` is QEMU's where it is visible; `inner_name` is the name inside its pid namespace.
    """

    who: str
    name: str
    owner: int | None
    process: Process | None = None
    inner_name: str = ""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a freeze: user id, `since_ns` (CLOCK_MONOTONIC), why; as in `list --json`.

    `pid` is that of the holder in its own namespace, None when it cannot be read.
    """

    pid: int | None
    uid: int
    since_ns: int
    reason: str

    def __str__(self) -> str:
        began = time.time() - (time.monotonic_ns() - self.since_ns) / 1e9
        when = datetime.fromtimestamp(began, UTC).astimezone()
        why = f": {self.reason}" if self.reason else ""
        return f"pid {self.pid or '?'} (uid {self.uid}) since {when:%Y-%m-%d %H:%M:%S}{why}"


@dataclass(frozen=True, slots=True)
class Freeze:
    """A freeze that is held; `remarks` says who will not honour it."""

    key: FreezeKey
    remarks: tuple[str, ...]


def freeze_key(target: Target, guest: Guest | None) -> FreezeKey:
    """The key of the guest behind a target.

    `guest` is QEMU where its process is visible here (`find_owner`); otherwise the address stands
    for it: then different names of one host, or several monitors, are different guests.
    """
    if guest is not None:
        return process_key(guest.process)
    if isinstance(target, PidTarget):
        process = Process.read(target.pid)
        if process is not None:
            return process_key(process)
        return FreezeKey(f"process {target.pid}", f"gone-{target.pid}", None)
    if isinstance(target, UnixTarget):
        if not target.is_abstract:
            with contextlib.suppress(OSError):
                status = os.stat(target.path)
                name = f"unix-{status.st_dev:x}-{status.st_ino:x}"
                return FreezeKey(str(target), name, status.st_uid)
        return FreezeKey(str(target), f"unix-{_digest(target.path)}", None)
    if not isinstance(target, TcpTarget):
        return FreezeKey(str(target), f"named-{_digest(str(target))}", None)
    try:
        host = ipaddress.ip_address(target.host).compressed
    except ValueError:
        host = "127.0.0.1" if target.host == "localhost" else target.host.lower()
    return FreezeKey(str(target), f"tcp-{_digest(f'{host} {target.port}')}", None)


def process_key(process: Process) -> FreezeKey:
    """The key of a QEMU process."""
    inner = process.pid
    with contextlib.suppress(OSError), open(f"/proc/{process.pid}/status", "rb") as f:
        for line in f:
            if line.startswith(b"NSpid:"):
                inner = int(line.split()[-1])
    return FreezeKey(
        who=f"QEMU (pid {process.pid})",
        name=f"{process.pid}-{process.start_ticks}",
        owner=process.uid,
        process=process,
        inner_name=f"{inner}-{process.start_ticks}",
    )


@asynccontextmanager
async def hold_freeze(key: FreezeKey, reason: str) -> AsyncIterator[Freeze]:
    """Freeze a guest for the length of the block.

    Raises GuestFrozen when it is frozen already, MissingPrerequisite when there is no place for
    the lock.  A child that this process forks without exec(2) keeps the freeze as long as it lives.
    """
    token = f"{os.getpid()}-{secrets.token_hex(8)}"
    with ExitStack() as stack:
        claims, remarks = _claim(key, token, reason, stack)
        await _win(key, (os.geteuid(), token))
        for handle in claims:
            set_lock(handle, fcntl.F_UNLCK, _CLAIMED)  # the claim is a freeze from now on
        _ours.add(token)
        stack.callback(_ours.discard, token)
        yield Freeze(key, tuple(remarks))


def frozen_by(key: FreezeKey) -> Holder | None:
    """Who has frozen the guest; None when it is not frozen.  A freeze of this process counts as
    well."""
    return next((f.holder for f in _find(key) if f.held), None)


def check_not_frozen(key: FreezeKey) -> None:
    """Call before touching a guest.  Raises GuestFrozen, but not for a freeze of this process."""
    for found in _find(key):
        if found.held and found.token not in _ours:
            raise _frozen(key, found)


def _claim(
    key: FreezeKey, token: str, reason: str, stack: ExitStack
) -> tuple[list[int], list[str]]:
    """A claim in each place, gone when `stack` is closed; and what the user should know."""
    content = _Content(os.getpid(), time.monotonic_ns(), reason)
    handles: list[int] = []
    claimed: list[_Place] = []
    why = ""
    with _places(key) as places:
        for place in places:
            try:
                handles.append(_claim_at(place, token, content, stack))
                claimed.append(place)
            except OSError as exc:
                why = why or f": {exc.strerror}"
    if not handles:
        raise MissingPrerequisite(
            f"{key.who} cannot be frozen, there is no place for the lock in {state.SHM}{why}",
            remedy=f"make {state.SHM} a writable tmpfs",
        )
    remarks = []
    if not any(p.here for p in claimed):
        remarks.append(f"agents outside QEMU's container do not see the freeze{why}")
    if key.process and not (any(p.inside for p in claimed) or key.process.shares_root()):
        remarks.append(f"agents inside QEMU's container do not see the freeze{why}")
    uid = os.geteuid()
    if key.owner is not None and uid not in (0, key.owner):
        remarks.append(
            f"only verbs of user id {uid} honour the freeze: {key.who} belongs to {key.owner}"
        )
    return handles, remarks


async def _win(key: FreezeKey, order: tuple[int, str]) -> None:
    """Wait until no rival is left.  Raises GuestFrozen.

    Whoever shows its claim later sees the other's.  Of two that see each other the lower one waits
    and the other gives up; one that holds never goes, so that the lower one gives up in the end.
    """
    until = time.monotonic() + _PATIENCE
    while True:
        rivals = [f for f in _find(key) if f.order != order]
        if not rivals:
            return
        for rival in rivals:
            if rival.held or rival.order < order or time.monotonic() > until:
                raise _frozen(key, rival)
        await asyncio.sleep(_POLL)


def _find(key: FreezeKey) -> list[_Found]:
    """Live freezes and claims that count, each token once.  Dead ones are removed where we may."""
    honoured = {0, os.geteuid()} | ({key.owner} if key.owner is not None else set())
    found: dict[str, _Found] = {}
    with _places(key) as places:
        for place in places:
            for directory in state.directories_in(place.shm, state.SHM, honoured):
                found.update({f.token: f for f in _look_into(directory, place.name)})
    return list(found.values())


def _frozen(key: FreezeKey, found: _Found) -> GuestFrozen:
    return GuestFrozen(
        f"{key.who} is frozen for real-time work by {found.holder}",
        remedy="wait until that has ended, or end it; `qmp-memlistener list` shows what is frozen",
    )


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]


# -- the files ---------------------------------------------------------------------------------


class _Content(msgspec.Struct, frozen=True):
    """What a holder says of itself; `since_ns` is CLOCK_MONOTONIC."""

    pid: int
    since_ns: int
    reason: str


@dataclass(frozen=True, slots=True)
class _Found:
    """A live freeze, or (not `held`) a claim that may become one.

    `uid` is the file's owner; `content` is None when it makes no sense.
    """

    token: str
    uid: int
    held: bool
    content: _Content | None

    @property
    def order(self) -> tuple[int, str]:
        return self.uid, self.token

    @property
    def holder(self) -> Holder:
        """What the file says, as far as it can be: a container's root may write what it likes."""
        content = self.content
        now = time.monotonic_ns()
        if content is None:
            return Holder(None, self.uid, now, "")
        pid = content.pid if 0 < content.pid <= _PID_MAX else None
        reason = "".join(c if c.isprintable() else "?" for c in content.reason[:_REASON_LENGTH])
        return Holder(pid, self.uid, min(max(0, content.since_ns), now), reason)


@dataclass(frozen=True, slots=True)
class _Place:
    """A tmpfs where freezes of a guest are: an open directory, and the guest's name there.

    `here`: processes like us look there; `inside`: those in QEMU's container do.
    """

    shm: int
    name: str
    here: bool
    inside: bool


@contextmanager
def _places(key: FreezeKey) -> Iterator[list[_Place]]:
    """/dev/shm here and, where that is another one or has another name, as QEMU sees it."""
    with ExitStack() as stack:
        found: list[_Place] = []
        with contextlib.suppress(OSError):
            handle = os.open(state.SHM, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, handle)
            found.append(_Place(handle, key.name, here=True, inside=False))
        if key.process is not None:
            with contextlib.suppress(OSError):
                handle = open_in_root(key.process, state.SHM, os.O_RDONLY | os.O_DIRECTORY)
                stack.callback(os.close, handle)
                if found and key.name == key.inner_name and _is_same(found[0].shm, handle):
                    found[0] = replace(found[0], inside=True)
                else:
                    found.append(_Place(handle, key.inner_name, here=False, inside=True))
        yield found


def _claim_at(place: _Place, token: str, content: _Content, stack: ExitStack) -> int:
    """A locked file for this guest, until `stack` is closed.  Raises OSError."""
    directory = state.directory_in(place.shm, state.SHM)
    # without a name it cannot be opened before it is locked
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    handle = os.open(".", flags, 0o600, dir_fd=directory.handle)
    stack.callback(os.close, handle)
    os.write(handle, json_bytes(content))
    for byte in (_ALIVE, _CLAIMED):
        set_lock(handle, fcntl.F_WRLCK, byte)
    os.fchmod(handle, 0o644)
    name = f"{_FILE}{place.name}.{token}"
    link = f"/proc/self/fd/{handle}"
    os.link(link, name, dst_dir_fd=directory.handle, follow_symlinks=True)
    stack.callback(directory.remove, name)
    return handle


def _look_into(directory: StateDirectory, name: str) -> Iterator[_Found]:
    for file in directory.names():
        if not file.startswith(_FILE):
            continue
        try:
            handle = directory.open(file)
        except OSError:
            continue
        try:
            if not is_write_locked(handle, _ALIVE, 1):
                directory.remove(file)
            elif file.startswith(f"{_FILE}{name}."):
                token = file.removeprefix(f"{_FILE}{name}.")
                held = not is_write_locked(handle, _CLAIMED, 1)
                yield _Found(token, directory.uid, held, _content(handle))
        finally:
            os.close(handle)


def _content(handle: int) -> _Content | None:
    try:
        return decoded(os.pread(handle, LONGEST, 0), _Content)
    except OSError:
        return None


def _is_same(one: int, other: int) -> bool:
    return os.path.samestat(os.fstat(one), os.fstat(other))
