"""What the parser takes and what it refuses."""

from __future__ import annotations

import pytest

from qmp_memlistener.errors import InputError, MtreeError
from qmp_memlistener.topology import Kind, parse, read_map, read_maps

HEAD = "address-space: memory\r\n"
SYSTEM = "  0000000000000000-ffffffffffffffff (prio 0, i/o): system\r\n"


def line(text: str, level: int = 2) -> str:
    return "  " * level + text + "\r\n"


def test_names_with_spaces_brackets_and_at_signs() -> None:
    text = HEAD + SYSTEM + line(
        "0000000000001000-0000000000001fff (prio 0, ram): alias odd [name] @x @big ram (1) "
        "0000000000000000-0000000000000fff"
    ) + "\r\nmemory-region: big ram (1)\r\n" + line(
        "0000000000000000-0000000000000fff (prio 0, ram): big ram (1)", 1
    )  # fmt: skip
    (r,) = read_map(text).view
    assert (r.start, r.name) == (0x1000, "big ram (1)")


def test_owner_is_the_id_or_the_path() -> None:
    text = HEAD + SYSTEM + line(
        "0000000000001000-0000000000001fff (prio 1, i/o): a owner:{dev id=iv0}"
    ) + line(
        "0000000000002000-0000000000002fff (prio 1, i/o): b owner:{obj path=/objects/m0} "
        "parent:{dev id=iv0}"
    ) + line(
        "0000000000003000-0000000000003fff (prio 1, i/o): c parent:{obj path=/machine/unattached}"
    ) + line("0000000000004000-0000000000004fff (prio 1, i/o): d orphan")  # fmt: skip
    assert [r.owner for r in read_map(text).view] == ["iv0", "/objects/m0", None, None]


def test_a_hidden_disabled_parent_hides_its_children() -> None:
    text = HEAD + SYSTEM + line(
        "0000000000001000-0000000000001fff (prio 1, ram): child of something disabled", 3
    )  # fmt: skip
    assert len(read_map(text).view) == 0


def test_the_container_kind_of_later_versions_is_io() -> None:
    text = HEAD + SYSTEM.replace("i/o", "container") + line(
        "0000000000001000-0000000000001fff (prio 1, romd): flash"
    )  # fmt: skip
    assert [r.kind for r in read_map(text).view] == [Kind.ROMD]


def test_nonvolatile_ram_and_a_region_of_the_whole_address_space() -> None:
    text = HEAD + SYSTEM + line("0000000000001000-0000000000001fff (prio 0, nv-ram): pmem")
    root = parse(text).address_spaces["memory"]
    assert root is not None
    assert root.size == 1 << 64
    assert [r.nonvolatile for r in read_map(text).view] == [True]


@pytest.mark.parametrize(
    ("text", "line_no"),
    [
        ("", 1),
        ("hello", 1),
        ("(qemu) info mtree\r\n", 1),
        (HEAD + "  nonsense\r\n", 2),
        (HEAD + SYSTEM + "   0000000000000000-0000000000000fff (prio 0, ram): odd\r\n", 3),
        (HEAD + SYSTEM + line("0000000000000000-0000000000000fff (prio 0, xxx): a"), 3),
        (HEAD + SYSTEM + line("000000000000000-0000000000000fff (prio 0, ram): short"), 3),
        (SYSTEM, 1),
        ("FlatView #0\r\n AS memory\r\n", 2),
        ("FlatView #0\r\n  0000000000000fff-0000000000000000 (prio 0, ram): a\r\n", 2),
        ("\x00\x01\x02", 1),
    ],
)
def test_what_qemu_does_not_print_is_refused_with_its_line(text: str, line_no: int) -> None:
    with pytest.raises(MtreeError) as caught:
        parse(text)
    assert caught.value.line_no == line_no
    assert caught.value.exit_code == 2
    assert caught.value.remedy


def test_overlapping_ranges_of_a_flat_view_are_refused() -> None:
    text = (
        'FlatView #0\r\n AS "memory", root: system\r\n Root memory region: system\r\n'
        "  0000000000000000-0000000000000fff (prio 0, ram): a\r\n"
        "  0000000000000800-0000000000001fff (prio 0, ram): b\r\n\r\n"
    )
    with pytest.raises(MtreeError, match="overlaps"):
        parse(text)


def test_an_alias_that_contains_itself_is_refused() -> None:
    text = (
        HEAD
        + SYSTEM
        + line("0000000000000000-0000000000000fff (prio 0, i/o): alias a @loop "
               "0000000000000000-0000000000000fff")
        + "\r\nmemory-region: loop\r\n"
        + line("0000000000000000-0000000000000fff (prio 0, i/o): loop", 1)
        + line("0000000000000000-0000000000000fff (prio 0, i/o): alias a @loop "
               "0000000000000000-0000000000000fff")
    )  # fmt: skip
    with pytest.raises(MtreeError, match="contains itself"):
        read_map(text)


def test_an_unknown_address_space_names_those_that_are_there() -> None:
    with pytest.raises(InputError) as caught:
        read_map(HEAD + SYSTEM, "I/O")
    assert caught.value.remedy == "it has: memory"


def test_a_line_that_is_longer_than_any_of_qemus() -> None:
    with pytest.raises(MtreeError, match="longer than any line") as caught:
        parse(HEAD + SYSTEM + line("x" * 10_000), first_line=5)
    assert caught.value.line_no == 7


def test_what_is_parsed_already_is_taken_as_it_is() -> None:
    text = HEAD + SYSTEM
    assert read_maps(parse(text), ["memory"]) == read_maps(text, ["memory"])
