"""Finds the output of `info mtree` in what people saved: sessions, QMP replies, quoted text.

A session has prompts, echoed commands and other output around it; a QMP reply has the text in a
JSON string.  What is around is left out, what is inside is not touched: a line of the map that is
damaged is refused by the parser, with its number in the file.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass, field

from ..errors import InputError, MtreeError
from ..topology import Dump, parse, read_maps
from .opening import HEADING, identify, open_input

__all__ = ["read_dump", "texts_in"]

_MOST_BYTES = 256 << 20
"""Of a text: 100,000 regions print 12 MiB."""

_PROMPT = re.compile(r"(?:\((?:qemu|QEMU)\) ?)+")
_TERMINAL = re.compile(r"\x1b(?:\[[0-9;?]{0,16}[ -/]?[@-~]|[()][0-9A-Za-z]|[=>78])|[^\n]\x08|\x08")
_QUOTED = re.compile(r"^([ \t>|]{1,16})(?:address-space:|memory-region:|FlatView #)", re.MULTILINE)
# A string of JSON, or of Python as qmp-shell printed replies once.
_JSON_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*+"')
_PYTHON_STRING = re.compile(r"'(?:[^'\\\n]|\\.)*+'")
_REGION_WORDS = "(prio "
_HEADINGS = ("address-space: ", "memory-region: ", "FlatView #")


@dataclass(slots=True)
class _Text:
    """One command's output: its lines, and the number of the first in the file."""

    first_line: int
    lines: list[str] = field(default_factory=list)
    flat: bool = False
    regions: bool = False  # it has come to the sections of aliased regions
    memory: bool = False


def read_dump(path: str) -> Dump:
    """The one map that a file (`-` is stdin) holds, parsed.

    Outputs of several commands are one map when they show the same memory.  Raises InputError
    when the file cannot be read, holds no `info mtree` output or several that differ, and
    MtreeError for output that no QEMU prints.
    """
    with open_input(path) as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise InputError(
            f"{path} is larger than {_MOST_BYTES >> 20} MiB, no memory map is",
            remedy="give the output of `info mtree` alone",
        )
    if b"\0" in data:
        raise InputError(f"{path} is not text", remedy="give the text that QEMU printed")
    try:
        found = texts_in(data.decode("utf-8", "backslashreplace"))
        dumps = [parse("\n".join(t.lines), first_line=t.first_line) for t in found]
    except MtreeError as exc:
        raise exc.of(path) from None
    if not dumps:
        raise _nothing(path, data)
    if len(dumps) > 1:
        _refuse_differing(path, found, dumps)
    # the one that shows most: owners and disabled regions
    return max(dumps, key=lambda d: (not d.is_flat, d.shows_owners, d.shows_disabled))


def texts_in(text: str) -> list[_Text]:
    """The outputs of `info mtree` in `text`, in order.  Linear in its length.

    Raises MtreeError for regions below no heading.
    """
    replies = [t for line_no, reply in _strings(text) for t in _in_plain(reply, line_no)]
    return replies or _in_plain(text, None)


def _strings(text: str) -> list[tuple[int, str]]:
    """Strings of JSON (or Python) that hold a map, with their line in the file."""
    out: list[tuple[int, str]] = []
    if "\\n" not in text:
        return out
    for line_no, line in enumerate(text.split("\n"), 1):
        if "\\n" not in line or not HEADING.search(line):
            continue
        for pattern, read in ((_JSON_STRING, json.loads), (_PYTHON_STRING, ast.literal_eval)):
            found = [m[0] for m in pattern.finditer(line) if HEADING.search(m[0])]
            for literal in found:
                try:
                    out.append((line_no, str(read(literal))))
                except (ValueError, SyntaxError):
                    continue
            if out and out[-1][0] == line_no:
                break
        else:
            raise MtreeError(line_no, line, "a string of JSON that is cut off, or damaged")
    return out


def _in_plain(text: str, reply_line: int | None) -> list[_Text]:
    """The outputs in plain text; `reply_line` is where it is one string in the file."""
    if "\x1b" in text or "\x08" in text:
        text = _TERMINAL.sub("", text)
    quoted = _QUOTED.search(text)
    prefix = quoted[1] if quoted is not None else ""
    found: list[_Text] = []
    now: _Text | None = None
    line_no, line = 0, ""
    inside = False  # the last line that said something belongs to `now`
    for line_no, raw in enumerate(text.replace("\r", "").split("\n"), 1):
        line = raw
        if prefix:
            bare = raw.strip(" \t>|")
            line = raw.removeprefix(prefix) if raw.startswith(prefix) else raw if bare else ""
        prompt = _PROMPT.match(line)
        if prompt is not None:
            now, inside, line = None, False, line[prompt.end() :]
        if HEADING.match(line):
            if now is None or _is_another(now, line):
                now = _Text(line_no if reply_line is None else 1)
                found.append(now)
            _note_heading(now, line)
            now.lines.append(line)
            inside = True
        elif now is None or not inside:
            if _REGION_WORDS in line and prompt is None:
                raise MtreeError(line_no, line, "a region below no heading")
            if now is not None:
                now.lines.append("")
        elif not line or line[0] in " [":
            now.lines.append(line)
        else:
            now.lines.append("")
            inside = False
            if _REGION_WORDS in line:
                raise MtreeError(line_no, line, "not a region")
    if line and not inside and any(h.startswith(line) for h in _HEADINGS):
        raise MtreeError(line_no, line, "the text is cut off")
    return found


def _is_another(now: _Text, heading: str) -> bool:
    """The heading begins another command's output: QEMU prints address spaces first, once each."""
    if heading.startswith("FlatView #"):
        return not now.flat or heading.rstrip() == "FlatView #0"
    if now.flat:
        return True
    return heading.startswith("address-space: ") and (
        now.regions or (now.memory and heading == "address-space: memory")
    )


def _note_heading(now: _Text, heading: str) -> None:
    now.flat |= heading.startswith("FlatView #")
    now.regions |= heading.startswith("memory-region: ")
    now.memory |= heading == "address-space: memory"


def _refuse_differing(path: str, found: list[_Text], dumps: list[Dump]) -> None:
    """Raises InputError unless all show the same memory."""
    shown = []
    for dump in dumps:
        maps = read_maps(dump, ["memory"])
        view = maps["memory"].view if "memory" in maps else ()
        shown.append([(r.start, r.size, r.kind, r.name, r.offset) for r in view])
    other = next((i for i, rows in enumerate(shown) if rows != shown[0]), None)
    if other is not None:
        raise InputError(
            f"{path} has {len(dumps)} maps that differ: the first begins in line "
            f"{found[0].first_line}, another in line {found[other].first_line}",
            remedy="give each map in a file of its own; `plan --before A --after B` takes two",
        )


def _nothing(path: str, data: bytes) -> InputError:
    identity = identify(data[: 1 << 20])
    if identity is not None:
        return InputError(
            f"{path} is {identity.what}, not `info mtree` output",
            remedy=identity.remedy.replace("FILE", path),
        )
    lines = data[:4096].decode("utf-8", "replace").splitlines()
    numbered = ((n, line) for n, line in enumerate(lines, 1) if line.strip())
    line_no, line = next(numbered, (1, ""))
    return MtreeError(line_no, line, "no section of it begins anywhere in the file").of(path)
