"""Human-monitor commands over QMP, with arguments that stay single arguments, and the memory map.

HMP is a line of text.  `get_str` (monitor/hmp.c) splits it at white space unless the argument
stands in double quotes, where only \\n, \\r, \\\\, \\' and \\" may follow a backslash, and cuts
every string after 1023 bytes.  So each argument is quoted unless it is plainly harmless, and what
cannot be said safely is refused before anything is sent.  Errors are text too; they are told
apart by the forms that monitor/hmp.c and hmp_handle_error print.

Of the map only `info mtree -o -D` is ever sent: `info mtree -f` leaks a FlatView reference per call
(measured on 7.2 and 10.0.2: a device whose region sits in a leaked view is never finalised).
"""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass

from ..errors import CommandFailed, InputError, ProtocolViolation
from ..text import quoted
from .connection import Monitor, Reply

__all__ = [
    "Flag",
    "IdleRoundTrip",
    "Snapshot",
    "hmp",
    "hmp_line",
    "hmp_timed",
    "measure_idle",
    "take_snapshot",
]

_COMMAND = re.compile(r"[a-z][a-z0-9_-]*(?: [a-z][a-z0-9_-]*)*")
_PLAIN = re.compile(r"[A-Za-z0-9_./:=,+@%][A-Za-z0-9_./:=,+@%-]*")
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r"})
# char buf[1024] in monitor_parse_arguments(); one byte ends the string.
_MAX_BYTES = 1023
_SAMPLES = 7

_ERROR = re.compile(
    r"""\A\s*(?:
        Error:\ .*
      | unknown\ command:\ .*
      | Command\ .*\ (?:is\ not\ available|not\ available\ until).*
      | Try\ "help\ .*
      | [\w-]+:\ (?:extraneous\ characters\ at\ the\ end\ of\ line
                  | (?:filename|block\ device\ name|string)\ expected
                  | unsupported\ option\ -.*
                  | value\ expected\ for\ -.*
                  | unknown\ type\ .*)
      | invalid\ char.*
      | Expected\ 'on'\ or\ 'off'
    )\s*$""",
    re.VERBOSE | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Flag:
    """An option such as `-o`; it must not be quoted, or HMP takes it for a string."""

    letter: str


async def hmp(
    monitor: Monitor,
    command: str,
    *args: str | int | Flag,
    quiet: bool = False,
    deadline: float = 10.0,
) -> str:
    """Run a human-monitor command and return what it prints (lines end CRLF).

    An `int` goes as a number, a `str` as one string whatever it holds, a `Flag` as an option.
    `quiet` says that this command prints nothing when it works: then any text is its error.
    Raises InputError for an argument that HMP cannot take, CommandFailed when QEMU refuses, and
    as `Monitor.timed` does.
    """
    reply = await hmp_timed(monitor, command, *args, quiet=quiet, deadline=deadline)
    return str(reply.value)


async def hmp_timed(
    monitor: Monitor,
    command: str,
    *args: str | int | Flag,
    quiet: bool = False,
    deadline: float = 10.0,
) -> Reply:
    """As `hmp`, with the times of the command; `value` is the text."""
    line = hmp_line(command, *args)
    reply = await monitor.timed("human-monitor-command", {"command-line": line}, deadline=deadline)
    if not isinstance(reply.value, str):
        raise ProtocolViolation(f"{monitor.target} returned no text for {quoted(command)}")
    error = _error_of(reply.value, quiet)
    if error is not None:
        raise CommandFailed(command, "HMP", error)
    return reply


def hmp_line(command: str, *args: str | int | Flag) -> str:
    """The command line for HMP.  Raises InputError when an argument cannot be said in HMP.

    `command` is written by a programmer, in lower case, sub-commands included ("info mtree").
    """
    if not _COMMAND.fullmatch(command):
        raise InputError(f"not the name of a human-monitor command: {quoted(command)}")
    return " ".join([command, *map(_word, args)])


def _word(arg: str | int | Flag) -> str:
    if isinstance(arg, Flag):
        if not (len(arg.letter) == 1 and arg.letter.isascii() and arg.letter.isalpha()):
            raise InputError(f"not an option of a human-monitor command: {quoted(arg.letter)}")
        return f"-{arg.letter}"
    if isinstance(arg, int):
        # Unsigned 64 bit is what get_expr() reads; in hexadecimal no octal surprise is possible.
        if not 0 <= arg < 1 << 64:
            raise InputError(f"out of range for a human-monitor command: {arg}")
        return hex(arg)
    if _PLAIN.fullmatch(arg) and len(arg) <= _MAX_BYTES:
        return arg
    try:
        size = len(arg.encode())
    except UnicodeEncodeError:
        raise InputError(f"not valid text for a human-monitor command: {quoted(arg)}") from None
    if size > _MAX_BYTES:
        raise InputError(
            f"an argument of {size} bytes is too long for a human-monitor command",
            remedy=f"QEMU cuts it after {_MAX_BYTES} bytes",
        )
    if any(ord(c) < 0x20 and c not in "\n\r\t" for c in arg) or "\x7f" in arg:
        raise InputError(f"a control character in an argument: {quoted(arg)}")
    return f'"{arg.translate(_ESCAPES)}"'


def _error_of(text: str, quiet: bool) -> str | None:
    match = _ERROR.match(text)
    if match is not None:
        return match[0].strip()
    if quiet and text.strip():
        return text.strip().splitlines()[0]
    return None


@dataclass(frozen=True, slots=True)
class IdleRoundTrip:
    """Round trip of a command that does next to nothing: what the way there and back costs."""

    median_ns: int
    samples: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`info mtree -o -D` as printed, taken between `t_start_ns` and `t_end_ns`.

    `bql_cost_ns` is an upper bound for how long the Big QEMU Lock was held for it: the measured
    round trip less the idle one (sending and decoding the text are still in it); None when no
    idle round trip was given.
    """

    text: str
    t_start_ns: int
    t_end_ns: int
    bql_cost_ns: int | None

    @property
    def duration_ns(self) -> int:
        return self.t_end_ns - self.t_start_ns


async def measure_idle(monitor: Monitor) -> IdleRoundTrip:
    """The median round trip of `query-name`, an in-band command that takes no time in QEMU."""
    durations = [(await monitor.timed("query-name")).duration_ns for _ in range(_SAMPLES)]
    return IdleRoundTrip(int(statistics.median(durations)), _SAMPLES)


async def take_snapshot(
    monitor: Monitor, idle: IdleRoundTrip | None = None, *, deadline: float = 10.0
) -> Snapshot:
    """Read the region tree with owners and disabled regions.

    Costs the guest `Snapshot.bql_cost_ns` at most (0.6 to 1.3 ms on a small pc or q35, 4.5 to
    8.4 ms with 32 root ports).  Raises CommandFailed, DeadlineExceeded, TargetLost.
    """
    reply = await hmp_timed(monitor, "info mtree", Flag("o"), Flag("D"), deadline=deadline)
    return Snapshot(
        text=str(reply.value),
        t_start_ns=reply.t_start_ns,
        t_end_ns=reply.t_end_ns,
        bql_cost_ns=None if idle is None else max(0, reply.duration_ns - idle.median_ns),
    )
