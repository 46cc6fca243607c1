"""What a race is run on: where RAM, hole and the guest's work lie."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qmp_memlistener.errors import InputError
from qmp_memlistener.kvmlab.layout import Layout
from qmp_memlistener.memslots import Rules, plan

PAGE = 4096


@st.composite
def fields(draw: st.DrawFn) -> Layout:
    size = draw(st.integers(16, 4096)) * PAGE
    hole = draw(st.one_of(st.integers(1, 3 * PAGE), st.just(PAGE)))
    offset = draw(st.one_of(st.none(), st.integers(0, size - 1)))
    try:
        return Layout(size=size, hole_size=hole, hole_offset=offset)
    except InputError:
        assume(False)
        raise


@given(fields(), st.integers(1, 16))
def test_the_guest_works_in_ram_that_stays(layout: Layout, vcpus: int) -> None:
    low, high = layout.lost
    words = [word for i in range(vcpus) for word in layout.edges(i)]
    assert words
    for word in words:
        assert layout.start <= word < layout.end - 7
        assert not low <= word < high
    if high - low < PAGE * 2 and low - layout.start > PAGE and layout.end - high > PAGE:
        assert len(set(words)) == len(words), "vCPUs do not share words"
    swept = set()
    for i in range(vcpus):
        first, hole, behind, end = layout.share(i, vcpus)
        assert first <= hole <= behind <= end
        swept |= {*range(first, hole, PAGE), *range(behind, end, PAGE)}
    assert swept == {*range(layout.start, layout.end, PAGE)} - {*range(low, high, PAGE)}
    at = layout.inside(512)
    assert layout.start <= at
    assert at + 512 <= layout.end
    assert at + 512 <= low or high <= at


@given(fields(), st.sampled_from([None, PAGE, 16 * PAGE]))
def test_the_views_differ_by_the_hole_alone(layout: Layout, chunk: int | None) -> None:
    full, holed = layout.views(chunk)
    rules = Rules()
    punch = plan(full, holed, table=layout.table(full, rules), rules=rules)
    before, after = (
        sum(end - start for start, end in table.mapped(0)) for table in (punch.before, punch.after)
    )
    low, high = layout.lost
    assert before == layout.size
    assert after == layout.size - (high - low)
    for slot in (*punch.before, *punch.after):
        assert slot.offset == slot.gpa - layout.start, "offsets are those in all of the RAM"


def test_a_logged_field_has_logged_slots() -> None:
    layout = Layout(size=1 << 20, logged=True)
    full, _ = layout.views()
    assert all(slot.logged for slot in layout.table(full, Rules()))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"size": PAGE}, "slot of 4096"),
        ({"size": (1 << 20) + 1}, "slot of 1048577"),
        ({"hole_size": 0}, "hole of 0"),
        ({"size": 1 << 20, "hole_size": 2 << 20}, "does not lie"),
        ({"size": 1 << 20, "hole_offset": 1 << 20}, "does not lie"),
        ({"size": 1 << 20, "hole_size": (1 << 20) - 4 * PAGE, "hole_offset": 0}, "less than 8"),
        ({"extra": -1}, "further slots"),
    ],
)
def test_what_does_not_fit_is_said(options: dict[str, int], what: str) -> None:
    with pytest.raises(InputError, match=what):
        Layout(**options)  # type: ignore[arg-type]  # integers all
