"""`show`: map, RAM blocks and holes, memslots, memory devices; live or from a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import rich_click as click

from ..errors import InputError
from .common import json_option, print_json, print_table, run_async, say, span_text

if TYPE_CHECKING:
    from ..memslots import SlotTable
    from ..qmp import GuestFacts
    from ..topology import MemoryMap

LEAK = (
    "`info mtree -f` makes QEMU leak a reference to every flat view it prints (7.2 to at least "
    "10.0): views are never freed again, and a device whose memory is in one of them can no "
    "longer be unplugged. Only for a guest that you are going to throw away."
)


@click.command("show")
@click.argument("target", required=False)
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

    TARGET is a running guest: unix:PATH, HOST:PORT or pid:N.

    Example: qmp-memlistener show /run/vm.qmp
    """
    from ..topology import Dump, read_map

    if (target is None) == (file is None):
        raise InputError(
            "show needs a TARGET or --from FILE, and not both",
            remedy="see `qmp-memlistener show --help`",
        )
    live: _Live | None = None
    text: str | Dump
    if file is not None:
        if unsafe_flatview:
            raise InputError(
                "--unsafe-flatview goes with a TARGET only",
                remedy="a file is shown as it is: leave the option out",
            )
        from ..inputs import read_dump

        text = read_dump(file)
    else:
        assert target is not None
        live = run_async(_fetch(target, unsafe_flatview))
        text = live.text
        if unsafe_flatview:
            say(f"warning: {LEAK}", err=True)
    result = read_map(text, address_space)
    if as_json:
        print_json(document(result, address_space) | (live.document() if live else {}))
        return
    if live is not None:
        say(live.title(), "")
    _print(result, address_space)
    if live is not None:
        live.print(live.text)


def document(result: MemoryMap, address_space: str) -> dict[str, object]:
    """The JSON document of `show` (README, "JSON")."""
    from ..records import BlockInfo, Section

    return {
        "schema": 1,
        "address_space": address_space,
        "rendered": result.rendered,
        "ranges": Section.list_of(result.view),
        "ram_blocks": [BlockInfo.of(b) for b in result.ram_blocks],
        "ambiguous": [list(pair) for pair in result.ambiguous],
        "unresolved": list(result.unresolved),
    }


@dataclass(frozen=True, slots=True)
class _Live:
    """What a running guest was asked for."""

    text: str
    facts: GuestFacts
    bql_cost_ns: int | None

    def title(self) -> str:
        f = self.facts
        cost = f", the map cost its BQL at most {self.bql_cost_ns / 1e6:.1f} ms" if (
            self.bql_cost_ns is not None
        ) else ""  # fmt: skip
        machine, accel = f.machine or "not known", f.accel or "not known"
        status = f.status or "status not known"
        return f"QEMU {f.version}, machine {machine}, accelerator {accel}, {status}{cost}"

    def document(self) -> dict[str, object]:
        f = self.facts
        return {
            "guest": {
                "version": f.version,
                "name": f.name,
                "machine": f.machine,
                "accel": f.accel,
                "status": f.status,
            },
            "memory_devices": [
                {"kind": kind, "id": name, "addr": addr, "size": size}
                for kind, name, addr, size in self._devices()
            ],
            "slots": [
                {"as_id": s.as_id, "slot": s.slot, "gpa": s.gpa, "size": s.size, "flags": s.flags}
                for s in self._slots(self.text)
            ],
            "bql_cost_ns": self.bql_cost_ns,
        }

    def print(self, text: str) -> None:
        from ..reports.terminal import flags_text, size_text

        if self.facts.accel == "kvm":
            say("", "memslots that QEMU's rules give (ids are those of a fresh start)")
            print_table(
                ("as", "slot", "range", "size", "flags", "block"),
                (
                    [
                        str(s.as_id),
                        str(s.slot),
                        span_text(s.gpa, s.size),
                        size_text(s.size),
                        flags_text(s.flags),
                        f"{s.block} @{s.offset or 0:#x}",
                    ]
                    for s in self._slots(text)
                ),
            )
        if devices := self._devices():
            say("", "memory devices")
            print_table(
                ("kind", "id", "range", "size"),
                (
                    [kind, name or "", span_text(addr, size), size_text(size)]
                    for kind, name, addr, size in devices
                ),
            )

    def _devices(self) -> list[tuple[str, str | None, int, int]]:
        """Kind, id, gpa and size of the memory devices that are in the map."""
        return [
            (d.kind, d.id, d.addr, d.size)
            for d in self.facts.memory_devices
            if d.addr is not None and d.size is not None
        ]

    def _slots(self, text: str) -> SlotTable:
        from ..memslots import ADDRESS_SPACES, slot_table
        from ..topology import read_maps

        maps = read_maps(text, list(ADDRESS_SPACES))
        return slot_table({ADDRESS_SPACES[name]: m.view for name, m in maps.items()})


async def _fetch(target: str, unsafe_flatview: bool) -> _Live:
    from ..agent.monitors import left_remarks, refuse_if_frozen
    from ..qmp import (
        Flag,
        Monitor,
        hmp,
        measure_idle,
        read_facts,
        take_snapshot,
    )
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
            return _Live(await hmp(monitor, "info mtree", Flag("f"), Flag("o")), facts, None)
        shot = await take_snapshot(monitor, await measure_idle(monitor))
        return _Live(shot.text, facts, shot.bql_cost_ns)


def _print(result: MemoryMap, address_space: str) -> None:
    from ..reports.terminal import size_text

    origin = "rendered from the region tree" if result.rendered else "QEMU's own flat view"
    say(f"address space {address_space}, {origin}")
    print_table(
        ("range", "size", "kind", "region", "owner"),
        (
            [
                span_text(r.start, r.size),
                size_text(r.size),
                ("nv-" if r.nonvolatile else "") + str(r.kind) + ("*" if r.memslot else ""),
                f"{r.name} @{r.offset:#x}" if r.offset else r.name,
                r.owner or "",
            ]
            for r in result.view
        ),
    )
    say(
        "* under KVM a memslot fits exactly this range"
        if result.rendered
        else "* an accelerator slot fits exactly this range",
        "",
    )
    rows = []
    for b in result.ram_blocks:
        for m in b.mapped:
            name = f"{b.name} @{m.offset:#x}" if m.offset else b.name
            rows.append([name, span_text(m.start, m.size), size_text(m.size), "", b.owner or ""])
        rows += [
            [
                "  hole",
                span_text(h.start, h.size),
                size_text(h.size),
                h.covered_by or "nothing",
                h.owner or "",
            ]
            for h in b.holes
        ]
    say("RAM blocks, where they are mapped, and the holes in them")
    print_table(("block", "range", "size", "covered by", "owner"), rows)
    for above, below in result.ambiguous:
        say(
            f"note: the text does not tell whether {above} or {below} is seen where both could "
            f"be; {above} is assumed to be"
        )
    for name in result.unresolved:
        say(f"note: the text does not describe {name}, the target of an alias")
