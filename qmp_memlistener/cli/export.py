"""`export`: a recording in a form that other tools read."""

from __future__ import annotations

import sys

import rich_click as click

from ..errors import InputError
from ..text import count_text
from .common import complete_file, json_option, print_json, say


@click.command("export")
@click.argument("recording", shell_complete=complete_file)
@click.option("--format", "to", required=True,
              type=click.Choice(["perfetto", "csv", "parquet", "openmetrics"]),
              help="perfetto: a trace for ui.perfetto.dev; csv, parquet: a table for each record "
              "type; openmetrics: totals and histograms at the end of the recording.")  # fmt: skip
@click.option("-o", "--output", required=True, metavar="PATH", shell_complete=complete_file,
              help="A new file; for tables a new directory, or with --type a file. Standard output "
              "is -, for text.")  # fmt: skip
@click.option("--type", "only", metavar="TYPE", help="Only the table of this record type.")
@json_option
def command(recording: str, to: str, output: str, only: str | None, as_json: bool) -> None:
    """Export a RECORDING to Perfetto, CSV, Parquet or OpenMetrics.

    Nothing is computed anew, and what the recording does not hold is absent there, too. The
    recording may be packed, or still be growing. PATH is there when it is complete; what exists is
    not overwritten.

    Example: qmp-memlistener export boot.jsonl --format perfetto -o boot.pftrace
    """
    from ..exports import Format, export

    if as_json and output == "-":
        raise InputError(
            "--json and the export cannot both go to standard output",
            remedy="leave --json out, or name a file",
        )
    sys.stdout.flush()
    done = export(recording, Format(to), output, only=only, stdout=sys.stdout.buffer)
    if as_json:
        print_json(
            {
                "schema": 1,
                "recording": recording,
                "format": to,
                "output": output,
                "records": dict(sorted(done.records.items())),
                "skipped": done.skipped,
                "truncated": done.truncated,
            }
        )
        return
    aside = output == "-"
    if not aside:
        count = count_text(done.records.total(), "record")
        say(f"{output}: {count} of {count_text(len(done.records), 'type')}")
    if done.truncated:
        say("the last line is cut off and was left out", err=aside)
    if done.skipped:
        skipped = count_text(done.skipped, "record")
        say(f"{skipped} of a type that this version does not know: left out", err=aside)
