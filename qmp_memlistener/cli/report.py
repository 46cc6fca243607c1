"""`report`: what a recording, a comparison or a race holds, in short or as a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec
import rich_click as click

from ..errors import InputError
from ..inputs import open_input
from ..records import Recording, is_recording
from .common import json_option, new_file, page_option, print_json, say, terminal_shape

if TYPE_CHECKING:
    from ..kvmlab.race import RaceReport
    from ..updates.compare import Comparison

_MOST_BYTES = 256 << 20
_ON_PAGE = 20


@click.command("report")
@click.argument("file")
@click.option("--histograms", is_flag=True, help="A histogram with counts for each kind of stall.")
@click.option("--longest", type=click.IntRange(min=0), default=5, show_default=True, metavar="N",
              help="Show the N longest stalls; a page has 20 at least.")  # fmt: skip
@click.option("--full", is_flag=True, help="Of a comparison or a race, all tables.")
@page_option
@json_option
def command(
    file: str, histograms: bool, longest: int, full: bool, output: str | None, as_json: bool
) -> None:
    """Show what FILE holds: a recording, or what `compare` or `lab race` printed with --json.

    The recording may still be growing; what is in it so far is reported. Where the bounds of a
    length are more than 10 % apart, both are shown. The longest stalls are those with the largest
    lower bounds.

    With -o it becomes a page for a browser, which needs nothing else and opens offline.

    Example: qmp-memlistener report boot.jsonl -o boot.html
    """
    found = _document(file)
    with new_file(output) as write:
        if found is None:
            document, page, lines = _recording(file, histograms, longest, paged=output is not None)
        else:
            document, page, lines = _result(found, full=full)
        if output is not None:
            write(page())
    if as_json:
        print_json(document())
    elif output is None:
        for line in lines():
            say(line)


Views = tuple[Callable[[], object], Callable[[], str], Callable[[], Iterable[str]]]
"""The JSON document, the page and the lines for people, made when they are wanted."""


def _recording(file: str, histograms: bool, longest: int, *, paged: bool) -> Views:
    from ..reports.recording import Contents

    recording = Recording(file)
    width, unicode = terminal_shape()
    if not paged:
        contents = Contents(recording, longest)
        return (
            contents.document,
            str,
            lambda: contents.lines(histograms=histograms, width=width, unicode=unicode),
        )
    from ..page import Lanes, recording_page

    lanes = Lanes(recording.header.monotonic_ns, recording.header.stamp_bound_ns or 0)
    held = Contents(recording, max(longest, _ON_PAGE), lanes.take)
    return held.document, lambda: recording_page(held, lanes), list


def _result(found: Comparison | RaceReport, *, full: bool) -> Views:
    from ..kvmlab.race import race_document
    from ..page import comparison_page, race_page
    from ..reports.compare import comparison_lines
    from ..reports.lab import race_lines
    from ..updates.compare import Comparison

    if isinstance(found, Comparison):
        return (
            lambda: found,
            lambda: comparison_page(found, None),
            lambda: comparison_lines(found, "comparison", full=full),
        )
    return (
        lambda: race_document(found),
        lambda: race_page(found),
        lambda: race_lines(found, full=full),
    )


class _Keys(msgspec.Struct):
    """What tells such documents apart."""

    rounds: msgspec.Raw = msgspec.Raw()
    differences: msgspec.Raw = msgspec.Raw()
    strategies: msgspec.Raw = msgspec.Raw()
    ram_lost_bytes: int | None = None


def _document(path: str) -> Comparison | RaceReport | None:
    """A comparison or a race; None where it is anything else.  Raises InputError."""
    if path == "-" or is_recording(path):
        return None
    with open_input(path) as file:
        if not file.read(1 << 12).lstrip().startswith(b"{"):
            return None
    with open_input(path) as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise InputError(
            f"{path} is larger than {_MOST_BYTES >> 20} MiB and no recording",
            remedy="give what one run of `compare` or `lab race` printed with --json",
        )
    try:
        keys = msgspec.json.decode(text, type=_Keys)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    try:
        if bytes(keys.rounds) and bytes(keys.differences):
            from ..updates.compare import Comparison

            return msgspec.json.decode(text, type=Comparison)
        if bytes(keys.strategies) and keys.ram_lost_bytes is not None:
            from ..kvmlab.race import race_of

            return race_of(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InputError(
            f"{path} is not what `compare` or `lab race` prints with --json: {exc}",
            remedy="give the file unchanged",
        ) from None
    return None
