"""The renderer against QEMU's own flat view on every machine of every target that starts.

Where the tree does not tell what is visible, the rendering may differ, and then says so: it is
never wrong without a word.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from qmp_memlistener.topology import read_maps
from tests.conformance.test_mtree_samples import oracle, rows

MACHINES = Path(__file__).parent / "mtree" / "machines"

# How many machines there are, and which of them the tree leaves open: two devices of equal
# priority at overlapping addresses, or a region of which nobody knows whether it answers.
RECORDED = {"7.2": 261, "10.0": 238, "11.1": 239}
LEFT_OPEN = {
    "7.2": {
        "alpha/clipper", "hppa/hppa", "aarch64/mcimx6ul-evk", "arm/mcimx6ul-evk",
        "mips64el/fuloong2e", "ppc64/powernv10",
    },
    "10.0": {"aarch64/imx8mp-evk", "alpha/clipper", "hppa/B160L"},
    "11.1": {
        "aarch64/imx8mm-evk", "aarch64/imx8mp-evk", "alpha/clipper", "hppa/715", "hppa/B160L",
    },
}  # fmt: skip


def load(version: str) -> list[dict[str, Any]]:
    machines: list[dict[str, Any]] = json.loads(
        lzma.decompress((MACHINES / f"{version}.json.xz").read_bytes())
    )
    return machines


@pytest.mark.parametrize("version", sorted(RECORDED))
def test_every_machine_is_exact_or_says_what_is_open(version: str) -> None:
    machines = load(version)
    assert len(machines) == RECORDED[version]
    inexact: set[str] = set()
    for machine in machines:
        name = f"{machine['arch']}/{machine['machine']}"
        want = oracle({"info mtree -f -o": machine["flat"]})
        got = read_maps(machine["tree"], list(want))
        assert got.keys() == want.keys(), name
        for space, view in want.items():
            if rows(got[space].view) != rows(view):
                assert got[space].ambiguous, f"{name}, {space}: silently wrong"
                inexact.add(name)
    assert inexact == LEFT_OPEN[version]


def test_ram_inside_io_of_equal_priority_is_not_lost() -> None:
    """m68k next-cube: the smaller of two siblings is in front."""
    (cube,) = [m for m in load("7.2") if m["machine"] == "next-cube"]
    blocks = {b.name for b in read_maps(cube["tree"], ["memory"])["memory"].ram_blocks}
    assert "next.bmapmem" in blocks
