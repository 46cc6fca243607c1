"""A memory map, its RAM blocks and slots, and the guest it is of: document and tables of `show`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..memslots import Slot
from ..qmp import GuestFacts, MemoryDevice
from ..records import Section
from ..topology import MemoryMap
from .terminal import flags_text, size_text

__all__ = [
    "blocks_table",
    "devices_table",
    "live_document",
    "guest_title",
    "map_document",
    "open_questions",
    "ranges_table",
    "slots_table",
]

Columns = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""The names of a table's columns, and its rows."""


def map_document(shown: MemoryMap, address_space: str) -> dict[str, object]:
    """The JSON document of `show` (docs/json.md)."""
    return {
        "schema": 1,
        "address_space": address_space,
        "rendered": shown.rendered,
        "ranges": Section.list_of(shown.view),
        "ram_blocks": list(shown.ram_blocks),
        "ambiguous": [list(pair) for pair in shown.ambiguous],
        "unresolved": list(shown.unresolved),
    }


def live_document(
    facts: GuestFacts, slots: Iterable[Slot], bql_cost_ns: int | None
) -> dict[str, object]:
    """What the document says more of a running guest."""
    return {
        "guest": {
            "version": facts.version,
            "name": facts.name,
            "machine": facts.machine,
            "accel": facts.accel,
            "status": facts.status,
        },
        "memory_devices": [
            {"kind": d.kind, "id": d.id, "addr": addr, "size": size}
            for d, addr, size in _placed(facts.memory_devices)
        ],
        "slots": [
            {"as_id": s.as_id, "slot": s.slot, "gpa": s.gpa, "size": s.size, "flags": s.flags}
            for s in slots
        ],
        "bql_cost_ns": bql_cost_ns,
    }


def guest_title(facts: GuestFacts, bql_cost_ns: int | None) -> str:
    """The guest and what its map cost it, in a line."""
    cost = (
        f", the snapshot held the BQL for at most {bql_cost_ns / 1e6:.1f} ms"
        if bql_cost_ns is not None
        else ""
    )
    machine, accel = facts.machine or "not known", facts.accel or "not known"
    status = facts.status or "status unknown"
    return f"QEMU {facts.version}, machine {machine}, accelerator {accel}, {status}{cost}"


def ranges_table(shown: MemoryMap) -> Columns:
    """What a CPU sees."""
    return (
        ("range", "size", "kind", "region", "owner"),
        [
            (
                _span(r.start, r.size),
                size_text(r.size),
                ("nv-" if r.nonvolatile else "") + str(r.kind) + ("*" if r.memslot else ""),
                f"{r.name} @{r.offset:#x}" if r.offset else r.name,
                r.owner or "",
            )
            for r in shown.view
        ],
    )


def blocks_table(shown: MemoryMap) -> Columns:
    """RAM blocks, where they are mapped, and the holes in them."""
    rows: list[tuple[str, ...]] = []
    for b in shown.ram_blocks:
        for m in b.mapped:
            name = f"{b.name} @{m.offset:#x}" if m.offset else b.name
            rows.append((name, _span(m.start, m.size), size_text(m.size), "", b.owner or ""))
        for h in b.holes:
            by = h.covered_by or "nothing"
            rows.append(("  hole", _span(h.start, h.size), size_text(h.size), by, h.owner or ""))
    return ("block", "range", "size", "covered by", "owner"), rows


def slots_table(slots: Iterable[Slot]) -> Columns:
    """Memslots by address space."""
    return (
        ("as", "slot", "range", "size", "flags", "block"),
        [
            (
                str(s.as_id),
                str(s.slot),
                _span(s.gpa, s.size),
                size_text(s.size),
                flags_text(s.flags),
                f"{s.block} @{s.offset or 0:#x}",
            )
            for s in slots
        ],
    )


def devices_table(devices: Iterable[MemoryDevice]) -> Columns:
    """Memory devices that are in the map."""
    return (
        ("kind", "id", "range", "size"),
        [
            (d.kind, d.id or "", _span(addr, size), size_text(size))
            for d, addr, size in _placed(devices)
        ],
    )


def open_questions(shown: MemoryMap) -> Iterator[str]:
    """What the text of the map leaves open."""
    for above, below in shown.ambiguous:
        yield (
            f"note: the text does not show whether {above} or {below} is in front where they "
            f"overlap; {above} is assumed"
        )
    for name in shown.unresolved:
        yield f"note: the text does not describe {name}, the target of an alias"


def _placed(devices: Iterable[MemoryDevice]) -> Iterator[tuple[MemoryDevice, int, int]]:
    """Those that are in the map, with their gpa and size."""
    for device in devices:
        if device.addr is not None and device.size is not None:
            yield device, device.addr, device.size


def _span(start: int, size: int) -> str:
    """A range as QEMU prints it, first to last address."""
    return f"{start:#012x}-{start + size - 1:#012x}"
