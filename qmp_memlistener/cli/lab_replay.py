"""`lab replay`: the transitions of a real guest on a VM of our own, under each strategy."""

from __future__ import annotations

import rich_click as click

from .common import json_option, print_json, say
from .lab import device_option, exit_code, progress_bar, strategies_option


@click.command("replay")
@click.argument("file")
@strategies_option
@click.option("--vcpus", type=click.IntRange(min=1), default=1, show_default=True, metavar="N")
@click.option("--first", type=click.IntRange(min=1), metavar="N",
              help="Only the first N transitions.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, metavar="N",
              help="Seed for the order of the strategies in each transition.")  # fmt: skip
@device_option
@json_option
def command(
    file: str,
    strategies: tuple[str, ...],
    vcpus: int,
    first: int | None,
    seed: int,
    device: str,
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

        for line in replay_lines(report):
            say(line)
    if any(t.return_mismatches for r in report.results for t in r.transitions):
        return 1
    return exit_code(none_ran((r.name, r.skipped) for r in report.results))
