"""`doctor`: what works here and for a target, what does not, why, and the remedy."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import rich_click as click

from .common import json_option, print_json, print_table, run_async

if TYPE_CHECKING:
    from ..monitor.leftovers import Leftover


@dataclass(frozen=True, slots=True)
class Probe:
    """One way of seeing something; the JSON contract names the keys."""

    name: str
    measures: list[str]
    usable: bool
    reason: str | None
    remedy: str | None
    resolution_ns: int
    cost: str


@dataclass(frozen=True, slots=True)
class Check:
    """Something this host has or has not."""

    name: str
    usable: bool
    reason: str | None
    remedy: str | None


@click.command("doctor")
@click.argument("target", required=False)
@click.option("--clean", is_flag=True, help="Take away what crashed agents of yours left in "
              "running guests, and nothing else.")  # fmt: skip
@json_option
def command(target: str | None, clean: bool, as_json: bool) -> None:
    """Say what works on this host and, with a TARGET, for that guest.

    For everything that does not work: why, and what to do about it. Also lists what agents that
    were killed have left behind; the next attach puts that back as well.

    Example: qmp-memlistener doctor /run/vm.qmp
    """
    from ..monitor.leftovers import find_leftovers

    leftovers = find_leftovers()
    cleaned: list[str] = []
    if clean and leftovers:
        cleaned = run_async(_clean(leftovers))
        leftovers = find_leftovers()
    probes = run_async(_probes(target))
    checks = _checks()
    if as_json:
        print_json(
            {
                "schema": 1,
                "probes": probes,
                "checks": checks,
                "leftovers": [{"what": left.what, "where": left.where} for left in leftovers],
                "cleaned": cleaned,
            }
        )
        return
    title = f"for {target}" if target else "on this host (name a TARGET to see it for a guest)"
    click.echo(f"probes {title}")
    print_table(
        ("probe", "sees", "usable", "cost"),
        ([p.name, ", ".join(p.measures), "yes" if p.usable else "no", p.cost] for p in probes),
    )
    for probe in probes:
        _explain(probe.name, probe.reason, probe.remedy)
    click.echo("\nthis host")
    print_table(("what", "usable"), ([c.name, "yes" if c.usable else "no"] for c in checks))
    for check in checks:
        _explain(check.name, check.reason, check.remedy)
    click.echo()
    for text in cleaned:
        click.echo(f"cleaned: {text}")
    for left in leftovers:
        click.echo(f"left over: {left.what} (noted in {left.where})")
        click.echo("  remedy: `qmp-memlistener doctor --clean`, or attach to that guest again")
    if not leftovers:
        click.echo("nothing of ours is left over in a running guest")


def _explain(name: str, reason: str | None, remedy: str | None) -> None:
    if reason:
        click.echo(f"{name}: {reason}")
        if remedy:
            click.echo(f"  remedy: {remedy}")


async def _clean(leftovers: list[Leftover]) -> list[str]:
    from ..errors import TargetError
    from ..monitor.leftovers import clean_leftovers

    done = []
    for left in leftovers:
        try:
            if await clean_leftovers(left) is not None:
                done.append(left.what)
        except TargetError as exc:
            click.echo(f"not cleaned: {exc.message}", err=True)
    return done


async def _probes(target: str | None) -> list[Probe]:
    reason = remedy = None
    snapshot_ns = 1_000_000
    if target is not None:
        reason, remedy, snapshot_ns = await _try(target)
    elif not os.access("/dev/shm", os.W_OK):
        reason, remedy = "/dev/shm is not writable", "make it, or set XDG_RUNTIME_DIR"
    return [
        Probe(
            name="trace",
            measures=["slot_op", "transition"],
            usable=reason is None,
            reason=reason,
            remedy=remedy,
            resolution_ns=200_000,
            cost="one line of log for each slot operation and map change; nothing when idle",
        ),
        Probe(
            name="snapshots",
            measures=["transition"],
            usable=True,
            reason=None,
            remedy=None,
            resolution_ns=20_000_000,
            cost=f"{snapshot_ns / 1e6:.1f} ms of BQL each, at most 2 % of the time",
        ),
    ]


async def _try(target: str) -> tuple[str | None, str | None, int]:
    """Really switch tracing on and off again; what a snapshot costs."""
    from ..monitor import (
        Monitor,
        TraceUnavailable,
        measure_idle,
        parse_target,
        start_tracing,
        take_snapshot,
    )

    async with await Monitor.connect(parse_target(target)) as monitor:
        shot = await take_snapshot(monitor, await measure_idle(monitor))
        cost = shot.bql_cost_ns or 0
        try:
            async with await start_tracing(monitor):
                return None, None, cost
        except TraceUnavailable as exc:
            return exc.message, exc.remedy, cost


def _checks() -> list[Check]:
    from ..guests import find_qemus, kvm_usable

    checks = []
    builds = find_qemus()
    if builds:
        versions = ", ".join(b.version for b in builds)
        checks.append(Check(f"QEMU for the demo and tests ({versions})", True, None, None))
        probe = kvm_usable(builds[0])
        checks.append(
            Check(
                "KVM",
                bool(probe),
                None if probe else probe.reason,
                None
                if probe
                else "use a host with /dev/kvm and the right to open it; without, "
                "guests run under TCG",
            )
        )
    else:
        checks.append(
            Check(
                "QEMU for the demo and tests",
                False,
                "no qemu-system-x86_64 is installed",
                "install the Debian package qemu-system-x86",
            )
        )
    assembler = shutil.which("as") is not None
    checks.append(
        Check(
            "assembler, to build the pulse guest again",
            assembler,
            None if assembler else "`as` is not installed",
            None if assembler else "install the Debian package binutils",
        )
    )
    return checks
