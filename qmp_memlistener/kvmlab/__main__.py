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
from .programs import GuestKind
from .race import RaceOptions, none_ran, race_document, run_race

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m qmp_memlistener.kvmlab")
    verbs = parser.add_subparsers(dest="verb", required=True)
    racing = verbs.add_parser("race", help="punch and fill a hole under each strategy")
    racing.add_argument("--strategy", default="all", metavar="NAME[,NAME]")
    racing.add_argument("--updates", type=int, default=400)
    racing.add_argument("--guest", type=GuestKind, default=GuestKind.DATA)
    racing.add_argument("--vcpus", type=int, default=1)
    racing.add_argument("--slot-size", type=int, default=64 << 20, metavar="BYTES")
    racing.add_argument("--hole-size", type=int, default=4096, metavar="BYTES")
    racing.add_argument("--hole-offset", type=int, metavar="BYTES")
    racing.add_argument("--slots", type=int, default=0)
    for name in ("dirty-log", "rings", "populate", "touch-hole", "json"):
        racing.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args(argv)
    try:
        report = run_race(
            RaceOptions(
                strategies=tuple(options.strategy.split(",")),
                updates=options.updates,
                guest=options.guest,
                vcpus=options.vcpus,
                slot_size=options.slot_size,
                hole_size=options.hole_size,
                hole_offset=options.hole_offset,
                slots=options.slots,
                dirty_log=options.dirty_log,
                rings=options.rings,
                populate=options.populate,
                touch_hole=options.touch_hole,
            )
        )
    except MemListenerError as exc:
        return _tell(exc)
    sys.stdout.write(msgspec.json.encode(race_document(report)).decode() + "\n")
    problem = none_ran((r.name, r.skipped) for r in report.results)
    return 0 if problem is None else _tell(problem)


def _tell(error: MemListenerError) -> int:
    """Print it; its exit code."""
    sys.stderr.write(f"error: {error.message}\n")
    if error.remedy:
        sys.stderr.write(f"remedy: {error.remedy}\n")
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
