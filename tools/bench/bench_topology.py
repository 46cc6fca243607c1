"""Parsing, linking, rendering and diffing maps of 1,000 to 100,000 regions.

python -m tools.bench.bench_topology
"""

from __future__ import annotations

from functools import partial

from qmp_memlistener.topology import diff, link, parse, ram_blocks, read_map, render
from tools.bench.growth import Figure, Sample, interleaved, print_growth, print_table, sizes
from tools.bench.synthetic import tree_text

AT = 10_000


def run(quick: bool) -> list[Figure]:
    """Print the tables; the figures at 10,000."""
    all_sizes = sizes(quick)
    runs = 3 if quick else 5
    texts = {n: tree_text(n) for n in all_sizes}

    def rendered(text: str) -> object:
        dump = parse(text)
        link(dump)
        return render(dump.address_spaces["memory"])

    reading = _by_size(
        interleaved({str(n): partial(rendered, text) for n, text in texts.items()}, runs)
    )
    title = "parse, link and render `info mtree -o -D`"
    print_growth(title, reading, wanted="<= 500 ms at 10,000")
    _parts(texts[AT], runs)

    pairs = {}
    for n, text in texts.items():
        old, new = read_map(text), read_map(tree_text(n, 1))
        pairs[n] = (old.view, new.view, old.ram_blocks, new.ram_blocks)
    differing = interleaved({str(len(p[0])): partial(diff, *p) for p in pairs.values()}, runs)
    ranges = {len(p[0]): differing[str(len(p[0]))] for p in pairs.values()}
    print_growth("diff of two views, one hole in a hundred moved", ranges, each="range",
                 wanted="<= 100 ms at 10,000")  # fmt: skip
    nearest = min(ranges, key=lambda n: abs(n - AT))
    return [
        Figure(f"parse and render {AT:,} regions", "<= 0.5 s", f"{reading[AT].median:.3f} s"),
        Figure(f"diff of {nearest:,} ranges", "<= 0.1 s", f"{ranges[nearest].median:.3f} s"),
    ]


def _by_size(samples: dict[str, Sample]) -> dict[int, Sample]:
    return {int(name): sample for name, sample in samples.items()}


def _parts(text: str, runs: int) -> None:
    """Where the time of one reading goes."""
    dump = parse(text)
    link(dump)
    rendering = render(dump.address_spaces["memory"])
    parts = interleaved(
        {
            "parse": lambda: parse(text),
            "link": lambda: link(dump),
            "render": lambda: render(dump.address_spaces["memory"]),
            "ram_blocks": lambda: ram_blocks(rendering.view, rendering.extents),
        },
        runs,
    )
    print(f"\nof which, at {AT:,}")
    print_table(
        ["part", "median ms", "spread ms"],
        [[name, f"{s.median * 1e3:.2f}", s.spread(1e3, 2)] for name, s in parts.items()],
    )


if __name__ == "__main__":
    run(quick=False)
