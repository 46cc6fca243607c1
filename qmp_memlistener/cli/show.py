"""`show`: map, RAM blocks and holes, memslots, memory devices; live or from a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich_click as click

from ..errors import InputError
from .common import json_option, print_json, print_table, run_async, say, target_argument

if TYPE_CHECKING:
    from ..qmp import GuestFacts
    from ..topology import MemoryMap

LEAK = (
    "`info mtree -f` makes QEMU leak a reference to every flat view it prints (7.2 to at least "
    "10.0): views are never freed again, and a device whose memory is in one of them can no "
    "longer be unplugged. Only for a guest that you are going to throw away."
)


@click.command("show")
@target_argument(required=False)
@click.option("--from", "file", metavar="FILE",
              help="Read saved `info mtree` output, a "
              "monitor session or a QMP reply with it; - is stdin.")  # fmt: skip
@click.option(
    "--address-space", default="memory", show_default=True, help="Which address space to show."
)
@click.option(
    "--unsafe-flatview",
    is_flag=True,
    help="Ask QEMU for its own flat view instead of rendering the region tree. " + LEAK,
)
@json_option
def command(
    target: str | None, file: str | None, address_space: str, unsafe_flatview: bool, as_json: bool
) -> None:
    """Show ranges, RAM blocks and holes.

    TARGET is a running guest: unix:PATH, HOST:PORT, pid:N, name:GUEST or libvirt:DOMAIN.

    Example: qmp-memlistener show /run/vm.qmp
    """
    if (target is None) == (file is None):
        raise InputError(
            "show needs a TARGET or --from FILE, and not both",
            remedy="see `qmp-memlistener show --help`",
        )
    if file is not None and unsafe_flatview:
        raise InputError(
            "--unsafe-flatview goes with a TARGET only",
            remedy="a file is shown as it is: leave the option out",
        )
    from ..inputs import read_dump
    from ..memslots import ADDRESS_SPACES, slot_table
    from ..reports import maps
    from ..topology import parse, read_map, read_maps

    if file is not None:
        shown = read_map(read_dump(file), address_space)
        if as_json:
            print_json(maps.map_document(shown, address_space))
        else:
            _print(shown, address_space)
        return
    assert target is not None
    text, facts, bql_cost_ns = run_async(_fetch(target, unsafe_flatview))
    if unsafe_flatview:
        say(f"warning: {LEAK}", err=True)
    dump = parse(text)
    shown = read_map(dump, address_space)
    others = read_maps(dump, [name for name in ADDRESS_SPACES if name != address_space])
    found = {address_space: shown, **others}
    slots = slot_table({n: found[name].view for name, n in ADDRESS_SPACES.items() if name in found})
    if as_json:
        more = maps.live_document(facts, slots, bql_cost_ns)
        print_json(maps.map_document(shown, address_space) | more)
        return
    say(maps.guest_title(facts, bql_cost_ns), "")
    _print(shown, address_space)
    if facts.accel == "kvm":
        say("", "memslots that QEMU's rules give (ids are those of a fresh start)")
        print_table(*maps.slots_table(slots))
    devices = maps.devices_table(facts.memory_devices)
    if devices[1]:
        say("", "memory devices")
        print_table(*devices)


async def _fetch(target: str, unsafe_flatview: bool) -> tuple[str, GuestFacts, int | None]:
    """The text of its map, facts, and for how long the map kept its BQL at most."""
    from ..agent.monitors import left_remarks, refuse_if_frozen
    from ..qmp import Flag, Monitor, hmp, measure_idle, read_facts, take_snapshot
    from ..qmp.allowed import Permit

    admission = await refuse_if_frozen(target)
    permits = (Permit.FLAT_VIEW,) if unsafe_flatview else ()
    async with await Monitor.connect(
        admission.target, meant=admission.meant, permits=permits
    ) as monitor:
        for remark in await left_remarks(monitor, admission.key):
            say(remark, err=True)
        facts = await read_facts(monitor)
        if unsafe_flatview:
            return await hmp(monitor, "info mtree", Flag("f"), Flag("o")), facts, None
        shot = await take_snapshot(monitor, await measure_idle(monitor))
        return shot.text, facts, shot.bql_cost_ns


def _print(shown: MemoryMap, address_space: str) -> None:
    from ..reports import maps

    origin = "rendered from the region tree" if shown.rendered else "QEMU's own flat view"
    say(f"address space {address_space}, {origin}")
    print_table(*maps.ranges_table(shown))
    who = "under KVM a memslot" if shown.rendered else "an accelerator slot"
    say(f"* {who} fits exactly this range", "")
    say("RAM blocks, where they are mapped, and the holes in them")
    print_table(*maps.blocks_table(shown))
    for text in maps.open_questions(shown):
        say(text)
