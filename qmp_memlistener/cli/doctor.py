"""`doctor`: what works here and for a target, what does not, why, and the remedy."""

from __future__ import annotations

import rich_click as click

from .common import json_option, print_json, print_table, run_async, say, target_argument


@click.command("doctor")
@target_argument(required=False)
@click.option("--clean", is_flag=True, help="Take away what crashed agents of yours left in "
              "running guests, and nothing else.")  # fmt: skip
@json_option
def command(target: str | None, clean: bool, as_json: bool) -> None:
    """Say what works on this host and, with a TARGET, for that guest.

    For everything that does not work: why, and what to do about it. Also lists what agents that
    were killed have left behind: trace events and the log, which the next attach puts back as well,
    objects that were made for an update, and guests that were left paused.

    Example: qmp-memlistener doctor /run/vm.qmp
    """
    from ..agent import checkup
    from ..agent.leftovers import clean_leftovers, find_leftovers
    from ..reports.lengths import duration_text
    from ..updates.pause.guard_notes import all_notes

    notes = all_notes()  # to examine a target takes those about it
    leftovers = run_async(find_leftovers())
    cleaned: list[str] = []
    if clean and leftovers:
        cleaned, failed = run_async(clean_leftovers(leftovers))
        for error in failed:
            say(f"not cleaned: {error.message}", err=True)
            if error.remedy:
                say(f"  remedy: {error.remedy}", err=True)
        leftovers = run_async(find_leftovers())
    checks: list[checkup.Check] = []
    if target is None:
        probes = checkup.probes_of_host()
    else:
        probes, checks = run_async(checkup.examine_guest(target))
    checks += checkup.check_host()
    if as_json:
        print_json(
            {
                "schema": 1,
                "probes": probes,
                "checks": checks,
                "leftovers": [{"what": left.what, "where": left.where} for left in leftovers],
                "cleaned": cleaned,
                "notes": [note.text for note in notes],
            }
        )
        return
    title = f"for {target}" if target else "on this host (name a TARGET to see it for a guest)"
    say(f"probes {title}")
    print_table(
        ("probe", "measures", "usable", "resolution", "cost"),
        (
            [
                p.name,
                ", ".join(p.measures) or "counters",
                "yes" if p.usable else "no",
                duration_text(p.resolution_ns),
                p.cost,
            ]
            for p in probes
        ),
    )
    for probe in probes:
        _explain(probe.name, probe.reason, probe.remedy)
    say("", "this host")
    print_table(("what", "usable"), ([c.name, "yes" if c.usable else "no"] for c in checks))
    for check in checks:
        _explain(check.name, check.reason, check.remedy)
    say()
    for text in cleaned:
        say(f"cleaned: {text}")
    for left in leftovers:
        say(f"left over: {left.what} (noted in {left.where})")
        say(f"  remedy: {left.remedy}")
    if not leftovers:
        say("nothing of ours is left over in a running guest")
    for note in notes:
        say(note.text)
        if note.remedy:
            say(f"  remedy: {note.remedy}")


def _explain(name: str, reason: str | None, remedy: str | None) -> None:
    if reason:
        say(f"{name}: {reason}")
        if remedy:
            say(f"  remedy: {remedy}")
