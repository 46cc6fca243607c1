"""PURE: QEMU's option texts, and what a character device is connected to.

A character device is named in three ways that mean the same: `-chardev BACKEND,id=…,KEY=VALUE`,
the older text of `-qmp`, `-monitor`, `-serial` and their like (`unix:PATH,server`), and a
`[chardev "ID"]` group of a file for -readconfig.  Rules after util/qemu-option.c
(get_opt_name_value), chardev/char.c (qemu_chr_parse_compat) and util/qemu-config.c
(qemu_config_foreach), read in 7.2 and 10.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .targets import SocketTarget, TcpTarget, UnixTarget

__all__ = [
    "Chardev",
    "chardev_of_options",
    "chardev_of_text",
    "config_groups",
    "is_on",
    "options_text",
    "parse_options",
]

_SOCKETS = ("tcp", "telnet", "tn3270", "websocket")
_FILES = ("file", "pipe", "serial", "tty", "parallel", "parport")
"""Backends whose `path` is opened and written to."""
_DEVICE_LINE = 1024
"""util/qemu-config.c reads lines of this length."""


def parse_options(text: str, implied: str | None = None) -> dict[str, str]:
    """`a,b=c,,d` as {implied: "a", "b": "c,d"}.  A later bare word is a flag: "on", or "off" when
    it begins with `no`, as QEMU reads `server` and `nowait`.  The last value of a key wins.
    """
    out: dict[str, str] = {}
    # `,,` is a comma; a NUL, which no argument of a process can contain, stands for it
    for index, part in enumerate(text.replace(",,", "\0").split(",")):
        key, equals, value = part.partition("=")
        if equals and "\0" not in key:
            out[key] = value.replace("\0", ",")
            continue
        part = part.replace("\0", ",")
        if index == 0 and implied is not None and part:
            out[implied] = part
        elif part.startswith("no") and len(part) > 2:
            out[part[2:]] = "off"
        elif part:
            out[part] = "on"
    return out


def options_text(options: Mapping[str, str]) -> str:
    """What `parse_options` reads as `options`."""
    return ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())


def is_on(options: Mapping[str, str], key: str) -> bool:
    """A boolean option, as qapi_bool_parse (qapi/qapi-util.c) reads it."""
    return options.get(key) in ("on", "yes", "true", "y")


@dataclass(frozen=True, slots=True)
class Chardev:
    """One character device.  `text` is how people call it; `mux` is the device that a
    `-serial chardev:ID` or `-monitor chardev:ID` stands for, "" for one that is defined here."""

    backend: str
    text: str
    options: Mapping[str, str] = field(default_factory=dict)
    refers_to: str = ""

    @property
    def listens(self) -> bool:
        """QEMU waits for clients, rather than being one (qemu_chr_parse_socket)."""
        return self.backend == "socket" and is_on(self.options, "server")

    @property
    def fd(self) -> int | None:
        """The inherited descriptor that is the socket."""
        number = self.options.get("fd", "")
        return int(number[:9]) if number.isascii() and number.isdigit() else None

    @property
    def address(self) -> SocketTarget | None:
        """Where QEMU listens, as it was given: a relative path is relative to QEMU's directory."""
        options = self.options
        if not self.listens or any(is_on(options, k) for k in ("telnet", "tn3270", "websocket")):
            return None
        path, port = options.get("path", ""), options.get("port", "")
        if path:
            return UnixTarget(("@" if is_on(options, "abstract") else "") + path)
        if port.isascii() and port.isdigit() and 0 < int(port[:9]) < 65536:
            host = options.get("host", "").strip("[]")
            # A wildcard listener is reached through the loopback address.
            wildcard = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1", "*": "127.0.0.1"}
            return TcpTarget(wildcard.get(host, host), int(port))
        return None

    @property
    def files(self) -> tuple[str, ...]:
        """The paths that what comes out of it is written to: its backend's and its `logfile`."""
        path = self.options.get("path") if self.backend in _FILES else None
        return tuple(p for p in (path, self.options.get("logfile")) if p)

    @property
    def writes_stdout(self) -> bool:
        """What comes out of it goes to QEMU's standard output."""
        return self.backend in ("stdio", "console", "con")


