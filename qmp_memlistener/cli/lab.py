"""`lab`: the verbs that run on /dev/kvm: `race`, `replay`, `strategies`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import rich_click as click

from ..errors import MemListenerError
from ..text import quoted
from .common import json_option, new_file, page_option, print_error, print_json, say

__all__ = ["command", "progress_bar", "size"]

_GUESTS = ("data", "writer", "code", "pagetable", "gap")
F = TypeVar("F", bound=Callable[..., object])
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


@click.group("lab")
def command() -> None:
    """Run strategies for real, on a small VM of our own on /dev/kvm.

    No QEMU takes part and no guest of yours is touched. Exit code 4: KVM cannot be used here.

    Example: qmp-memlistener lab race --strategy naive,pause,hole
    """


def size(text: str) -> int:
    """`4096`, `4K`, `64M` in bytes, for an option's `type`."""
    match = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"{quoted(text)} is not a size such as 4096, 4K or 64M")
    return int(match[1]) << _UNITS[match[2].upper()]


def _device_option(function: F) -> F:
    """`--device`."""
    return click.option(
        "--device", default="/dev/kvm", show_default=True, metavar="PATH", help="The KVM device."
    )(function)


def _strategies_option(function: F) -> F:
    """`--strategy`; the verb gets a tuple of names as `strategies`."""
    return click.option(
        "--strategy", "strategies", default="all", show_default=True, metavar="NAME[,NAME]",
        callback=_names, help="Which to run; `lab strategies` lists them. The control always runs.",
    )(function)  # fmt: skip


def _names(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:  # noqa: ARG001
    names = tuple(name.strip() for name in value.split(","))
    if not all(names):
        raise click.BadParameter(f"{quoted(value)} is no list such as naive,pause,hole")
    return names


def _exit_code(problem: MemListenerError | None) -> int:
    """That of a problem, which is printed; 0 when there is none."""
    if problem is None:
        return 0
    print_error(problem)
    return problem.exit_code


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Tells a bar on a terminal's stderr how many are done and how many there are."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@command.command("race")
@_strategies_option
@click.option("--updates", type=click.IntRange(min=1), default=400, show_default=True,
              metavar="N", help="Punches and fills.")  # fmt: skip
@click.option("--guest", type=click.Choice(_GUESTS), default="data", show_default=True,
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
@_device_option
@click.option("--full", is_flag=True, help="All tables, not only the answer.")
@page_option
@json_option
def race(
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
    full: bool,
    output: str | None,
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
    with new_file(output) as write:
        with progress_bar("racing") as progress:
            report = run_race(options, device=device, progress=progress)
        if output is not None:
            from ..page import race_page

            write(race_page(report))
    if as_json:
        print_json(race_document(report))
    else:
        from ..reports.lab import race_lines

        for line in race_lines(report, full=full):
            say(line)
    return _exit_code(none_ran((r.name, r.skipped) for r in report.results))


@command.command("replay")
@click.argument("file")
@_strategies_option
@click.option("--vcpus", type=click.IntRange(min=1), default=1, show_default=True, metavar="N")
@click.option("--first", type=click.IntRange(min=1), metavar="N",
              help="Only the first N transitions.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, metavar="N",
              help="Seed for the order of the strategies in each transition.")  # fmt: skip
@_device_option
@click.option("--full", is_flag=True, help="All tables, not only the answer.")
@json_option
def replay(
    file: str,
    strategies: tuple[str, ...],
    vcpus: int,
    first: int | None,
    seed: int,
    device: str,
    full: bool,
    as_json: bool,
) -> int:
    """Replay what happened to a guest's slots, with vCPUs on the RAM that stays.

    FILE is a recording, or a log of QEMU (7.2 to 11.1) with `kvm_set_user_memory` lines, with or
    without time stamps. Strategies that are about QEMU's operations repeat those that were
    recorded, and what KVM answers is compared; the others make their own for the same change.

    Exit code 1: KVM answered otherwise than recorded. 4: none of the strategies can run here.

    Example: qmp-memlistener lab replay boot.jsonl --strategy naive,inhibit,hole
    """
    from ..kvmlab.race import none_ran
    from ..kvmlab.replay.run import ReplayOptions, replay_document, run_replay

    options = ReplayOptions(strategies=strategies, vcpus=vcpus, most=first, seed=seed)
    with progress_bar("replaying") as progress:
        report = run_replay(file, options, device=device, progress=progress)
    if as_json:
        print_json(replay_document(report))
    else:
        from ..reports.lab import replay_lines

        for line in replay_lines(report, full=full):
            say(line)
    if any(t.return_mismatches for r in report.results for t in r.transitions):
        return 1
    return _exit_code(none_ran((r.name, r.skipped) for r in report.results))


@command.command("strategies")
@_device_option
@json_option
def strategies(device: str, as_json: bool) -> None:
    """List the lab's strategies: what each is, and why it does not run here.

    Without a usable KVM device the list is the same, and that is the reason for each.

    Example: qmp-memlistener lab strategies
    """
    from ..errors import MissingPrerequisite
    from ..kvmlab.race import host_facts
    from ..kvmlab.strategies import STRATEGIES, why_not
    from ..kvmlab.system import Cpus
    from ..kvmlab.vm import Kvm
    from ..reports.lab import strategy_lines

    facts: dict[str, object] | None = None
    remedy: str | None = None
    try:
        with Kvm(device) as kvm:
            found = [(s.name, s.fidelity, why_not(s, kvm)) for s in STRATEGIES]
            facts = host_facts(kvm, Cpus.split())
    except MissingPrerequisite as exc:
        found = [(s.name, s.fidelity, s.only_model or exc.message) for s in STRATEGIES]
        remedy = exc.remedy
    if as_json:
        entries = [{"name": n, "fidelity": f, "skipped": w} for n, f, w in found]
        print_json({"schema": 1, "host": facts, "strategies": entries})
        return
    for line in strategy_lines(found):
        say(line)
    if remedy is not None:
        say(f"remedy: {remedy}")
