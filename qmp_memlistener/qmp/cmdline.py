"""PURE: what a QEMU's command line says about its monitors, accelerator, machine, name and log.

Only the options this project needs are understood.  Everything here is text in, values out:
reading /proc, and the files that -readconfig names, is `discovery`'s job; option and chardev
syntax is that of `chardevs`.  Options after softmmu/vl.c, system/vl.c and qemu-options.hx.
"""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from .chardevs import (
    Chardev,
    chardev_of_options,
    chardev_of_text,
    config_groups,
    is_on,
    options_text,
    parse_options,
)
from .targets import SocketTarget

__all__ = [
    "CommandLine",
    "MonitorMode",
    "MonitorSpec",
    "has_qemu_options",
    "is_qemu_name",
    "parse_arguments",
    "program_index",
]

# qemu-system-x86_64, qemu-acme-system-x86_64, .qemu-system-x86_64-wrapped, qemu-kvm, kvm
_QEMU_BINARY = re.compile(r"\.?(qemu-([\w.+-]+-)?system-[\w.+-]+|qemu-kvm[\w.+-]*|kvm)")
_LOADER = re.compile(r"ld-linux[\w.-]*|ld64?\.so[\w.-]*|ld-musl[\w.-]*|ld-\d[\w.]*\.so")


class MonitorMode(StrEnum):
    """`control` speaks QMP, `readline` is a human monitor (QEMU's own words for `-mon mode=`)."""

    CONTROL = "control"
    READLINE = "readline"


