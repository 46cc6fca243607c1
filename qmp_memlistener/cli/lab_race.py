"""`lab race`: a hole that comes and goes, under each strategy, and what the guest met."""

from __future__ import annotations

import rich_click as click

from .common import json_option, print_json, say
from .lab import (
    device_option,
    exit_code,
    progress_bar,
    size,
    strategies_option,
)

GUESTS = ("data", "writer", "code", "pagetable", "gap")


@click.command("race")
@strategies_option
@click.option("--updates", type=click.IntRange(min=1), default=400, show_default=True,
              metavar="N", help="Punches and fills.")  # fmt: skip
@click.option("--guest", type=click.Choice(GUESTS), default="data", show_default=True,
              help="data: words of RAM that stays. writer: sweeps it, for dirty logs. code, "
              "pagetable: its code or page tables lie in it. gap: touches nothing.")  # fmt: skip
@click.option("--vcpus", type=click.IntRange(min=1), default=1, show_default=True, metavar="N")
@click.option("--slot-size", type=size, default="64M", show_default=True, metavar="SIZE")
@click.option("--hole-size", type=size, default="4K", show_default=True, metavar="SIZE",
              help="To the byte: a hole of 1 shows the page that is lost.")  # fmt: skip
@click.option("--hole-at", type=size, metavar="SIZE", help="Offset of the hole in the slot; "
              "default: the middle.")  # fmt: skip
@click.option("--slots", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
              help="Further slots, which no vCPU accesses.")  # fmt: skip
@click.option("--dirty-log", is_flag=True, help="Log dirty pages (a writer always has it).")
@click.option("--rings", is_flag=True, help="Log them in rings of the vCPUs, not in bitmaps.")
@click.option("--populate", is_flag=True, help="Fault in all memory beforehand.")
@click.option("--touch-hole", is_flag=True, help="Let the guest access the hole as well.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N",
              help="Seed for the order of the strategies in each round.")  # fmt: skip
@device_option
@json_option
def command(
    strategies: tuple[str, ...],
    updates: int,
    guest: str,
    vcpus: int,
    slot_size: int,
    hole_size: int,
    hole_at: int | None,
    slots: int,
    dirty_log: bool,
    rings: bool,
    populate: bool,
    touch_hole: bool,
    seed: int,
    device: str,
    as_json: bool,
) -> int:
    """Punch and fill a hole many times under each strategy, in turn, while vCPUs run.

    Strategies take turns in random order, with a control that changes nothing; what cannot run
    here is listed with the reason. Exit code 4: none of those that were asked for can.

    Example: qmp-memlistener lab race --strategy naive,pause,hole --guest code
    """
    from ..kvmlab.programs import GuestKind
    from ..kvmlab.race import RaceOptions, none_ran, race_document, run_race

    options = RaceOptions(
        strategies=strategies,
        updates=updates,
        guest=GuestKind(guest),
        vcpus=vcpus,
        slot_size=slot_size,
        hole_size=hole_size,
        hole_offset=hole_at,
        slots=slots,
        dirty_log=dirty_log,
        rings=rings,
        populate=populate,
        touch_hole=touch_hole,
        seed=seed,
    )
    with progress_bar("racing") as progress:
        report = run_race(options, device=device, progress=progress)
    if as_json:
        print_json(race_document(report))
    else:
        from ..reports.lab import race_lines

        for line in race_lines(report):
            say(line)
    return exit_code(none_ran((r.name, r.skipped) for r in report.results))
