"""Pages: safe whatever names are, true about bounds and gaps, of bounded size."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qmp_memlistener.kvmlab.race import race_document, race_of
from qmp_memlistener.page import Lanes, comparison_page, race_page
from qmp_memlistener.page.charts import Bar, bars
from qmp_memlistener.page.lanes import MOST_BINS, MOST_LANES, Lane
from qmp_memlistener.page.markup import Html, shown, tag
from qmp_memlistener.records import Recording
from qmp_memlistener.reports.recording import Contents
from qmp_memlistener.text import json_bytes
from tests.unit.page.page_support import (
    EVIL,
    MS,
    START,
    comparison,
    page_of,
    race,
    records,
    stall,
    write_recording,
)

SAMPLES = sorted((Path(__file__).parents[2] / "conformance" / "replay").glob("*/*.jsonl.gz"))


class Reader(HTMLParser):
    """What a browser would see: elements, text outside scripts and styles, the values."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self._in: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in = tag if tag in self.inside else self._in
        if self._in == tag:
            self.inside[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = None if tag == self._in else self._in

    def handle_data(self, data: str) -> None:
        if self._in is None:
            self.text.append(data)
        else:
            self.inside[self._in][-1] += data

    @property
    def values(self) -> Any:  # noqa: ANN401  what a page holds
        return json.loads(self.inside["script"][0])


@pytest.fixture(params=["recording", "comparison", "race"])
def page(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    match request.param:
        case "recording":
            return page_of(write_recording(tmp_path / "r.jsonl"))
        case "comparison":
            return comparison_page(comparison(), EVIL)
        case _:
            return race_page(race())


def test_names_stay_text(page: str) -> None:
    read = Reader(page)
    assert not {name for name, _ in read.elements} & {"img", "iframe", "object", "link", "a"}
    assert [name for name, _ in read.elements].count("script") == 2
    assert EVIL not in page
    assert EVIL in "".join(read.text)
    for _, attributes in read.elements:
        assert not any(
            key.startswith("on") or key in ("src", "href", "style") for key in attributes
        )


def test_a_browser_runs_only_what_the_package_has(page: str) -> None:
    read = Reader(page)
    (policy,) = [a["content"] for _, a in read.elements if "http-equiv" in a]
    assert policy is not None
    for kind, text in (("script", read.inside["script"][1]), ("style", read.inside["style"][0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "http://" not in page
    assert "https://" not in page
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("):
        assert word not in page


def test_values_cannot_end_their_element(page: str) -> None:
    raw = Reader(page).inside["script"][0]
    assert not set(raw) & set("<>&\u2028\u2029")


def test_the_first_screen_says_what_happened(tmp_path: Path) -> None:
    read = Reader(page_of(write_recording(tmp_path / "r.jsonl")))
    text = " ".join(read.text)
    assert "was watched for 60.0 ms" in text
    assert "Its memory map changed 2 times, in 1 slot operation" in text
    assert "The longest stall: BQL hold, 2.0 to 9.0 ms, cause transition #1 pci bar" in text
    assert "Not measured: main loop, BQL wait, commit" in text
    assert "Strategies were not compared in this recording." in text
    assert "Something was missed 1 time" in text
    assert "off: " in text  # the probe that did not run, with its reason
    assert "How late times of transitions may be is not recorded." in text


def test_a_hole_is_drawn_from_when_it_opened_to_when_it_closed(tmp_path: Path) -> None:
    values = Reader(page_of(write_recording(tmp_path / "r.jsonl"))).values
    (holes,) = [g["lanes"] for g in values["groups"] if g["name"] == "Map"]
    (hole,) = [lane for lane in holes if lane["name"].startswith("hole 0xa0000+0x20000 in")]
    (item,) = hole["items"]
    assert item[:5] == [10 * MS, 40 * MS, 30 * MS, 30 * MS, 1]


def test_both_bounds_of_a_stall_and_where_it_lies_are_drawn(tmp_path: Path) -> None:
    values = Reader(page_of(write_recording(tmp_path / "r.jsonl"))).values
    (lanes,) = [g["lanes"] for g in values["groups"] if g["name"] == "Stalls"]
    (item,) = lanes[0]["items"]
    assert item[:5] == [10 * MS, 20 * MS, 2 * MS, 9 * MS, 1]


def test_a_lane_is_bounded_and_keeps_what_is_longest() -> None:
    lane = Lane("it")
    for i in range(100_000):
        length = 10**9 if i == 54_321 else i % 97
        lane.add(i * 1000, i * 1000 + length, length, length, None)
    drawn = lane.drawn()
    assert MOST_BINS // 4 < len(drawn) <= MOST_BINS
    assert lane.count == sum(d.alike for d in drawn) == 100_000
    assert max(d.most for d in drawn) == 10**9
    assert [d.start for d in drawn] == sorted(d.start for d in drawn)


def test_few_things_are_all_drawn_however_far_apart() -> None:
    lane = Lane("it")
    starts = [0, 1, 2, 10**12, 10**15]
    for start in starts:
        lane.add(start, start, 0, 0, None)
    assert [d.start for d in lane.drawn()] == starts


def test_threads_without_end_are_lanes_with_an_end() -> None:
    lanes = Lanes(START)
    for i in range(1000):
        lanes.take(stall(i, 1, 2, thread=f"thread {i}"))
    ((_, _, found),) = lanes.groups(START + 10**9)
    assert len(found) == MOST_LANES + 1
    assert sum(lane.count for lane in found) == 1000


def test_a_page_of_many_events_is_small(tmp_path: Path) -> None:
    many = [stall(i * 1000, i % 7, 10 + i % 7, thread=f"CPU {i % 4}") for i in range(20_000)]
    page = page_of(write_recording(tmp_path / "r.jsonl", [*records(), *many]))
    assert len(page) < 2_000_000
    values = Reader(page).values
    (found,) = [g["lanes"] for g in values["groups"] if g["name"] == "Stalls"]
    assert sum(lane["count"] for lane in found) == 20_001
    assert sum(item[4] for lane in found for item in lane["items"]) == 20_001


def test_what_was_not_measured_is_no_bar_and_no_zero() -> None:
    page = bars([Bar("a", None, None, "not measured"), Bar("b", 0, 0, "none seen")], "it")
    assert "<rect" not in page
    assert "not measured" in page
    assert "none seen" in page
    assert ">0 ns<" not in page


def test_a_length_between_bounds_is_filled_to_the_lower_one() -> None:
    page = bars([Bar("a", 10**6, 10**8, "1-100 ms")], "it")
    sure, maybe = re.findall(r'<rect x="([\d.]+)" y="\d+" width="([\d.]+)"[^>]*class="(\w+)"', page)
    assert sure[2] == "sure"
    assert maybe[2] == "maybe"
    assert float(maybe[0]) == float(sure[1]) > 0
    assert float(maybe[1]) > 0


def test_the_page_of_a_comparison_answers() -> None:
    text = " ".join(Reader(comparison_page(comparison(), "plug virtio-net-pci n0")).text)
    assert "Strategies compared: plug virtio-net-pci n0" in text
    assert "pause lost more than direct: vCPU pause, by 2.00 ms a round." in text
    assert "Longest stall under pause: vCPU pause, 2.00 ms" in text
    assert "Bounds are too wide to compare everywhere: BQL hold." in text
    # what tells them apart is the first picture
    assert text.index("vCPU pause: the longest") < text.index("BQL hold: the longest")
    assert "none seen" in text
    assert "round 3: done" in str(Reader(comparison_page(comparison(), "it")).values)


def test_the_page_of_a_race_answers() -> None:
    text = " ".join(Reader(race_page(race())).text)
    assert "The guest died of missing RAM under naive (2 of 400)." in text
    assert "RAM was never seen missing under pause." in text
    assert "Not run here: batch." in text


def test_a_race_comes_back_from_its_document() -> None:
    found = race()
    again = race_of(json_bytes(race_document(found)))
    assert json_bytes(race_document(again)) == json_bytes(race_document(found))


@pytest.mark.parametrize("path", SAMPLES[::5], ids=lambda p: f"{p.parent.name}-{p.name}")
def test_recorded_guests_have_pages(path: Path) -> None:
    recording = Recording(str(path))
    lanes = Lanes(recording.header.monotonic_ns, recording.header.stamp_bound_ns or 0)
    contents = Contents(recording, 20, lanes.take)
    assert contents.tally.transitions == sum(lanes.causes.values())
    read = Reader(page_of(path))
    count = {g["name"]: sum(x["count"] for x in g["lanes"]) for g in read.values["groups"]}
    assert count["Transitions"] == contents.tally.transitions
    assert count.get("Slot operations", 0) == contents.tally.slot_ops
    assert count.get("Stalls", 0) == contents.tally.stalls


def test_text_is_escaped_and_markup_is_not_escaped_twice() -> None:
    inner = tag("b", 'a<b>&"')
    assert inner == "<b>a&lt;b&gt;&amp;&quot;</b>"
    assert isinstance(inner, Html)
    assert tag("p", inner, title='"x') == f'<p title="&quot;x">{inner}</p>'
    assert tag("p", f"{inner}") == "<p>&lt;b&gt;a&amp;lt;b&amp;gt;&amp;amp;&amp;quot;&lt;/b&gt;</p>"


def test_names_are_shown_so_that_they_can_be_told_apart() -> None:
    assert shown("a\u202eb\n") == "a\\u202eb\\n"
    assert len(shown("x" * 5000)) == 300