def chardev_of_options(text: str) -> tuple[str, Chardev] | None:
    """The id and the device of a `-chardev`, as options or as JSON; None when there is no id."""
    if text.startswith("{"):
        found = _json_options(text)
        if found is None:
            return None
        options = found
    else:
        options = parse_options(text, "backend")
    label = options.get("id")
    if label is None:
        return None
    return label, Chardev(options.get("backend", ""), f"chardev:{label}", options)


def chardev_of_text(text: str) -> Chardev:
    """What follows `-qmp`, `-monitor`, `-serial` and their like."""
    kind, colon, rest = text.partition(":")
    if not colon:
        return Chardev(text.partition(",")[0], text)
    if kind == "mon":
        inner = chardev_of_text(rest)
        return Chardev(inner.backend, text, inner.options, inner.refers_to)
    if kind == "chardev":
        return Chardev("", text, refers_to=rest)
    if kind == "unix":
        return Chardev("socket", text, parse_options(rest, "path"))
    if kind in _SOCKETS:
        return Chardev("socket", text, _inet_options(kind, rest))
    if kind in ("file", "pipe"):
        # the whole rest is the path, also with commas in it
        return Chardev(kind, text, {"path": rest})
    return Chardev(kind, text)


def _inet_options(kind: str, rest: str) -> dict[str, str]:
    """`HOST:PORT,options`; `host=…,port=…` is read as well, which QEMU refuses here."""
    address, _, tail = rest.partition(",")
    if ":" in address and "=" not in address:
        host, _, port = address.rpartition(":")
        options = {"host": host, "port": port} | parse_options(tail)
    else:
        options = parse_options(rest)
    return options if kind == "tcp" else options | {kind: "on"}


def _json_options(text: str) -> dict[str, str] | None:
    """`{"id":…,"backend":{"type":"socket","data":{"addr":{…}}}}` as options, also with the
    address's and the backend's keys laid flat beside `id`."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    found: dict[str, str] = {}
    backend = document.get("backend")
    if isinstance(backend, dict):
        data = backend.get("data")
        document = {
            **{k: v for k, v in document.items() if k != "backend"},
            **(data if isinstance(data, dict) else backend),
            "backend": backend.get("type"),
        }
    for name, value in _flat(document):
        found[name] = ("on" if value else "off") if isinstance(value, bool) else str(value)
    if found.get("backend") == "socket":
        found.setdefault("server", "on")  # qapi/char.json: ChardevSocket's default
    if "out" in found:
        found.setdefault("path", found["out"])  # ChardevFile
    if found.get("type") == "fd" and "str" in found:
        found["fd"] = found["str"]
    return found


def _flat(document: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """The values of the document and of its `addr`, `data` and `device` objects."""
    for name, value in document.items():
        if isinstance(value, dict):
            if name in ("addr", "data", "device"):
                yield from _flat(value)
        elif isinstance(value, str | int | bool):
            yield name, value


_GROUP = re.compile(r'\[([^"\]\s]{1,63}) "([^"]{1,63})"\]')
_GROUP_WITHOUT_ID = re.compile(r"\[([^\]]{1,63})\]")
_VALUE = re.compile(r'\s*(\S{1,63})\s*=\s*"([^"]{0,1023})"')


def config_groups(text: str) -> list[tuple[str, dict[str, str]]]:
    """The groups of a file for -readconfig, with their options; an id is the option `id`.

    What is no line of such a file is skipped: QEMU itself would not have started with it.
    """
    found: list[tuple[str, dict[str, str]]] = []
    for line in text.split("\n"):
        if len(line) >= _DEVICE_LINE:
            continue
        if group := _GROUP.match(line):
            found.append((group[1], {"id": group[2]}))
        elif group := _GROUP_WITHOUT_ID.match(line):
            found.append((group[1], {}))
        elif found and (value := _VALUE.match(line)) and not line.startswith("#"):
            found[-1][1][value[1]] = value[2]
    return found
