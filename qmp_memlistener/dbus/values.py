"""Facts as D-Bus values.  Pure, but for the types of dbus-fast.

D-Bus has no null and no JSON: a key whose value is null is left out, and each value of a dictionary
carries its type.  The type of a key is the same in each message, so lists are `av` also when empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
from dbus_fast import Variant

from ..text import valid_text

__all__ = ["MOST", "dictionaries", "dictionary", "text", "variant"]

MOST = 1000
"""So many elements of a list are in a signal; `cut` then has the names of lists that had more."""
_LARGEST, _SMALLEST = (1 << 64) - 1, -(1 << 63)


def text(value: str) -> str:
    """As D-Bus allows it: Unicode without NUL; the rest is escaped."""
    return valid_text(value).replace("\0", "\\x00")


def variant(value: object) -> Variant:
    """A value with its D-Bus type: b, t (x when it is negative), d, s, a{sv} or av."""
    if isinstance(value, bool):
        return Variant("b", value)
    if isinstance(value, int):
        if 0 <= value <= _LARGEST:
            return Variant("t", value)
        # 2^64 is the size of a whole address space: no type has it
        return Variant("x", value) if _SMALLEST <= value < 0 else Variant("s", str(value))
    if isinstance(value, float):
        return Variant("d", value)
    if isinstance(value, str):
        return Variant("s", text(value))
    if isinstance(value, Mapping):
        return Variant("a{sv}", dictionary(value))
    if isinstance(value, Iterable):
        return Variant("av", [variant(item) for item in value if item is not None])
    return variant(msgspec.to_builtins(value))


def dictionary(
    facts: object, *, leave_out: Iterable[str] = (), most: int = 0
) -> dict[str, Variant]:
    """`a{sv}` of a struct, dataclass or mapping; with `most`, of longer lists only so many."""
    known = msgspec.to_builtins(facts)
    assert isinstance(known, dict)
    found: dict[str, Variant] = {}
    cut = []
    for key, value in known.items():
        if value is None or key in leave_out:
            continue
        if most and isinstance(value, list) and len(value) > most:
            cut.append(key)
            value = value[:most]
        found[text(str(key))] = variant(value)
    if cut:
        found["cut"] = variant(cut)
    return found


def dictionaries(items: Iterable[object]) -> list[dict[str, Variant]]:
    """`aa{sv}`."""
    return [dictionary(item) for item in items]