@dataclass(frozen=True, slots=True)
class MonitorSpec:
    """One monitor.  `address` is None when it cannot be connected to (stdio, a pty, QEMU as
    client).

    `fd` is the number of a listening socket that QEMU inherited (libvirt starts it so); the
    address then has to be read from /proc.  A UNIX path is as given: relative to QEMU's cwd.
    """

    mode: MonitorMode
    text: str
    address: SocketTarget | None = None
    fd: int | None = None


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What was understood.  `accels` in order of preference, empty when not given.

    `guest_files` are paths that character devices write to, `guest_on_stdout` says that one writes
    to standard output: what comes out of them is the guest's choice.  `stdout_unused`: for certain
    nothing of the guest's is shown there.  `unread` are files for -readconfig whose content is not
    known here.
    """

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
    guest_files: tuple[str, ...] = ()
    guest_on_stdout: bool = False
    stdout_unused: bool = False
    unread: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """For people: what may be missing here."""
        return tuple(
            f"monitors, machine and accelerator may be in {f}, which cannot be read or has changed "
            "since QEMU read it"
            for f in self.unread
        )

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
        """The accelerator, when it was given and leaves no choice.

        None says that nothing is known: without one QEMU prefers tcg or kvm by the name of its
        binary and by what was built in (configure_accelerators, system/vl.c).
        """
        return self.accels[0] if len(self.accels) == 1 else None


ReadConfig = Callable[[str], str | None]
"""The text of a file for -readconfig, None when what QEMU read is not known."""


def parse_arguments(
    binary: str, args: Sequence[str], read_config: ReadConfig = lambda _: None
) -> CommandLine:
    """What QEMU makes of its arguments, whatever it is called."""
    values = _collect(args)
    unread = _add_configs(values, read_config)
    chardevs = dict(
        found for found in map(chardev_of_options, values.get("chardev", ())) if found is not None
    )
    outputs = [*chardevs.values(), *_legacy_outputs(values)]
    on_stdout = "nographic" in values or any(c.writes_stdout for c in outputs)
    name = _last(values, "name")
    machine, accels = _machine(values)
    message = parse_options(_last(values, "msg") or "", "timestamp")
    return CommandLine(
        binary=binary,
        name=parse_options(name, "guest").get("guest") if name is not None else None,
        machine=machine,
        accels=accels,
        monitors=tuple(_monitors(values, chardevs)),
        log_file=_last(values, "D"),
        log_items=_last(values, "d"),
        traces="trace" in values,
        timestamps=is_on(message, "timestamp"),
        daemonize="daemonize" in values,
        guest_files=tuple(dict.fromkeys(f for c in outputs for f in c.files)),
        guest_on_stdout=on_stdout,
        # without -nodefaults, and with other displays, QEMU puts things there that nobody named
        stdout_unused=not (on_stdout or unread)
        and "nodefaults" in values
        and values.get("display", [])[-1:] == ["none"],
        unread=unread,
    )


def is_qemu_name(path: str) -> bool:
    """A name that QEMU system emulators have."""
    return _QEMU_BINARY.fullmatch(os.path.basename(path)) is not None


def has_qemu_options(args: Sequence[str]) -> bool:
    """There is an option that hardly any other program has."""
    return any(a[:2] != "--" and a[:1] == "-" and a[1:] in _TELLING for a in args)


def program_index(argv: Sequence[str]) -> int | None:
    """Where in `argv` the program is: behind a dynamic loader and its options, else the first."""
    if not argv:
        return None
    if not _LOADER.fullmatch(os.path.basename(argv[0])):
        return 0
    index = 1
    while index < len(argv):
        argument = argv[index]
        if argument in ("--library-path", "--argv0", "--preload", "--audit", "--inhibit-rpath"):
            index += 2
        elif argument.startswith("--"):
            index += 1
        else:
            return index
    return None


_FLAGS = frozenset(("enable-kvm", "daemonize", "nographic", "nodefaults"))
_WITH_VALUE = frozenset(
    {"qmp", "qmp-pretty", "monitor", "mon", "chardev", "accel", "machine", "M", "display"}
    | {"serial", "parallel", "debugcon", "name", "D", "d", "trace", "msg", "readconfig"}
    # not wanted, but what follows them is no option whatever it looks like
    | {"append", "kernel", "initrd", "dtb", "device", "drive", "object", "m", "cpu", "smp"}
)
_TELLING = frozenset(
    {"qmp", "qmp-pretty", "chardev", "accel", "enable-kvm", "nodefaults", "readconfig"}
)
_OF_CONFIG = ("chardev", "mon", "machine", "accel", "name", "msg", "trace")


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


def _add_configs(values: dict[str, list[str]], read_config: ReadConfig) -> tuple[str, ...]:
    """Add what the files for -readconfig say, as if it were options; returns those not read."""
    unread = []
    for path in values.get("readconfig", ()):
        text = read_config(path)
        if text is None:
            unread.append(path)
            continue
        for group, options in config_groups(text):
            if group in _OF_CONFIG:
                values.setdefault(group, []).append(options_text(options))
    return tuple(unread)


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


def _legacy_outputs(values: Mapping[str, list[str]]) -> list[Chardev]:
    return [
        chardev_of_text(text)
        for option in ("serial", "parallel", "debugcon", "monitor")
        for text in values.get(option, ())
    ]


def _monitors(
    values: Mapping[str, list[str]], chardevs: Mapping[str, Chardev]
) -> list[MonitorSpec]:
    found = []
    for option, mode in (
        ("qmp", MonitorMode.CONTROL),
        ("qmp-pretty", MonitorMode.CONTROL),
        ("monitor", MonitorMode.READLINE),
    ):
        found += [_spec(mode, chardev_of_text(t), chardevs) for t in values.get(option, ())]
    # `mon:` puts a human monitor on the same socket as the guest's port
    found += [
        _spec(MonitorMode.READLINE, chardev_of_text(text), chardevs)
        for option in ("serial", "parallel", "debugcon")
        for text in values.get(option, ())
        if text.startswith("mon:")
    ]
    for text in values.get("mon", ()):
        options = _mon_options(text)
        mode = MonitorMode.CONTROL if options.get("mode") == "control" else MonitorMode.READLINE
        label = options.get("chardev", "")
        found.append(_spec(mode, Chardev("", label, refers_to=label), chardevs))
    return found


def _mon_options(text: str) -> Mapping[str, str]:
    if not text.startswith("{"):
        return parse_options(text, "chardev")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(document, dict):
        return {}
    return {str(key): value for key, value in document.items() if isinstance(value, str)}


def _spec(mode: MonitorMode, chardev: Chardev, chardevs: Mapping[str, Chardev]) -> MonitorSpec:
    if not chardev.backend:
        label = chardev.refers_to
        found = chardevs.get(label)
        if found is None:
            return MonitorSpec(mode, f"chardev:{label}")
        if found.backend != "socket":
            return MonitorSpec(mode, found.backend)
        chardev = found
    if chardev.backend != "socket":
        return MonitorSpec(mode, chardev.text)
    if not chardev.listens:
        return MonitorSpec(mode, f"{chardev.text} (QEMU is the client)")
    if chardev.fd is not None:
        return MonitorSpec(mode, f"fd:{chardev.fd}", fd=chardev.fd)
    address = chardev.address
    return MonitorSpec(mode, chardev.text if address is None else str(address), address)
