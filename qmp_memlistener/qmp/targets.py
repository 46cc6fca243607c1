"""Targets: how a user names a guest's monitor.  Parse and format, nothing is connected to here.

Accepted forms::

    unix:PATH   a UNIX socket; a PATH that starts with `@` is in the abstract namespace
    PATH        the same, when the text contains a `/` or names something that exists
    HOST:PORT   a TCP monitor; `[V6]:PORT` for a literal IPv6 address, `tcp:` may stand in front
    pid:N       the QEMU with that process id; one of its free monitors is used
    name:GUEST  the same, by the guest's name (-name)
    libvirt:DOMAIN, libvirt:DOMAIN?connect=URI
                a domain of libvirt's, by name or UUID; without URI, libvirt's own default
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass

from ..errors import InputError
from ..text import quoted

__all__ = [
    "TARGET_FORMS",
    "Address",
    "LibvirtTarget",
    "NameTarget",
    "PidTarget",
    "SocketTarget",
    "Target",
    "TcpTarget",
    "UnixTarget",
    "parse_target",
    "same_socket",
]

TARGET_FORMS = (
    "unix:PATH, a path, HOST:PORT, [V6]:PORT, pid:N, name:GUEST or libvirt:DOMAIN[?connect=URI]"
)

# The kernel's own ceiling for process ids (PID_MAX_LIMIT, include/linux/threads.h).
_PID_MAX = 1 << 22

_CONNECT = "?connect="

_HOST_PORT = re.compile(r"(?:\[([^\[\]\s]+)\]|([^\[\]:/\s]*)):([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class UnixTarget:
    """A UNIX socket by path; `@NAME` is the abstract socket NAME."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"

    @property
    def is_abstract(self) -> bool:
        return self.path.startswith("@")


@dataclass(frozen=True, slots=True)
class TcpTarget:
    """A TCP address; `host` is a name or a literal address without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class PidTarget:
    """A QEMU by process id."""

    pid: int

    def __str__(self) -> str:
        return f"pid:{self.pid}"


@dataclass(frozen=True, slots=True)
class NameTarget:
    """A QEMU by the guest's name."""

    name: str

    def __str__(self) -> str:
        return f"name:{self.name}"


@dataclass(frozen=True, slots=True)
class LibvirtTarget:
    """A domain by name or UUID; `uri` None is libvirt's default (virConnectOpen(3))."""

    domain: str
    uri: str | None = None

    def __str__(self) -> str:
        return f"libvirt:{self.domain}" + (f"{_CONNECT}{self.uri}" if self.uri is not None else "")


SocketTarget = UnixTarget | TcpTarget
Target = UnixTarget | TcpTarget | PidTarget | NameTarget | LibvirtTarget
Address = SocketTarget | PidTarget | LibvirtTarget
"""What a connection can be made to; a process is one to which there is no monitor."""


def parse_target(text: str) -> Target:
    """The target that `text` names; `parse_target(str(target)) == target`.

    Raises InputError, naming the accepted forms, for anything else.
    """
    if "\0" in text or "\n" in text:
        raise _not_a_target(text, "it contains a control character")
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if path in ("", "@"):
            raise _not_a_target(text, "the path is empty")
        return UnixTarget(path)
    if text.startswith("pid:"):
        return _pid(text)
    if text.startswith("name:"):
        if text == "name:":
            raise _not_a_target(text, "the name is empty")
        return NameTarget(text.removeprefix("name:"))
    if text.startswith("libvirt:"):
        return _libvirt(text)
    if text.startswith("tcp:"):
        return _tcp(text, text.removeprefix("tcp:"))
    if "/" in text:
        return UnixTarget(text)
    if _HOST_PORT.fullmatch(text):
        return _tcp(text, text)
    if text and os.path.exists(text):
        return UnixTarget(text)
    raise _not_a_target(text, "no such path, and no known form of target")


def same_socket(one: Address, other: Address) -> bool:
    """Both names lead to the same listener."""
    if one == other:
        return True
    if isinstance(one, UnixTarget) and isinstance(other, UnixTarget):
        if one.is_abstract or other.is_abstract:
            return False
        try:
            return os.path.samefile(one.path, other.path)
        except OSError:
            return False
    if isinstance(one, TcpTarget) and isinstance(other, TcpTarget) and one.port == other.port:
        return bool(_local_addresses(one.host) & _local_addresses(other.host))
    return False


def _local_addresses(host: str) -> set[str]:
    """Addresses of a name, only where no name service has to be asked."""
    if host == "localhost":
        return {"127.0.0.1", "::1"}
    try:
        infos = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    except OSError:
        return {host}
    return {str(info[4][0]) for info in infos}


def _pid(text: str) -> PidTarget:
    digits = text.removeprefix("pid:")
    if not (digits.isascii() and digits.isdigit()) or not 0 < int(digits[:9]) <= _PID_MAX:
        raise _not_a_target(text, "it is not a process id")
    return PidTarget(int(digits))


def _libvirt(text: str) -> LibvirtTarget:
    domain, connect, uri = text.removeprefix("libvirt:").partition(_CONNECT)
    if not domain:
        raise _not_a_target(text, "the domain is empty")
    if connect and not uri:
        raise _not_a_target(text, "the URI is empty")
    return LibvirtTarget(domain, uri if connect else None)


def _tcp(text: str, address: str) -> TcpTarget:
    match = _HOST_PORT.fullmatch(address)
    if match is None:
        raise _not_a_target(text, "a TCP address is HOST:PORT")
    host = match[1] or match[2] or "localhost"
    try:
        host.encode("idna")  # what resolving it does first
    except UnicodeError:
        raise _not_a_target(text, f"{quoted(host)} is no host name") from None
    port = int(match[3])
    if not 0 < port < 65536:
        raise _not_a_target(text, f"{port} is not a port number")
    return TcpTarget(host, port)


def _not_a_target(text: str, why: str) -> InputError:
    return InputError(
        f"not a target: {quoted(text)} ({why})",
        remedy=f"a target is {TARGET_FORMS}; `qmp-memlistener list` shows those on this host",
    )
