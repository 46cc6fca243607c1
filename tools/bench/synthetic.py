"""Made-up maps of any size: the text of `info mtree -o -D`, and views of what it shows.

RAM with page-sized i/o holes in it, PCI windows with BARs and disabled aliases: what a machine
would print that had thousands of devices.
"""

from __future__ import annotations

from qmp_memlistener.topology import FlatRange, FlatView, Kind

__all__ = ["holed_view", "tree_text"]

_HOLE_EVERY = 1 << 17
_PAGE = 0x1000


def tree_text(regions: int, shift: int = 0) -> str:
    """A map of about `regions` regions; `shift` moves one hole in a hundred by a page."""
    ram_size = (regions + 2) << 16
    owner = "owner:{dev path=/machine/q35/mch}"
    alias = f"alias ram-below-4g @pc.ram {0:016x}-{ram_size - 1:016x}"
    lines = ["address-space: memory", _line(0, 1 << 64, 0, "i/o", "system", 1)]
    lines.append(_line(0, ram_size, 0, "ram", alias))
    for i in range(regions // 2):
        at = i * _HOLE_EVERY + (_PAGE if shift and i % 100 == 0 else 0)
        lines.append(_line(at, _PAGE, 1, "i/o", f"hole-{i} {owner}"))
    pci = 1 << 40
    lines.append(_line(pci, regions << 13, -1, "i/o", "pci"))
    for i in range(regions // 4):
        at = pci + (i << 13)
        window = f"{i << 12:016x}-{(i << 12) + _PAGE - 1:016x}"
        lines.append(_line(at, _PAGE, 1, "i/o", f"bar-{i} owner:{{dev id=d{i}}}", 3))
        off = f"alias off-{i} @pc.ram {window} [disabled] {owner}"
        lines.append(_line(at, _PAGE, 1, "ram", off, 3))
    lines += ["", "memory-region: pc.ram", _line(0, ram_size, 0, "ram", "pc.ram", 1), ""]
    return "\r\n".join(lines) + "\r\n"


def holed_view(ranges: int, move_every: int = 0) -> FlatView:
    """A view of `ranges` ranges, RAM and holes in turn.

    With `move_every` each such hole lies a page further on: 1 moves all of them.
    """
    out: list[FlatRange] = []
    at = 0
    for i in range(ranges // 2):
        hole = i * _HOLE_EVERY + _HOLE_EVERY // 2
        if move_every and i % move_every == 0:
            hole += _PAGE
        out.append(FlatRange(at, hole - at, Kind.RAM, "pc.ram", at, None, Kind.RAM, memslot=True))
        out.append(FlatRange(hole, _PAGE, Kind.IO, f"hole-{i}"))
        at = hole + _PAGE
    return FlatView(out)


def _line(start: int, size: int, prio: int, kind: str, rest: str, level: int = 2) -> str:
    return f"{'  ' * level}{start:016x}-{start + size - 1:016x} (prio {prio}, {kind}): {rest}"
