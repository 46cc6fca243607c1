"""Markup in which text cannot become markup: whatever is not `Html` is escaped.

Names come from guests, QEMU and files.  Only `tag`, `data` and `page` make `Html`, and each of them
escapes the text that it is given.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable
from pathlib import Path

from ..text import json_bytes, printable

__all__ = ["Html", "page", "shown", "tag"]

_LONGEST = 300
_VOID = ("meta", "rect", "line", "path", "br")
_FILES = Path(__file__).parent


class Html(str):
    """Markup; `+` and f-strings make plain text of it, which would be escaped again."""

    __slots__ = ()


def shown(text: str) -> str:
    """A name as a page shows it: nothing invisible, nothing that turns text round, not endless."""
    text = printable(text[: _LONGEST + 1])
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def tag(
    name: str, /, *children: str | Iterable[str], **attributes: str | float | bool | None
) -> Html:
    """An element.  `_` in names of attributes is `-`; None and False leave one out."""
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        plain = key.rstrip("_").replace("_", "-")
        words.append(plain if value is True else f'{plain}="{_text(str(value))}"')
    opening = f"<{' '.join(words)}>"
    if name in _VOID:
        return Html(opening[:-1] + "/>")
    return Html(f"{opening}{''.join(map(_child, children))}</{name}>")


def _child(child: str | Iterable[str]) -> str:
    if isinstance(child, Html):
        return child
    if isinstance(child, str):
        return _text(child)
    return "".join(map(_child, child))


def _text(text: str) -> str:
    return html.escape(printable(text), quote=True)


def page(title: str, body: Iterable[str], values: object) -> str:
    """The whole page.  It loads nothing, and runs only the script that is part of this package.

    `values` is what the script draws, as JSON that cannot end the element it stands in.
    """
    style, script = (_own(name) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", shown(title)),
        tag("style", Html(style)),
    )
    parts = tag(
        "body",
        tag("main", *body),
        tag("script", _data(values), type="application/json", id="values"),
        tag("script", Html(script)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, parts, lang='en')}\n"


def _data(values: object) -> Html:
    text = json_bytes(values).decode()
    for c in "<>&\u2028\u2029":
        text = text.replace(c, f"\\u{ord(c):04x}")
    return Html(text)


def _own(name: str) -> str:
    return (_FILES / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
