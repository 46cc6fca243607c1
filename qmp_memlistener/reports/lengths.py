"""Lengths of time, bounds, counts and kinds of stall in words."""

from __future__ import annotations

from ..probes import StallKind

__all__ = [
    "KIND_ORDER",
    "bracket_text",
    "duration_text",
    "kind_text",
    "span_text",
]

_KINDS = {
    StallKind.MAIN_LOOP: "main loop",
    StallKind.BQL_WAIT: "BQL wait",
    StallKind.BQL_HOLD: "BQL hold",
    StallKind.COMMIT: "commit",
    StallKind.SLOT_UPDATE: "slot update",
    StallKind.VCPU_INHIBIT: "vCPU inhibit",
    StallKind.VCPU_PAUSE: "vCPU pause",
    StallKind.VCPU_GAP: "vCPU gap",
    StallKind.MISSING: "RAM missing",
}
KIND_ORDER = {kind: i for i, kind in enumerate(_KINDS)}

# (from here on, unit, its name): what is shorter than 0.1 of a unit is shown in the one below
_UNITS = (
    (600 * 10**9, 60 * 10**9, "min"),
    (10**9, 10**9, "s"),
    (10**5, 10**6, "ms"),
    (10**3, 10**3, "us"),
    (0, 1, "ns"),
)


def duration_text(ns: int) -> str:
    """A length of time as people say it: `850 ns`, `12 us`, `0.81 ms`, `452 ms`, `2.31 s`."""
    unit, name = _unit(ns)
    return f"{_number(ns, unit, 3)} {name}"


def bracket_text(at_least_ns: int, at_most_ns: int) -> str:
    """Both bounds where they are more than 10 % apart (`4.2 to 5.1 ms`), else the upper one.

    Bounds are rounded outwards.
    """
    if (at_most_ns - at_least_ns) * 10 <= at_most_ns:
        return duration_text(at_most_ns)
    unit, name = _unit(at_most_ns)
    high = f"{_number(at_most_ns, unit, 2, up=True)} {name}"
    if not at_least_ns:
        return f"up to {high}"
    if at_least_ns * 20 < unit:
        lower, lower_name = _unit(at_least_ns)
        return f"{_number(at_least_ns, lower, 2, up=False)} {lower_name} to {high}"
    return f"{_number(at_least_ns, unit, 2, up=False)} to {high}"


def span_text(at_least_ns: int | None, at_most_ns: int | None) -> str:
    """As `bracket_text`, for a column: `4.2-5.1 ms`; `-` for what was not measured.

    Without a lower bound, as in recordings of former versions, it is `<5.1 ms`.
    """
    if at_most_ns is None:
        return "-"
    low = at_least_ns or 0
    if at_least_ns is not None and (at_most_ns - low) * 10 <= at_most_ns:
        return duration_text(at_most_ns)
    unit, name = _unit(at_most_ns)
    high = f"{_number(at_most_ns, unit, 2, up=True)} {name}"
    if low * 100 < unit:
        return f"<{high}"
    return f"{_number(low, unit, 2, up=False)}-{high}"


def kind_text(kind: str) -> str:
    """A kind of stall window in words."""
    return _KINDS.get(StallKind(kind), kind)


def _unit(ns: int) -> tuple[int, str]:
    for start, unit, name in _UNITS:
        # what would be rounded up to `start` counts as `start`
        if ns >= start - start // 2000:
            return unit, name
    return 1, "ns"


def _number(ns: int, unit: int, digits: int, *, up: bool | None = None) -> str:
    """`ns` in `unit` with so many digits (two for microseconds), at most two of them decimals.

    `up`: rounded up, down or (None) to the nearest.
    """
    if unit == 1:
        return str(ns)
    most = 10 ** (min(digits, 2) if unit == 1000 else digits)
    for decimals in (2, 1, 0):
        step = unit // 10**decimals
        steps = -(-ns // step) if up else ns // step if up is not None else (ns + step // 2) // step
        if steps < most:
            break
    return f"{steps / 10**decimals:.{decimals}f}"
