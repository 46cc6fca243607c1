"""Parsing, rendering and diffing maps of 1,000 to 100,000 regions.

    python tools/bench/bench_topology.py

The synthetic map is RAM with page-sized i/o holes in it, PCI windows with BARs and disabled
aliases, printed as `info mtree -o -D` prints it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from growth import interleaved, print_growth  # noqa: E402

from qmp_memlistener.topology import diff, link, parse, ram_blocks, render  # noqa: E402

SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)


def region(start: int, size: int, prio: int, kind: str, rest: str, level: int = 2) -> str:
    return f"{'  ' * level}{start:016x}-{start + size - 1:016x} (prio {prio}, {kind}): {rest}"


def tree_text(n: int, shift: int = 0) -> str:
    """A map of about `n` regions; `shift` moves one hole in a hundred."""
    ram_size = (n + 2) << 16
    owner = "owner:{dev path=/machine/q35/mch}"
    lines = ["address-space: memory", region(0, 1 << 64, 0, "i/o", "system", 1)]
    body = [
        region(0, ram_size, 0, "ram", f"alias ram-below-4g @pc.ram {0:016x}-{ram_size - 1:016x}")
    ]
    for i in range(n // 2):
        at = (i << 17) + (0x1000 if shift and i % 100 == 0 else 0)
        body.append(region(at, 0x1000, 1, "i/o", f"hole-{i} {owner}"))
    pci = 1 << 40
    body.append(region(pci, n << 13, -1, "i/o", "pci"))
    for i in range(n // 4):
        body.append(region(pci + (i << 13), 0x1000, 1, "i/o", f"bar-{i} owner:{{dev id=d{i}}}", 3))
        body.append(
            region(
                pci + (i << 13),
                0x1000,
                1,
                "ram",
                f"alias off-{i} @pc.ram {i << 12:016x}-{(i << 12) + 0xFFF:016x} [disabled] {owner}",
                3,
            )  # fmt: skip
        )
    lines += body + ["", "memory-region: pc.ram", region(0, ram_size, 0, "ram", "pc.ram", 1), ""]
    return "\r\n".join(lines) + "\r\n"


def parsed_and_rendered(text: str) -> object:
    dump = parse(text)
    link(dump)
    rendering = render(dump.address_spaces["memory"])
    return rendering


def main() -> None:
    texts = {n: tree_text(n) for n in SIZES}
    shifted = {n: tree_text(n, 1) for n in SIZES}
    print_growth(
        "parse, link and render `info mtree -o -D`, n regions",
        SIZES,
        interleaved({str(n): (lambda t=texts[n]: parsed_and_rendered(t)) for n in SIZES}),
    )

    def rendering(text: str):  # type: ignore[no-untyped-def]
        dump = parse(text)
        link(dump)
        r = render(dump.address_spaces["memory"])
        return r.view, ram_blocks(r.view, r.extents)

    pairs = {n: (rendering(texts[n]), rendering(shifted[n])) for n in SIZES}
    print_growth(
        "diff of two views, n ranges",
        [len(pairs[n][0][0]) for n in SIZES],
        {
            str(len(pairs[n][0][0])): sample
            for n, sample in zip(
                SIZES,
                interleaved(
                    {
                        str(n): (lambda p=pairs[n]: diff(p[0][0], p[1][0], p[0][1], p[1][1]))
                        for n in SIZES
                    }
                ).values(),
                strict=True,
            )
        },
    )


if __name__ == "__main__":
    main()
