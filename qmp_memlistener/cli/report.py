"""`report`: what a recording holds, in short: who, how long, what went wrong, which stalls."""

from __future__ import annotations

import rich_click as click

from ..records import Recording
from .common import json_option, print_json, say, terminal_shape


@click.command("report")
@click.argument("recording")
@click.option("--histograms", is_flag=True, help="A histogram with counts for each kind of stall.")
@click.option("--longest", type=click.IntRange(min=0), default=5, show_default=True, metavar="N",
              help="Show the N longest stalls.")  # fmt: skip
@json_option
def command(recording: str, histograms: bool, longest: int, as_json: bool) -> None:
    """Show what a RECORDING holds: the guest, losses, violations, and statistics of its stalls.

    The recording may still be growing; what is in it so far is reported. Where the bounds of a
    length are more than 10 % apart, both are shown. The longest stalls are those with the largest
    lower bounds.

    Example: qmp-memlistener report boot.jsonl
    """
    from ..reports.recording import Contents

    contents = Contents(Recording(recording), longest)
    if as_json:
        print_json(contents.document())
        return
    width, unicode = terminal_shape()
    for line in contents.lines(histograms=histograms, width=width, unicode=unicode):
        say(line)
