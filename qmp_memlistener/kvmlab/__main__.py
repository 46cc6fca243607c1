"""`python -m qmp_memlistener.kvmlab race ...`: the lab with nothing but msgspec beside it.

For hosts and nested guests where the command line's libraries are not installed.  Prints the same
JSON documents as `qmp-memlistener lab ... --json`, with the same exit codes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import msgspec

from ..errors import MemListenerError
from ..text import json_bytes
from .programs import GuestKind
from .race import RaceOptions, none_ran, race_document, run_race

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code.  The options of `race` are the fields of `RaceOptions`."""
    parser = argparse.ArgumentParser(prog="python -m qmp_memlistener.kvmlab")
    racing = parser.add_subparsers(dest="verb", required=True).add_parser(
        "race",
        help="punch and fill a hole under each strategy",
        argument_default=argparse.SUPPRESS,
    )
    racing.add_argument("--json", action="store_true", help="the only form there is")
    racing.add_argument("--strategy", dest="strategies", type=_names, metavar="NAME[,NAME]")
    for field in msgspec.structs.fields(RaceOptions):
        option = f"--{field.name.replace('_', '-')}"
        if field.type is bool:
            racing.add_argument(option, action="store_true")
        elif field.name != "strategies":
            racing.add_argument(option, type=GuestKind if field.type is GuestKind else int)
    given = vars(parser.parse_args(argv))
    try:
        report = run_race(RaceOptions(**{k: given[k] for k in given if k not in ("verb", "json")}))
    except MemListenerError as exc:
        return _tell(exc)
    sys.stdout.write(json_bytes(race_document(report)).decode() + "\n")
    problem = none_ran((r.name, r.skipped) for r in report.results)
    return 0 if problem is None else _tell(problem)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _tell(error: MemListenerError) -> int:
    """Print it; its exit code."""
    sys.stderr.write(f"error: {error.message}\n")
    if error.remedy:
        sys.stderr.write(f"remedy: {error.remedy}\n")
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
