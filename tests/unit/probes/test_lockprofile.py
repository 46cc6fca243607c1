"""What `info sync-profile` prints, as numbers with bounds, and the difference of two of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.errors import ProtocolViolation
from qmp_memlistener.probes.lockprofile_text import Profile, Waits, difference, read_profile

PLACE = Path(__file__).parents[2] / "conformance" / "probes"
SAMPLES = sorted(PLACE.glob("sync-profile-*.txt"))
HEAD = "Type               Object  Call site  Wait Time (s)         Count  Average (us)\r\n"
RULE = "-" * 79 + "\r\n"


def printed(*rows: tuple[str, int, int]) -> str:
    """As pr_report() prints (site, ns, count); QEMU cuts the average to whole ns."""
    lines = [
        f"BQL mutex  {'0x55d3d341eb40':>14}  {site}  {ns * 1e-9:13.5f}  {n:12d}  "
        f"{(ns // n if n else 0) * 1e-3:12.2f}\r\n"
        for site, ns, n in rows
    ]
    return HEAD + RULE + "".join(lines) + RULE + "\r\n"


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.stem)
def test_what_each_qemu_printed(path: Path) -> None:
    """128 MiB were touched page by page while the guest changed its map: somebody waited."""
    text = path.read_text()
    profile = read_profile(text)
    assert profile.rows == sum(line[:1] in "mBrc" and line[:1] != "" for line in text.splitlines())
    assert len(profile.bql) == sum(line.startswith("BQL mutex") for line in text.splitlines())
    assert {"util/main-loop.c", "util/rcu.c"} <= {site.split(":")[0] for site in profile.bql}
    longest = max(profile.bql.values(), key=lambda w: w.total_ns)
    assert longest.low_ns > 50_000_000
    assert longest.count >= 1
    for waits in profile.bql.values():
        assert 0 <= waits.low_ns <= waits.total_ns <= waits.high_ns
        assert waits.high_ns - waits.low_ns <= 10_000


def test_there_are_samples_of_several_versions() -> None:
    assert len({path.stem.split("-")[-1] for path in SAMPLES}) >= 3


def test_an_empty_profile() -> None:
    assert read_profile(HEAD + RULE + RULE + "\r\n") == Profile({}, 0)


def test_the_same_site_twice_is_added_up() -> None:
    """Not coalesced, or a path that QEMU has shortened to the same text."""
    profile = read_profile(printed(("util/rcu.c:269", 5_000_000, 1), ("util/rcu.c:269", 0, 3)))
    assert profile.rows == 2
    assert profile.bql["util/rcu.c:269"].count == 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sync-profile is off\r\n",
        "unknown command: 'info sync-profile'\r\n",
        RULE + HEAD,
        HEAD + RULE + "BQL mutex  0x55  util/rcu.c:269  a  1  2\r\n",
        HEAD + RULE + "spinlock  0x55d3d341eb40  util/rcu.c:269  0.00000  1  0.10\r\n",
    ],
)
def test_what_no_qemu_prints(text: str) -> None:
    with pytest.raises(ProtocolViolation, match="sync-profile"):
        read_profile(text)


@given(st.lists(st.tuples(st.integers(0, 10**13), st.integers(0, 10**8)), max_size=8))
def test_the_bounds_hold_what_was_printed(values: list[tuple[int, int]]) -> None:
    rows = [(f"a/{i}.c:{i}", ns if n else 0, n) for i, (ns, n) in enumerate(values)]
    profile = read_profile(printed(*rows))
    for site, ns, n in rows:
        waits = profile.bql[site]
        assert waits.count == n
        assert waits.low_ns - 1 <= ns <= waits.high_ns + 1
        assert waits.high_ns - waits.low_ns <= 10_000 + 1


@given(
    st.dictionaries(
        st.sampled_from([f"a.c:{i}" for i in range(6)]),
        st.tuples(*[st.integers(0, 10**10), st.integers(1, 10**6)] * 2),
    )
)
def test_the_difference_holds_what_came_in_between(
    sites: dict[str, tuple[int, int, int, int]],
) -> None:
    before = read_profile(printed(*((s, w, n) for s, (w, n, _, _) in sites.items())))
    after = read_profile(printed(*((s, w + x, n + m) for s, (w, n, x, m) in sites.items())))
    found, reset = difference(before, after)
    assert not reset
    for site, (_, _, more, count) in sites.items():
        assert found[site].count == count
        assert found[site].low_ns - 2 <= more <= found[site].high_ns + 2
    assert difference(before, before) == ({}, False)


def test_a_reset_in_between_is_noticed() -> None:
    before = read_profile(printed(("a.c:1", 9_000_000, 5), ("b.c:2", 0, 7)))
    for rows in ([("a.c:1", 2_000_000, 1), ("b.c:2", 0, 8)], [("b.c:2", 0, 8)]):
        found, reset = difference(before, read_profile(printed(*rows)))
        assert reset
        assert found["b.c:2"].count == 8
    assert found == {"b.c:2": Waits(8, 0, 48)}
