"""What `info sync-profile` prints, and the difference of two such texts.  Pure.

QEMU's synchronization profiler (util/qsp.c) adds up, for every call site, how long locking took
there and how often it was done, over all threads and since QEMU started.  pr_report() prints
seconds with five decimals and the average in microseconds with two: together they bound the total.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ProtocolViolation
from ..text import quoted

__all__ = ["BQL", "Profile", "Waits", "difference", "read_profile"]

BQL = "BQL mutex"

_HEAD = re.compile(r"Type +Object +Call site +Wait Time \(s\) +Count +Average \(us\)")
_RULE = re.compile(r"-{20,}")
_ROW = re.compile(
    r"(?P<type>mutex|BQL mutex|rec_mutex|condvar) +(?:\[ *\d+\]|0x[0-9a-f]+|\(nil\)) +"
    r"(?P<site>\S.*:\d+) +(?P<seconds>\d+\.\d{5}) +(?P<count>\d+) +(?P<average>\d+\.\d\d)"
)


@dataclass(frozen=True, slots=True)
class Waits:
    """`count` acquisitions that took between `low_ns` and `high_ns` in all."""

    count: int
    low_ns: int
    high_ns: int

    @property
    def total_ns(self) -> int:
        """The middle of what is possible."""
        return (self.low_ns + self.high_ns) // 2


@dataclass(frozen=True, slots=True)
class Profile:
    """Waits for the BQL by call site.  `rows` is how many rows of all types were printed."""

    bql: Mapping[str, Waits]
    rows: int


def read_profile(text: str) -> Profile:
    """Parse the text.  Raises ProtocolViolation, with the line, for what no QEMU prints."""
    lines = [line.rstrip() for line in text.splitlines()]
    bql: dict[str, Waits] = {}
    rows = 0
    for number, line in enumerate(lines, 1):
        match = _ROW.fullmatch(line)
        if match is None:
            expected = _HEAD if number == 1 else _RULE
            if line and not expected.fullmatch(line):
                raise ProtocolViolation(
                    f"line {number} is not `info sync-profile` output: {quoted(line)}"
                )
            continue
        rows += 1
        if match["type"] == BQL:
            waits = _waits(match["seconds"], int(match["count"]), match["average"])
            bql[match["site"]] = _sum(bql.get(match["site"]), waits)
    if not lines or not _HEAD.fullmatch(lines[0]):
        raise ProtocolViolation("not `info sync-profile` output: it has no headings")
    return Profile(bql, rows)


def difference(before: Profile, after: Profile) -> tuple[dict[str, Waits], bool]:
    """What was added at each call site, sites with nothing left out.

    The second value is True when some count went back: somebody reset the profile in between, and
    what is returned is what came after that.
    """
    found: dict[str, Waits] = {}
    reset = any(
        after.bql[site].count < waits.count if site in after.bql else True
        for site, waits in before.bql.items()
    )
    for site, now in after.bql.items():
        then = None if reset else before.bql.get(site)
        if then is None:
            then = Waits(0, 0, 0)
        if now.count > then.count or now.low_ns > then.high_ns:
            found[site] = Waits(
                now.count - then.count,
                max(0, now.low_ns - then.high_ns),
                max(0, now.high_ns - then.low_ns),
            )
    return found, reset


def _waits(seconds: str, count: int, average: str) -> Waits:
    total = int(seconds.replace(".", "")) * 10_000
    # 0.01 us is 10 ns; the average was cut to whole ns before it was rounded to that
    mean = int(average.replace(".", "")) * 10
    low = max(0, total - 5_000, (mean - 5) * count)
    high = min(total + 5_000, (mean + 6) * count)
    # a row is read while other threads write to it: the two may be of different moments
    return Waits(count, min(low, high), max(low, high))


def _sum(one: Waits | None, other: Waits) -> Waits:
    if one is None:
        return other
    return Waits(one.count + other.count, one.low_ns + other.low_ns, one.high_ns + other.high_ns)
