"""The renderer against QEMU's own flat view, on recorded maps of real guests.

`tests/conformance/mtree/README.md` tells how the samples were made.  Each holds what one stopped
guest printed for `info mtree` with several options, and for `info mtree -f`, in the same state.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qmp_memlistener.topology import FlatView, Kind, parse, ram_blocks, read_maps

SAMPLES = sorted((Path(__file__).parent / "mtree").rglob("*.json.gz"))

# Two BARs of equal priority that overlap at different addresses: the one mapped last is in front,
# and `info mtree` prints siblings by address.  The renderer names the pair as ambiguous.
ORDER_NOT_PRINTED = {"bars-kvm-big-in-front", "bars-tcg-big-in-front"}

Row = tuple[int, int, str, str, int, bool]


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name.removesuffix('.json.gz')}"


def load(path: Path) -> dict[str, Any]:
    with gzip.open(path) as file:
        sample: dict[str, Any] = json.load(file)
    return sample


def rows(view: FlatView) -> list[Row]:
    return [(r.start, r.size, str(r.kind), r.name, r.offset, r.nonvolatile) for r in view]


def oracle(outputs: dict[str, str]) -> dict[str, FlatView]:
    """QEMU's own views of the address spaces whose names are unique."""
    key = next(k for k in ("info mtree -f", "info mtree -f -o") if k in outputs)
    text = outputs[key]
    names = Counter(re.findall(r'^ AS "(.*)", root:', text, re.MULTILINE))
    return {n: v for n, v in parse(text).flat_views.items() if names[n] == 1}


def trees(outputs: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in outputs.items() if k.startswith("info mtree") and " -f" not in k}


def test_there_are_samples() -> None:
    assert len(SAMPLES) > 100
    assert {p.parent.name for p in SAMPLES} >= {"7.2", "10.0", "11.1"}


@pytest.mark.parametrize("path", SAMPLES, ids=name_of)
def test_rendering_equals_the_flat_view(path: Path) -> None:
    """Every address space, every range, from every form of the tree."""
    outputs = load(path)["outputs"]
    want = oracle(outputs)
    assert want
    for command, text in trees(outputs).items():
        got = read_maps(text, list(want))
        assert got.keys() == want.keys()
        for space, view in want.items():
            if rows(got[space].view) != rows(view):
                assert path.name.split("-", 1)[1].removesuffix(".json.gz") in ORDER_NOT_PRINTED, (
                    f"{command}: {space} differs in "
                    f"{sorted(set(rows(view)) ^ set(rows(got[space].view)))[:6]}"
                )
                assert got[space].ambiguous


@pytest.mark.parametrize("path", [p for p in SAMPLES if "-kvm-" in p.name], ids=name_of)
def test_predicted_memslots_equal_the_kvm_marks(path: Path) -> None:
    """Under KVM `-f` marks the ranges that a slot fits exactly; the renderer predicts them."""
    sample = load(path)
    assert sample["accel"] == "kvm"
    want = oracle(sample["outputs"])["memory"]
    got = read_maps(sample["outputs"]["info mtree -o -D"], ["memory"])["memory"]
    if got.ambiguous:
        return  # the order of the overlapping siblings is not printed
    assert [(r.start, r.memslot) for r in got.view] == [(r.start, r.memslot) for r in want]


@pytest.mark.parametrize("path", SAMPLES, ids=name_of)
def test_holes_are_the_same_from_tree_and_flat_view(path: Path) -> None:
    """A flat view shows every hole but those at the end of a mapping, which only a tree has."""
    outputs = load(path)["outputs"]
    text = outputs.get("info mtree -o -D") or outputs["info mtree"]
    tree = read_maps(text, ["memory"])["memory"]
    if tree.ambiguous:
        return  # the order of the overlapping siblings is not printed
    flat = oracle(outputs)["memory"]
    ends = {(b.name, m.start - m.offset): m.end for b in ram_blocks(flat) for m in b.mapped}
    starts = {(b.name, m.start - m.offset): m.start for b in ram_blocks(flat) for m in b.mapped}

    def inner(name: str, start: int, offset: int) -> bool:
        key = (name, start - offset)
        return key in ends and starts[key] <= start < ends[key]

    from_tree = {
        (h.block, h.start, h.size, h.covered_by)
        for b in tree.ram_blocks
        for h in b.holes
        if inner(h.block, h.start, h.offset)
    }
    from_flat = {
        (h.block, h.start, h.size, h.covered_by) for b in ram_blocks(flat) for h in b.holes
    }
    assert from_tree <= from_flat
    for block, start, size, covered_by in from_flat - from_tree:
        # two mappings of one block at the same distance, with another device in between
        assert not any(
            m.start <= start < m.end for b in tree.ram_blocks if b.name == block for m in b.mapped
        ), (block, hex(start), hex(size), covered_by)


def test_rom_devices_and_readonly_aliases_are_in_the_samples() -> None:
    """The samples do exercise the rare kinds."""
    kinds: set[tuple[Kind, bool]] = set()
    for path in SAMPLES:
        for view in oracle(load(path)["outputs"]).values():
            kinds |= {(r.kind, r.name == "pc.ram") for r in view}
    assert {(Kind.ROM, True), (Kind.ROMD, False), (Kind.RAM, True), (Kind.IO, False)} <= kinds
