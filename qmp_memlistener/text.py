"""Text that others choose, as JSON can hold it.

Names, paths and command lines are bytes.  A byte that is no UTF-8, 0xff say, Python keeps as a lone
surrogate, U+DCFF (`os.fsdecode`); inside it stays that way, so that a path still leads to its file.
JSON has no form for it: there it is the six characters `\\udcff`, as in what is printed.  Lone
surrogates in the JSON of a peer look the same.  A backslash that was there already does, too: this
is for reading and does not lead back.
"""

from __future__ import annotations

import json

import msgspec

__all__ = ["count_text", "json_bytes", "printable", "quoted", "valid_text"]


def valid_text(text: str) -> str:
    """The text itself, if it is Unicode, or with escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def printable(text: str) -> str:
    """Text in which nothing acts on a terminal or makes it show something else.

    Guests, QEMU, files and other users choose names.  Control characters, line ends, bidirectional
    controls, invisible and unassigned characters become escapes, as Python writes them.
    """
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(c: str) -> str:
    return c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")


def quoted(value: object, limit: int = 120, *, only_ascii: bool = False) -> str:
    """A value as a message shows it: text in quotes, other values as JSON; one line, at most
    `limit` characters."""
    if isinstance(value, bytes | bytearray):
        value = value.decode("utf-8", "backslashreplace")
    shown = json.dumps(value, ensure_ascii=only_ascii, default=str)
    if not shown.isprintable():
        shown = json.dumps(value, default=str)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def count_text(count: int, one: str, many: str | None = None) -> str:
    """`1 loss`, `1,200 losses`: `many` where it is not `one` with an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def json_bytes(document: object) -> bytes:
    """A document or record as JSON, whatever text is in it."""
    try:
        return msgspec.json.encode(document)
    except UnicodeEncodeError:
        return msgspec.json.encode(_valid(msgspec.to_builtins(document)))


def _valid(value: object) -> object:
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, dict):
        return {_valid(key): _valid(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_valid(item) for item in value]
    return value
