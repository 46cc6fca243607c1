"""`steer`: apply a strategy to every transition of a running guest, inside its own QEMU."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import rich_click as click

from ..errors import MemListenerError, MissingPrerequisite
from .common import json_option, print_error, print_json, run_async, say, target_argument

if TYPE_CHECKING:
    from ..steer.steering import Steering

STRATEGIES = ("off", "observe", "pause", "inhibit", "hole")
_RISK = (
    "This loads code into the running QEMU, which from then on decides in which order KVM gets",
    "memslot operations. A fault in it can end the guest. `--strategy off` takes it out again.",
)


@click.command("steer")
@target_argument()
@click.option("--strategy", type=click.Choice(STRATEGIES), required=True,
              help="off takes it out again; observe only stamps the operations.")  # fmt: skip
@click.option("--strict", is_flag=True, help="With hole: keep vCPUs out of KVM as well.")
@click.option("--yes", is_flag=True, help="Do not ask on a terminal.")
@json_option
def command(target: str, strategy: str, strict: bool, yes: bool, as_json: bool) -> int:
    """Apply a strategy to the memory-map changes that the guest itself makes.

    QEMU up to 7.2 deletes and re-adds memslots while vCPUs run. pause keeps vCPUs out of KVM from
    the first delete to the end of the change, inhibit only while the operations are issued, hole
    leaves the RAM around a hole where it is. The strategy stays when this command has ended.

    Exit code 1: refused or failed; the guest runs as before.

    Example: qmp-memlistener steer pid:4711 --strategy inhibit
    """
    if strict and strategy != "hole":
        raise click.UsageError("--strict goes with --strategy hole")
    if strategy != "off":
        confirm_loading(yes)
    try:
        done = run_async(_steer(target, strategy, strict))
    except MemListenerError as error:
        if as_json:
            refused = isinstance(error, MissingPrerequisite)
            print_json(_document("refused" if refused else "failed", error.message, None))
            print_error(error)
            return error.exit_code
        raise
    outcome = "done" if done.after == strategy else "failed"
    if as_json:
        print_json(_document(outcome, done.reason, done))
    else:
        _print(done)
    return 0 if outcome == "done" else 1


def confirm_loading(yes: bool) -> None:
    """Ask on a terminal, unless `yes`, before code is loaded into QEMU.  Raises click.Abort."""
    if sys.stdin.isatty() and not yes:
        say(*_RISK, err=True)
        click.confirm("Go on?", abort=True, err=True)


async def _steer(target: str, strategy: str, strict: bool) -> Steering:
    from ..agent.monitors import refuse_if_frozen
    from ..qmp import Monitor
    from ..records import Mode
    from ..updates.steered import steer_guest

    admission = await refuse_if_frozen(target)
    async with await Monitor.connect(admission.target, meant=admission.meant) as monitor:
        return await steer_guest(
            monitor, Mode(strategy), strict=strict, interrupted=lambda done: _print(done, err=True)
        )


def _document(outcome: str, reason: str | None, done: Steering | None) -> dict[str, object]:
    return {
        "outcome": outcome,
        "reason": reason,
        "before": str(done.before) if done else None,
        "after": str(done.after) if done else None,
        "stopped_ns": done.stopped_ns if done else 0,
        "transitions": done.transitions if done else 0,
        "parks": done.parks if done else 0,
        "gave_up": done.gave_up if done else 0,
    }


def _print(done: Steering, *, err: bool = False) -> None:
    before, after = done.before, done.after
    say(f"{before} -> {after}" if before != after else f"{after}, as before", err=err)
    if done.stopped_ns:
        say(f"QEMU's main loop was stopped for {done.stopped_ns / 1e6:.1f} ms", err=err)
    if done.reason:
        say(done.reason, err=err)
