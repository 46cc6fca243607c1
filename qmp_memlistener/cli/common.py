"""What the verbs share: options, output, running asyncio with clean ends."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import rich_click as click

from ..errors import InputError, MemListenerError, OperationFailed, not_created
from ..text import json_bytes, printable, quoted, valid_text
from .signals import Interrupted, signals

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem
    from rich.console import Console

__all__ = [
    "READER_GONE",
    "Interrupted",
    "complete_file",
    "complete_target",
    "console",
    "duration",
    "json_option",
    "new_file",
    "page_option",
    "print_error",
    "printable",
    "print_json",
    "print_table",
    "print_traceback",
    "read_text",
    "run_async",
    "say",
    "target_argument",
    "terminal_shape",
]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])

_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+=,-]+")

READER_GONE = (errno.EPIPE, errno.EIO)
"""Writing fails so when the pipe's other end or the terminal is closed."""


def json_option(function: F) -> F:
    """The `--json` option that every verb has."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print JSON on stdout, logs on stderr."
    )(function)


def target_argument(*, required: bool = True) -> Callable[[F], F]:
    """The TARGET of a verb; a shell completes it with the guests that run here."""
    return click.argument("target", required=required, shell_complete=complete_target)


def complete_target(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[str]:
    """What begins like that and leads to a running guest.

    Other users name their guests, and bash puts what is completed into the command line as it is:
    a name with a character that a shell acts on is not offered.
    """
    from collections import Counter

    from ..qmp import find_guests
    from ..qmp.resolving import targets_of

    guests = find_guests()
    names = Counter(guest.name for guest in guests if guest.name)
    found = (target for guest in guests for target in targets_of(guest, names))
    return [t for t in found if t.startswith(incomplete) and _PLAIN.fullmatch(t)]


def complete_file(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Leaves it to the shell, which knows files best."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def page_option(function: F) -> F:
    """`-o`; the verb gets a path or None as `output`."""
    return click.option(
        "-o", "--output", type=click.Path(dir_okay=False), metavar="PAGE",
        help="Write a page for a browser; a file that is there is not overwritten.",
    )(function)  # fmt: skip


@contextmanager
def new_file(path: str | None) -> Iterator[Callable[[str], None]]:
    """A function that writes the text of a new file, which only its owner may read.

    The file is made at once, so that a path that is of no use is refused before the work, and is
    gone again when nothing was written.  Without a path nothing is done.  Raises InputError,
    MissingPrerequisite, OperationFailed.
    """
    if path is None:
        yield lambda _text: None
        return
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as exc:
        raise not_created(path, exc, if_exists="name a new file") from exc
    written = False

    def write(text: str) -> None:
        nonlocal written
        data = valid_text(text).encode()
        try:
            while data:
                data = data[os.write(fd, data) :]
        except OSError as exc:
            raise OperationFailed(
                f"{path} cannot be written: {exc.strerror}", remedy="make room and try again"
            ) from exc
        written = True

    try:
        yield write
    finally:
        os.close(fd)
        if not written:
            with suppress(FileNotFoundError):
                os.unlink(path)


def console() -> Console:
    """A rich console; on anything but a terminal, lines are as long as they need to be."""
    from rich.console import Console

    wide = None if sys.stdout.isatty() else 1000
    return Console(highlight=False, width=wide)


def say(*lines: str, err: bool = False) -> None:
    """Print lines, each on a line of its own whatever is in it; an empty line when there is none.

    This, `print_table`, `print_error` and `print_json` are all that writes to the user's terminal.
    A closed stderr is no reason to end.
    """
    for line in lines or ("",):
        try:
            click.echo(printable(line), err=err)
        except OSError:
            if not err:
                raise


def print_json(document: object) -> None:
    """One JSON document or record on one line of stdout, written at once.

    What `printable` would escape is escaped as JSON does it: the values are the same, but for what
    is no Unicode (`text`).
    """
    line = json_bytes(document)
    if not line.isascii() or b"\x7f" in line:
        line = "".join(map(_json_escaped, line.decode())).encode()
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def _json_escaped(c: str) -> str:
    return c if c.isprintable() else json.dumps(c)[1:-1].replace("\x7f", "\\u007f")


def print_error(error: MemListenerError) -> None:
    """The message and, on a line of its own, the remedy."""
    say(f"error: {error.message}", err=True)
    if error.remedy:
        say(f"remedy: {error.remedy}", err=True)


def print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """For `sys.excepthook`: an error that should not be can have a guest's words in it, too."""
    from traceback import format_exception

    say(*"".join(format_exception(kind, error, trace)).splitlines(), err=True)


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
            remedy="name an existing file that you may read; - is stdin",
        ) from exc
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text", remedy="give the text QEMU printed") from None


def run_async(
    main: Coroutine[object, object, T],
    *,
    signalled: Callable[[], bool] = lambda: False,
    cancels: int = 1,
) -> T:
    """Run to the end; a signal cancels `main`, which cleans up, and raises Interrupted.

    Unless `signalled`, which is asked first, says that it has seen to it.  Only the first `cancels`
    signals cancel, those counted that a block inside `main` has seen to; one more ends the process
    at once.
    """

    import asyncio

    loop: asyncio.AbstractEventLoop | None = None
    task: asyncio.Future[T] | None = None
    asked = done = taken = 0
    before = signals.taken

    def end() -> bool:
        nonlocal asked, taken
        asked += 1
        inside = signals.taken - before - taken
        if done == cancels or asked > cancels + 1 or inside >= cancels:
            return False
        taken += 1
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(stop)
        return True

    def stop() -> None:
        nonlocal done
        if task is not None and not signalled():
            done += 1
            task.cancel()

    async def supervised() -> T:
        nonlocal loop, task
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(main)
        if asked:  # before there was a loop
            stop()
        try:
            return await task
        except asyncio.CancelledError:
            if done:
                raise Interrupted from None
            raise

    with signals.asking(end):
        return asyncio.run(supervised())


_UNITS = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000, "min": 60_000_000_000}


def duration(text: str) -> int:
    """`200ms`, `5s`, `2min` in nanoseconds, for an option's `type`."""
    m = re.fullmatch(r"(\d+(?:\.\d+)?)(ns|us|ms|s|min)?", text.strip())
    if m is None:
        raise click.BadParameter(f"{quoted(text)} is not a duration such as 200ms, 5s or 2min")
    return round(float(m[1]) * _UNITS[m[2] or "s"])


def terminal_shape() -> tuple[int, bool]:
    """How wide the output is, and whether it can show block characters."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 80
    try:
        "▁█".encode(sys.stdout.encoding)
    except (LookupError, UnicodeEncodeError):
        return width, False
    return width, True
