"""PURE: what a QEMU's command line says about its monitors, accelerator, machine, name and log.

Only the options this project needs are understood.  Everything here is text in, values out;
reading /proc is `discovery`'s job.  Option syntax after util/qemu-option.c (`,,` is a literal
comma, a bare word is the implied first key or a flag) and softmmu/vl.c, system/vl.c.
"""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from .targets import SocketTarget, TcpTarget, UnixTarget

__all__ = ["CommandLine", "MonitorMode", "MonitorSpec", "parse_command_line", "parse_options"]

_QEMU_BINARY = re.compile(r"qemu-system-[\w.+-]+|qemu-kvm[\w.+-]*|kvm")
_LOADER = re.compile(r"ld-linux[\w.-]*|ld64?\.so[\w.-]*|ld-musl[\w.-]*|ld-\d[\w.]*\.so")


class MonitorMode(StrEnum):
    """`control` speaks QMP, `readline` is a human monitor (QEMU's own words for `-mon mode=`)."""

    CONTROL = "control"
    READLINE = "readline"


@dataclass(frozen=True, slots=True)
class MonitorSpec:
    """One monitor.  `address` is None when nobody can connect (stdio, a pty, QEMU as client).

    `fd` is the number of a listening socket that QEMU inherited (libvirt starts it so); the
    address then has to be read from /proc.  A UNIX path is as given: relative to QEMU's cwd.
    """

    mode: MonitorMode
    text: str
    address: SocketTarget | None = None
    fd: int | None = None


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What was understood.  `accels` in order of preference, empty when not given."""

    binary: str
    name: str | None
    machine: str | None
    accels: tuple[str, ...]
    monitors: tuple[MonitorSpec, ...]
    log_file: str | None
    log_items: str | None
    traces: bool
    timestamps: bool
    daemonize: bool
    notes: tuple[str, ...]

    @property
    def uses_log(self) -> bool:
        """Somebody asked for log or trace output: `-d` or `-trace`."""
        return self.log_items is not None or self.traces

    @property
    def log_per_thread(self) -> bool:
        """`-d tid`: one log file per thread, which cannot be redirected (util/log.c)."""
        return self.log_items is not None and "tid" in self.log_items.split(",")

    @property
    def accel(self) -> str | None:
        """The accelerator, when the command line leaves no choice."""
        if len(self.accels) == 1:
            return self.accels[0]
        if not self.accels:
            return None if _runs_kvm_by_name(self.binary) else "tcg"
        return None


def parse_command_line(argv: Sequence[str]) -> CommandLine | None:
    """The QEMU command line in `argv`, or None when this is not a QEMU system emulator.

    Understands a binary that was started through a dynamic loader, as side-by-side
    installations do (`ld-linux.so --library-path DIR QEMU ...`).
    """
    at = _binary_index(argv)
    if at is None:
        return None
    values = _collect(argv[at + 1 :])
    chardevs = _chardevs(values.get("chardev", ()))
    name = _last(values, "name")
    machine, accels = _machine(values)
    log_items = _last(values, "d")
    notes = tuple(f"-readconfig {f} is not read" for f in values.get("readconfig", ()))
    message = parse_options(_last(values, "msg") or "", "timestamp")
    return CommandLine(
        binary=argv[at],
        name=parse_options(name, "guest").get("guest") if name is not None else None,
        machine=machine,
        accels=accels,
        monitors=tuple(_monitors(values, chardevs)),
        log_file=_last(values, "D"),
        log_items=log_items,
        traces="trace" in values,
        timestamps=message.get("timestamp", "off") in ("on", "yes", "true", "y"),
        daemonize="daemonize" in values,
        notes=notes,
    )


def parse_options(text: str, implied: str | None = None) -> dict[str, str]:
    """`a,b=c,,d` as {implied: "a", "b": "c,d"}.  A later bare word is a flag: "on", or "off" when
    it begins with `no`, as QEMU reads `server` and `nowait`.  The last value of a key wins."""
    out: dict[str, str] = {}
    for index, part in enumerate(_protect(text).split(",")):
        part = part.replace("\0", ",")
        key, equals, value = part.partition("=")
        if equals:
            out[key] = value
        elif index == 0 and implied is not None and part:
            out[implied] = part
        elif part.startswith("no") and len(part) > 2:
            out[part[2:]] = "off"
        elif part:
            out[part] = "on"
    return out


def _protect(text: str) -> str:
    """`,,` as a NUL, which no argument of a process can contain."""
    return text.replace(",,", "\0")


def _binary_index(argv: Sequence[str]) -> int | None:
    if not argv:
        return None
    first = os.path.basename(argv[0])
    if _QEMU_BINARY.fullmatch(first):
        return 0
    if not _LOADER.fullmatch(first):
        return None
    index = 1
    while index < len(argv):
        argument = argv[index]
        if argument in ("--library-path", "--argv0", "--preload", "--audit", "--inhibit-rpath"):
            index += 2
        elif argument.startswith("--"):
            index += 1
        else:
            return index if _QEMU_BINARY.fullmatch(os.path.basename(argument)) else None
    return None


_FLAGS = frozenset(("enable-kvm", "daemonize"))
_WITH_VALUE = frozenset(
    {"qmp", "qmp-pretty", "monitor", "mon", "chardev", "accel", "machine", "M"}
    | {"name", "D", "d", "trace", "msg", "readconfig"}
)


def _collect(args: Sequence[str]) -> dict[str, list[str]]:
    """Values of the wanted options, in order.  `-x` and `--x` are the same to QEMU."""
    values: dict[str, list[str]] = {}
    index = 0
    while index < len(args):
        argument = args[index]
        index += 1
        if not argument.startswith("-"):
            continue
        option = argument[2:] if argument.startswith("--") else argument[1:]
        if option in _FLAGS:
            values.setdefault(option, []).append("")
        elif option in _WITH_VALUE and index < len(args):
            values.setdefault(option, []).append(args[index])
            index += 1
    return values


def _last(values: Mapping[str, list[str]], option: str) -> str | None:
    given = values.get(option)
    return given[-1] if given else None


def _machine(values: Mapping[str, list[str]]) -> tuple[str | None, tuple[str, ...]]:
    machine: str | None = None
    accels: list[str] = []
    for text in [*values.get("machine", ()), *values.get("M", ())]:
        options = parse_options(text, "type")
        machine = options.get("type", machine)
        if "accel" in options:
            accels = [a for a in options["accel"].split(":") if a]
    explicit = [parse_options(text, "accel").get("accel") for text in values.get("accel", ())]
    if explicit:
        accels = [a for a in explicit if a]
    if "enable-kvm" in values:
        accels = ["kvm"]
    return machine, tuple(accels)


def _runs_kvm_by_name(binary: str) -> bool:
    # system/vl.c configure_accelerators(): a binary called *kvm prefers kvm, then tcg.
    return os.path.basename(binary).endswith("kvm")


def _chardevs(texts: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        if text.startswith("{"):
            key = _json_chardev(text)
            if key is not None:
                found[key[0]] = key[1]
            continue
        options = parse_options(text, "backend")
        if "id" in options:
            found[options["id"]] = text
    return found


def _json_chardev(text: str) -> tuple[str, str] | None:
    """`-chardev {"id":…,"backend":{"type":"socket","data":{"addr":{…}}}}` in the classic form."""
    try:
        document = json.loads(text)
        backend = document["backend"]
        address = backend["data"]["addr"]
        data = address["data"]
        server = "on" if backend["data"].get("server", True) else "off"
        where = {
            "unix": lambda: f"path={data['path']}",
            "inet": lambda: f"host={data['host']},port={data['port']}",
            "fd": lambda: f"fd={data['str']}",
        }[address["type"]]()
        return str(document["id"]), f"{backend['type']},{where},server={server}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _monitors(values: Mapping[str, list[str]], chardevs: Mapping[str, str]) -> list[MonitorSpec]:
    found = []
    for option, mode in (
        ("qmp", MonitorMode.CONTROL),
        ("qmp-pretty", MonitorMode.CONTROL),
        ("monitor", MonitorMode.READLINE),
    ):
        found += [_legacy(text, mode, chardevs) for text in values.get(option, ())]
    for text in values.get("mon", ()):
        options = parse_options(text, "chardev")
        mode = MonitorMode.CONTROL if options.get("mode") == "control" else MonitorMode.READLINE
        found.append(_of_chardev(options.get("chardev", ""), mode, chardevs))
    return found


def _of_chardev(label: str, mode: MonitorMode, chardevs: Mapping[str, str]) -> MonitorSpec:
    text = chardevs.get(label)
    if text is None:
        return MonitorSpec(mode, f"chardev:{label}")
    options = parse_options(text, "backend")
    if options.get("backend") != "socket":
        return MonitorSpec(mode, options.get("backend", label))
    if options.get("server", "off") == "off":
        return MonitorSpec(mode, f"chardev:{label} (QEMU is the client)")
    if options.get("fd", "").isdigit():
        return MonitorSpec(mode, f"fd:{options['fd']}", fd=int(options["fd"]))
    return _spec(mode, _socket_address(options), f"chardev:{label}")


def _legacy(text: str, mode: MonitorMode, chardevs: Mapping[str, str]) -> MonitorSpec:
    """`-qmp DEV` and `-monitor DEV` (qemu_chr_parse_compat, chardev/char.c)."""
    kind, colon, rest = text.partition(":")
    if kind == "mon" and colon:
        return _legacy(rest, mode, chardevs)
    if kind == "chardev" and colon:
        return _of_chardev(rest, mode, chardevs)
    if kind not in ("unix", "tcp", "telnet", "websocket") or not colon:
        return MonitorSpec(mode, text)
    address, _, tail = _protect(rest).partition(",")
    options = parse_options(tail.replace("\0", ",,"))
    address = address.replace("\0", ",")
    if options.get("server", "off") == "off":
        return MonitorSpec(mode, f"{text} (QEMU is the client)")
    if kind == "unix":
        options["path"] = address
    elif kind == "tcp":
        host, _, port = address.rpartition(":")
        options |= {"host": host.strip("[]"), "port": port}
    else:
        return MonitorSpec(mode, text)
    return _spec(mode, _socket_address(options), text)


def _socket_address(options: Mapping[str, str]) -> SocketTarget | None:
    if options.get("path"):
        prefix = "@" if options.get("abstract") == "on" else ""
        return UnixTarget(prefix + options["path"])
    port = options.get("port", "")
    if port.isascii() and port.isdigit() and 0 < int(port) < 65536:
        host = options.get("host", "")
        # A wildcard listener is reached through the loopback address.
        wildcard = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1", "*": "127.0.0.1"}
        return TcpTarget(wildcard.get(host, host), int(port))
    return None


def _spec(mode: MonitorMode, address: SocketTarget | None, text: str) -> MonitorSpec:
    return MonitorSpec(mode, text if address is None else str(address), address)
