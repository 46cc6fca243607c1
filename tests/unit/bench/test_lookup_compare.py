"""Comparing look-ups: the model against the C program, and what happens without a compiler."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from qmp_memlistener.errors import InputError, MissingPrerequisite, OperationFailed
from tools.bench.slot_costs import lookup_native
from tools.bench.slot_costs.lookup import (
    MOST_SLOTS,
    TREE,
    USED,
    Kind,
    Order,
    Structure,
    compare_lookups,
    count_lookups,
    count_updates,
    lookup_document,
)
from tools.bench.slot_costs.tables import lookup_lines, lookup_tables


@pytest.fixture(scope="module")
def cc() -> str:
    try:
        return lookup_native.compiler()
    except MissingPrerequisite as exc:
        pytest.skip(exc.message)


@pytest.fixture(scope="module")
def program(cc: str) -> Iterator[lookup_native.LookupProgram]:
    with lookup_native.lookup_program() as program:
        assert program.compiler == cc
        yield program


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("slots", [1, 2, 8, 509, 4096])
def test_model_and_c_count_the_same(
    program: lookup_native.LookupProgram, slots: int, order: Order
) -> None:
    timings = program.time(slots, 300, 100, 2, 7, order)
    lookups, updates = {}, {}
    for c in count_lookups(slots, 300, 7, order):
        counted = (c.lookups, c.comparisons, c.most_comparisons, c.slots_read, c.ids)
        lookups["steps", str(c.kind), str(c.structure)] = counted
    for u in count_updates(slots, 100, 7, order):
        moved = (u.bytes_copied, u.bytes_shifted)
        updates["work", u.layout, u.op] = (u.updates, *moved, u.comparisons, u.rotations)
    assert timings.counts == lookups | updates


def test_everything_is_timed_where_there_is_a_compiler(cc: str) -> None:
    found = compare_lookups([8, 600], lookups=200, updates=40, blocks=3)
    assert (found.compiler, found.not_timed) == (cc, None)
    for cost in found.lookups:
        assert cost.each is not None
        assert cost.each.n == 3
    for update in found.updates:
        assert update.each is not None
        assert update.each.n == 40
    assert not any("not timed" in line for line in lookup_lines(found))


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_only_counts() -> None:
    told: list[int] = []
    found = compare_lookups([8, 64], lookups=200, updates=40, progress=told.append)
    assert told == [8, 64]
    assert found.compiler is None
    assert found.not_timed == "there is no C compiler here (no-such-compiler)"
    assert all(cost.each is None for cost in found.lookups)
    assert all(update.each is None for update in found.updates)
    assert all(cost.comparisons > 0 for cost in found.lookups)
    assert list(lookup_lines(found))[-1] == f"not timed: {found.not_timed}"


def test_a_compiler_that_fails_is_told_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'lookup.c:1: fatal error: malloc.h: none' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(MissingPrerequisite) as caught, lookup_native.lookup_program():
        pass
    assert "does not compile lookup.c: lookup.c:1: fatal error: malloc.h" in caught.value.message
    assert caught.value.remedy is not None


def test_all_kinds_and_structures_are_compared() -> None:
    costs = list(count_lookups(64, 100, 1))
    assert {(c.kind, c.structure) for c in costs} == {
        (kind, structure) for kind in Kind for structure in USED[kind]
    }
    by_key = {(c.kind, c.structure): c for c in costs}
    for kind in Kind:
        # whatever is asked finds the same slots
        assert len({by_key[kind, s].ids for s in USED[kind]}) == 1
    assert by_key[Kind.MISS, Structure.ARRAY].ids == -100
    scanned = by_key[Kind.HOST, Structure.ARRAY]
    assert scanned.slots_read == 64 * 100
    assert by_key[Kind.HOST, Structure.INTERVALS].slots_read < scanned.slots_read


def test_the_tree_moves_no_set_and_the_array_all_of_it() -> None:
    by_key = {(u.layout, u.op): u for u in count_updates(500, 50, 1)}
    assert by_key[TREE, "add"].bytes_copied == 0
    assert by_key["array_5_14", "remove"].bytes_copied == 50 * 2 * (65_552 + 500 * 88)
    assert by_key["array_5_7", "remove"].bytes_copied == 50 * (1040 + 500 * 88)


def test_layouts_are_left_out_where_they_had_no_room() -> None:
    assert {u.layout for u in count_updates(509, 1, 1)} == {"array_5_7", "array_5_14", TREE}
    assert {u.layout for u in count_updates(510, 1, 1)} == {"array_5_14", TREE}


def test_counts_are_the_same_for_the_same_seed() -> None:
    assert list(count_lookups(64, 100, 5)) == list(count_lookups(64, 100, 5))
    assert list(count_lookups(64, 100, 5)) != list(count_lookups(64, 100, 6))


def test_a_program_that_fails_is_told(program: lookup_native.LookupProgram) -> None:
    with pytest.raises(OperationFailed) as caught:
        program.time(MOST_SLOTS + 1, 1, 1, 1, 1, Order.RANDOM)
    assert str(MOST_SLOTS + 1) in caught.value.message


@pytest.mark.parametrize("slots", [0, -1, MOST_SLOTS + 1])
def test_numbers_of_slots_that_kvm_does_not_take(slots: int) -> None:
    with pytest.raises(InputError) as caught:
        compare_lookups([8, slots])
    assert str(slots) in caught.value.message


@pytest.mark.usefixtures("no_compiler")
def test_document_is_json_with_stable_keys() -> None:
    document = json.loads(
        msgspec.json.encode(lookup_document(compare_lookups([8], lookups=10, updates=10)))
    )
    assert set(document) == {"seed", "order", "compiler", "not_timed", "lookups", "updates"}
    assert set(document["lookups"][0]) == {
        *("slots", "kind", "structure", "lookups", "comparisons"),
        *("most_comparisons", "slots_read", "ids", "each"),
    }
    assert set(document["updates"][0]) == {
        *("slots", "layout", "op", "updates", "bytes_copied"),
        *("bytes_shifted", "comparisons", "rotations", "each"),
    }


@pytest.mark.usefixtures("no_compiler")
def test_tables_have_a_row_for_each_and_fit() -> None:
    found = compare_lookups([8, 509, 600], lookups=50, updates=20)
    lookups, updates = lookup_tables(found)
    assert len(lookups.rows) == len(Kind) * 3
    assert len(updates.rows) == 2 * 3
    for table in (lookups, updates):
        assert all(len(row) == len(table.columns) for row in table.rows)
    cached = next(row for row in lookups.rows if row[0] == "cached")
    assert cached[-2:] == ("-", "-")  # KVM keeps no last slot in an interval tree
    assert all(len(line) <= 80 for line in lookup_lines(found))
