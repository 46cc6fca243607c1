"""`plan`: the slot operations of a transition under every strategy, and what they expose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import rich_click as click

from ..errors import InputError
from .common import json_option, print_json, print_table, read_text, say

if TYPE_CHECKING:
    from ..memslots import LogChange, Plan, Rules, SlotTable
    from ..topology import FlatView

Planner = Callable[
    ["dict[int, FlatView]", "dict[int, FlatView]", "SlotTable | None", "Rules", "LogChange | None"],
    "list[Plan]",
]
STRATEGIES = ("all", "qemu", "pause", "batch-incremental", "batch-full", "hole", "hole-split")


@click.command("plan")
@click.argument("recording", required=False)
@click.option("--before", metavar="FILE", help="`info mtree` output before the transition.")
@click.option("--after", metavar="FILE", help="`info mtree` output after it.")
@click.option("--slots", metavar="FILE", help="JSON list of the slots before; default: as QEMU "
              "gives them from an empty table.")  # fmt: skip
@click.option("--transition", type=int, metavar="SEQ", help="Which transition of the recording; "
              "default: all.")  # fmt: skip
@click.option("--rules", default=None, metavar="7.2|8.0", help="Order of QEMU up to 7.2, or from "
              "8.0; default 8.0, or the recording's.")  # fmt: skip
@click.option("--strategy", type=click.Choice(STRATEGIES), default="all", show_default=True)
@click.option("--log-start", multiple=True, metavar="REGION", help="Dirty logging of a region "
              "starts with the transition; `all` for a migration.")  # fmt: skip
@click.option("--log-stop", multiple=True, metavar="REGION", help="The same, stops.")
@click.option("--bitmaps", type=click.Choice(["dropped", "handed-back"]), default="dropped",
              show_default=True,
              help="What a batch does with the bitmaps of removed slots.")  # fmt: skip
@click.option("--max-holes", type=click.IntRange(min=0), default=None, metavar="N",
              help="Holes a slot may have under `hole`.")  # fmt: skip
@json_option
def command(
    recording: str | None,
    before: str | None,
    after: str | None,
    slots: str | None,
    transition: int | None,
    rules: str | None,
    strategy: str,
    log_start: tuple[str, ...],
    log_stop: tuple[str, ...],
    bitmaps: str,
    max_holes: int | None,
    as_json: bool,
) -> None:
    """Plan a transition: exact KVM slot operations, exposure, slot ids and dirty bitmaps.

    The transition is given by two files with `info mtree` output, or by a RECORDING, or by a log
    of QEMU with `kvm_set_user_memory` lines.

    Example: qmp-memlistener plan --before a.txt --after b.txt --rules 7.2 --strategy qemu
    """
    from ..memslots import DEFAULT_MAX_HOLES, Rules, SlotTable
    from ..reports.plan import plan_document

    asked = _log_change(log_start, log_stop)
    limit = DEFAULT_MAX_HOLES if max_holes is None else max_holes

    def planned(
        old: dict[int, FlatView],
        new: dict[int, FlatView],
        table: SlotTable | None,
        by: Rules,
        logged: LogChange | None,
    ) -> list[Plan]:
        from ..memslots import plan, plan_all

        log = asked or logged
        back = bitmaps == "handed-back"
        if strategy == "all":
            every = plan_all(
                old, new, table=table, rules=by, log=log, hand_back=back, max_holes=limit
            )
            return list(every)
        return [
            plan(
                old, new, strategy, table=table, rules=by, log=log, hand_back=back,
                max_holes=limit,
            )
        ]  # fmt: skip

    if recording is not None:
        if before or after or slots:
            raise InputError(
                "a RECORDING and --before, --after or --slots exclude each other",
                remedy="see `qmp-memlistener plan --help`",
            )
        splits = strategy in ("all", "hole-split")
        results = _of_recording(recording, transition, rules, planned, splits)
        if as_json:
            documents = [{"seq": seq, **plan_document(plans)} for seq, plans in results]
            print_json({"schema": 1, "transitions": documents})
        else:
            for seq, plans in results:
                say("", f"transition {seq}")
                print_plans(plans)
        return
    if before is None or after is None:
        raise InputError(
            "plan needs --before FILE and --after FILE, or a RECORDING",
            remedy="see `qmp-memlistener plan --help`",
        )
    if transition is not None:
        raise InputError(
            "--transition goes with a RECORDING", remedy="see `qmp-memlistener plan --help`"
        )
    table = SlotTable.from_json(read_text(slots)) if slots else None
    plans = planned(
        _views(before), _views(after), table, Rules.parse("8.0" if rules is None else rules), None
    )
    if as_json:
        print_json(plan_document(plans))
    else:
        print_plans(plans)


def _log_change(start: Sequence[str], stop: Sequence[str]) -> LogChange | None:
    from ..memslots import LogChange

    if not start and not stop:
        return None
    if "all" in start and "all" in stop:
        raise InputError(
            "--log-start all and --log-stop all contradict each other",
            remedy="leave one of them out",
        )
    migration = True if "all" in start else False if "all" in stop else None
    return LogChange(frozenset(start) - {"all"}, frozenset(stop) - {"all"}, migration)


def _views(path: str) -> dict[int, FlatView]:
    """The address spaces of one file that KVM has slots for, by KVM's id."""
    from ..inputs import read_dump
    from ..memslots import ADDRESS_SPACES
    from ..topology import read_maps

    maps = read_maps(read_dump(path), list(ADDRESS_SPACES))
    if "memory" not in maps:
        raise InputError(
            f"{path} has no address space `memory`",
            remedy="give the whole output of `info mtree`",
        )
    return {ADDRESS_SPACES[name]: m.view for name, m in maps.items()}


def print_plans(plans: Sequence[Plan]) -> None:
    from ..reports.plan import COLUMNS, plan_lines, plan_rows

    say(*plan_lines(plans), "")
    print_table(COLUMNS, plan_rows(plans))


def _of_recording(
    path: str, wanted: int | None, rules: str | None, planned: Planner, splits: bool
) -> list[tuple[int, list[Plan]]]:
    """Plans for the transitions of a recording or a trace log, from the slots before each.

    `splits`: `hole-split` is among them, and goes on from what it left.
    """
    from ..kvmlab.replay.read import read_plan_inputs
    from ..memslots import PlanStrategy, Rules

    told = read_plan_inputs(path)
    by = told.rules if rules is None else Rules.parse(rules)
    for note in told.notes:
        say(f"note: {note}", err=True)
    results = []
    pieces: SlotTable | None = None
    for t in told.transitions:
        if wanted is not None and (t.seq > wanted or (t.seq < wanted and not splits)):
            continue
        goes_on = pieces is not None and pieces.qemu == t.table
        plans = planned(t.before, t.after, pieces if goes_on else t.table, by, t.log)
        pieces = next((p.after for p in plans if p.strategy is PlanStrategy.HOLE_SPLIT), None)
        if wanted is None or t.seq == wanted:
            results.append((t.seq, plans))
    if wanted is not None and not results:
        raise InputError(
            f"{path} has no transition {wanted} whose ranges are known",
            remedy="leave out --transition to see those it has",
        )
    return results
