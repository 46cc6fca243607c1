"""`lab cost`: what slot operations cost, and how KVM finds a slot among many."""

from __future__ import annotations

import rich_click as click

from .common import json_option, print_json, say
from .lab_options import device_option, progress_bar, sizes


def _counts(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int]:  # noqa: ARG001
    if value is None:
        return []
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list such as 0,1,4") from None


@click.command("cost")
@click.option("--slot-sizes", type=sizes, metavar="SIZE[,SIZE]",
              help="Default: 16M, and others of them on their own.")  # fmt: skip
@click.option("--slots", callback=_counts, metavar="N[,N]", help="How many slots there are in all.")
@click.option("--vcpus", callback=_counts, metavar="N[,N]", help="How many vCPUs run.")
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True, metavar="N",
              help="Blocks of cycles of each, in random order.")  # fmt: skip
@click.option("--lookup/--no-lookup", default=True, show_default=True,
              help="Compare sorted array and tree as well.")  # fmt: skip
@click.option("--seed", type=int, default=1, show_default=True, metavar="N")
@device_option
@json_option
def command(
    slot_sizes: list[int] | None,
    slots: list[int],
    vcpus: list[int],
    rounds: int,
    lookup: bool,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Time every slot operation on real KVM, by slot size, number of slots, running vCPUs.

    The first of each list goes with the first of the others; the rest are varied one at a time.
    With it, what looking a slot up costs in a sorted array and in a tree, from 8 slots to as many
    as KVM takes; the times need a C compiler.

    Example: qmp-memlistener lab cost --vcpus 0,1 --rounds 5
    """
    from ..kvmlab.cost import (
        cost_document,
        default_shapes,
        default_slots,
        measure_costs,
        one_at_a_time,
    )
    from ..kvmlab.device import Kvm
    from ..kvmlab.lookup import compare_lookups, lookup_document

    with Kvm(device) as kvm:
        given = slot_sizes or slots or vcpus
        shapes = (
            one_at_a_time(slot_sizes or [16 << 20], slots or [8], vcpus or [1])
            if given
            else default_shapes(kvm)
        )
        with progress_bar("measuring") as progress:
            costs = measure_costs(
                kvm,
                shapes,
                rounds=rounds,
                access_slots=() if given else default_slots(kvm),
                seed=seed,
                progress=progress,
            )
        compared = compare_lookups(seed=seed) if lookup else None
    if as_json:
        document = {"schema": 1, **cost_document(costs)}
        document["lookup"] = None if compared is None else lookup_document(compared)
        print_json(document)
        return
    from ..reports.lab_cost import cost_lines, lookup_lines

    for line in cost_lines(costs):
        say(line)
    if compared is not None:
        say()
        for line in lookup_lines(compared):
            say(line)
