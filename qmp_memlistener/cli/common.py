"""What the verbs share: options, output, running asyncio with clean ends."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import msgspec
import rich_click as click

from ..errors import InputError, MemListenerError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "Interrupted",
    "console",
    "duration",
    "json_option",
    "print_error",
    "printable",
    "print_json",
    "print_table",
    "read_text",
    "run_async",
    "span_text",
    "terminal_shape",
]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])


class Interrupted(Exception):
    """SIGINT or SIGTERM ended the verb before it was done."""


def json_option(function: F) -> F:
    """The `--json` option that every verb has."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print JSON on stdout, logs on stderr."
    )(function)


def console(*, stderr: bool = False) -> Console:
    """A rich console; on anything but a terminal, lines are as long as they need to be."""
    from rich.console import Console

    wide = None if sys.stdout.isatty() else 1000
    return Console(stderr=stderr, highlight=False, width=wide)


def printable(text: str) -> str:
    """Guests choose names: control characters in them must not reach the terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def print_json(document: object) -> None:
    """One JSON document or record on one line of stdout, written at once."""
    sys.stdout.buffer.write(msgspec.json.encode(document) + b"\n")
    sys.stdout.buffer.flush()


def print_error(error: MemListenerError) -> None:
    """The message and, on a line of its own, the remedy."""
    print(f"error: {error.message}", file=sys.stderr)
    if error.remedy:
        print(f"remedy: {error.remedy}", file=sys.stderr)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A plain table; long cells fold, ranges and numbers do not."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        keep = name in ("range", "size", "pid", "state", "strategy", "exposed")
        right = name in ("size", "pid", "ops")
        table.add_column(name, justify="right" if right else "left", no_wrap=keep, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console().print(table)


def read_text(path: str) -> str:
    """A text file, `-` for stdin; raises InputError."""
    try:
        if path == "-":
            data = sys.stdin.buffer.read()
        else:
            with open(path, "rb") as file:
                data = file.read()
    except OSError as exc:
        raise InputError(
            f"{path or 'the empty file name'} cannot be read: {exc.strerror}",
            remedy="name a file that is there and that you may read; - is stdin",
        ) from exc
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text", remedy="give the text QEMU printed") from None


def run_async(
    main: Coroutine[object, object, T], *, signalled: Callable[[], bool] = lambda: False
) -> T:
    """Run to the end; SIGINT and SIGTERM cancel `main`, which cleans up, and raise Interrupted.

    Unless `signalled`, which is asked first, says that it has seen to it.
    """

    import asyncio
    import signal

    async def supervised() -> T:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(main)
        hit = False

        def stop() -> None:
            nonlocal hit
            if signalled():
                return
            hit = True
            task.cancel()

        for sig in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sig, stop)
        try:
            return await task
        except asyncio.CancelledError:
            if hit:
                raise Interrupted from None
            raise

    return asyncio.run(supervised())


_UNITS = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000, "min": 60_000_000_000}


def duration(text: str) -> int:
    """`200ms`, `5s`, `2min` in nanoseconds, for an option's `type`."""
    m = re.fullmatch(r"(\d+(?:\.\d+)?)(ns|us|ms|s|min)?", text.strip())
    if m is None:
        raise click.BadParameter(f"{text!r} is not a duration such as 200ms, 5s or 2min")
    return round(float(m[1]) * _UNITS[m[2] or "s"])


def terminal_shape() -> tuple[int, bool]:
    """How wide the output is, and whether it can show block characters."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 80
    try:
        "▁█".encode(sys.stdout.encoding)
    except (LookupError, UnicodeEncodeError):
        return width, False
    return width, True


def span_text(start: int, size: int) -> str:
    """A range as QEMU prints it, first to last address."""
    return f"{start:#012x}-{start + size - 1:#012x}"
