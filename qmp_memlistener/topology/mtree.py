"""Reads what QEMU prints for `info mtree` (QEMU 7.2 to 11.1), with any of -f -d -o -D.

`parse` returns a `Dump`: either region trees (without -f) or QEMU's own flat views (with -f).
The grammar is that of `mtree_print_mr` and `mtree_print_flatview` (system/memory.c; 7.2:
softmmu/memory.c).  Whatever they do not print is refused with its line number.  Linking aliases
to their regions is `link`'s job, rendering a tree is `render`'s.

What the text cannot carry, and what is done about it:

- Without -D a disabled region is not printed but its children are, two levels deeper than the
  last printed ancestor.  Such children are taken for disabled.
- A region of size 0 prints like one of size 1.  RAM of one byte does not exist, nor does an alias
  to one byte in QEMU's sources: they count as empty, and so does what is disabled.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from ..errors import MtreeError
from ..text import quoted
from .model import ADDRESS_SPACE_SIZE, FlatRange, FlatView, Kind, Region

__all__ = ["Dump", "parse"]

_HEAD = (
    r"(?P<start>[0-9a-f]{16})-(?P<last>[0-9a-f]{16})"
    r" \(prio (?P<prio>-?\d{1,10}), (?P<nv>nv-)?(?P<kind>[A-Za-z/-]{1,16})\): "
)
# What follows the head is taken apart from its end (`_split`): names may hold anything, and a
# pattern with several open ends takes minutes for a long line.
_REGION = re.compile(r"(?:\[DETECTED OVERFLOW!\] )?(?P<indent> +)" + _HEAD)
_RANGE = re.compile(r"  " + _HEAD)
_WINDOW = re.compile(r" ([0-9a-f]{16})-[0-9a-f]{16}")
_OFFSET = re.compile(r" @([0-9a-f]{16})")
# AccelClass.name of the accelerators that have slots; once per address space of the view
_ACCELERATORS = (" KVM", " HVF", " NVMM", " WHPX", " MSHV", " Xen")
_OWNER = re.compile(r" owner:\{(?:dev|obj) (?:id|path|type)=([^}]*)\}")
_VIEW_SPACE = re.compile(r' AS "(?P<name>.*)", root: (?P<root>.*)')
_MAX_LINE = 8192  # the longest that QEMU prints are device paths of some hundred characters
_OLD_KINDS = frozenset({"RW", "R-", "-W", "--"})
_KINDS = {k.value: k for k in Kind} | {"container": Kind.IO}  # the latter: roots, 10.1 and later


@dataclass(slots=True)
class Dump:
    """One parsed `info mtree` text.

    `address_spaces` maps the name of each address space to its root region; several names may
    share one root, and devices of one type share a name: `address_space_counts` says how many.
    `regions` lists the aliased regions in the order in which QEMU printed them
    (names repeat).  With -f both are empty and `flat_views` maps address-space names to views.
    """

    address_spaces: dict[str, Region | None] = field(default_factory=dict)
    regions: list[Region] = field(default_factory=list)
    flat_views: dict[str, FlatView] = field(default_factory=dict)
    address_space_counts: Counter[str] = field(default_factory=Counter)
    shows_disabled: bool = False
    shows_owners: bool = False

    @property
    def is_flat(self) -> bool:
        """The text was made with -f."""
        return bool(self.flat_views)


def parse(text: str, *, first_line: int = 1) -> Dump:
    """Parse the text of one `info mtree` command; errors count lines from `first_line`.

    Raises MtreeError (with line number) for anything that QEMU does not print.
    """
    lines = text.replace("\r", "").split("\n")
    for line_no, line in enumerate(lines, first_line):
        if len(line) > _MAX_LINE:
            raise MtreeError(line_no, line, "longer than any line of QEMU's")
    for line in lines:
        if line.startswith("FlatView #"):
            return _parse_flat(lines, first_line)
        if line:
            break
    return _parse_trees(lines, first_line)


def _owners_at(text: str, end: int) -> int:
    """Where the owners in front of `end` begin; `end` when there are none."""
    while True:
        if text.endswith(" orphan", 0, end):
            end -= len(" orphan")
            continue
        if end and text[end - 1] == "}":
            at = max(text.rfind(" owner:{", 0, end), text.rfind(" parent:{", 0, end))
            if at >= 0 and text.find("}", at, end - 1) < 0:
                end = at
                continue
        return end


def _owner(text: str, start: int, end: int) -> str | None:
    if start == end:
        return None
    m = _OWNER.search(text, start, end)
    return m[1] if m else None


def _kind(text: str, line_no: int, line: str) -> Kind:
    try:
        return _KINDS[text]
    except KeyError:
        pass
    if text in _OLD_KINDS:
        raise MtreeError(
            line_no,
            line,
            f"a QEMU of 2016 or before wrote it, which prints {text} and not the region's kind",
            remedy="take the map with QEMU 7.2 to 11.1: what is RAM is not in this text",
        )
    raise MtreeError(line_no, line, f"unknown region type {quoted(text)}")


def _span(start: int, last: int) -> int:
    """Size of a printed range: QEMU prints the last address, modulo 2**64."""
    return ((last - start) % ADDRESS_SPACE_SIZE) + 1


# -- trees ---------------------------------------------------------------------------------


class _TreeBuilder:
    """Puts the regions of one section below each other by their indentation."""

    __slots__ = ("bases", "levels", "stack")

    def __init__(self) -> None:
        self.stack: list[Region] = []
        self.bases: list[int] = []  # absolute address of each region on the stack
        self.levels: list[int] = []

    def add(self, region: Region, start: int, level: int) -> bool:
        """Place `region`, printed at absolute `start`; True when it is the section's root."""
        while self.levels and self.levels[-1] >= level:
            self.stack.pop()
            self.bases.pop()
            self.levels.pop()
        if not self.stack:
            region.addr = start
            root = True
        else:
            root = False
            if self.levels[-1] + 1 < level:
                region.enabled = False  # its parent is disabled and was not printed
            elif self.stack[-1].is_alias:
                # an alias has no children of its own: the parent is a disabled sibling of it
                region.enabled = False
            region.addr = (start - self.bases[-1]) % ADDRESS_SPACE_SIZE
            self.stack[-1].children.append(region)
        self.stack.append(region)
        self.bases.append(start)
        self.levels.append(level)
        return root


def _parse_trees(lines: list[str], first_line: int) -> Dump:
    dump = Dump()
    names: list[str] = []  # address spaces waiting for the tree that they share
    in_region = False
    builder = _TreeBuilder()
    match = _REGION.match
    have_root = True
    seen_any = False
    for line_no, line in enumerate(lines, first_line):
        if not line:
            continue
        if line[0] != " " and line[0] != "[":
            head, sep, name = line.partition(": ")
            if not sep or head not in ("address-space", "memory-region"):
                raise MtreeError(line_no, line, "neither a heading nor a region")
            seen_any = True
            if head == "memory-region":
                in_region, names = True, []
            else:
                if in_region or have_root:
                    names = []
                in_region = False
                names.append(name)
                dump.address_spaces[name] = None
                dump.address_space_counts[name] += 1
            have_root = False
            builder = _TreeBuilder()
            continue
        m = match(line)
        if m is None:
            raise MtreeError(line_no, line, "not a region")
        if not seen_any:
            raise MtreeError(line_no, line, "a region before any heading")
        indent = len(m["indent"])
        if indent % 2:
            raise MtreeError(line_no, line, "odd indentation")
        region = _region(m, line_no, line, dump)
        root = builder.add(region, int(m["start"], 16), indent // 2)
        if not root:
            continue
        if have_root or indent != 2:
            # the real root is disabled and not printed; nothing of it is visible
            region.enabled = False
            continue
        have_root = True
        if in_region:
            dump.regions.append(region)
        else:
            for name in names:
                dump.address_spaces[name] = region
    if not seen_any:
        raise MtreeError(first_line, lines[0] if lines else "", "no address space in it")
    if not dump.address_spaces:
        _take_system(dump, first_line, lines[0])
    return dump


def _take_system(dump: Dump, line_no: int, line: str) -> None:
    """Sections of regions alone: the address spaces were cut off.

    `system` is the root of `memory` on every machine (system/physmem.c, `memory_map_init`).
    """
    for region in dump.regions:
        if region.name == "system":
            dump.address_spaces["memory"] = region
            return
    raise MtreeError(
        line_no,
        line,
        "no address space in it, and no region `system`",
        remedy="give the whole output of `info mtree`, from its first `address-space:` on",
    )


def _region(m: re.Match[str], line_no: int, line: str, dump: Dump) -> Region:
    kind = _kind(m["kind"], line_no, line)
    start = int(m["start"], 16)
    size = _span(start, int(m["last"], 16))
    at = m.end()
    end = _owners_at(line, len(line))
    owner = _owner(line, end, len(line))
    if end < len(line):
        dump.shows_owners = True
    enabled = not line.endswith(" [disabled]", at, end)
    if not enabled:
        dump.shows_disabled = True
        end -= len(" [disabled]")
    name, target, offset = line[at:end], None, 0
    window = _WINDOW.fullmatch(line, end - 34, end) if name.startswith("alias ") else None
    if window is None and name.startswith("alias ") and " @" in name:
        raise MtreeError(line_no, line, "an alias without its window: the line is cut off")
    if window is not None:
        alias, sep, aliased = line[at + len("alias ") : end - 34].rpartition(" @")
        if sep:
            name, target, offset = alias, aliased, int(window[1], 16)
    if size == 1 and (kind.backed or target is not None or not enabled):
        size = 0
    return Region(
        addr=0,
        size=size,
        priority=int(m["prio"]),
        kind=kind,
        name=name,
        enabled=enabled,
        nonvolatile=m["nv"] is not None,
        owner=owner,
        target=target,
        offset=offset,
        line_no=line_no,
    )


# -- flat views ----------------------------------------------------------------------------


def _parse_flat(lines: list[str], first_line: int) -> Dump:
    dump = Dump()
    spaces: list[str] = []
    ranges: list[FlatRange] = []
    in_dispatch = False
    started = False

    def finish(line_no: int, line: str) -> None:
        try:
            for space in spaces:
                dump.flat_views[space] = FlatView(ranges, space)
        except ValueError as exc:
            raise MtreeError(line_no, line, str(exc)) from None

    match = _RANGE.match
    for line_no, line in enumerate(lines, first_line):
        if not line:
            continue
        if line.startswith("FlatView #"):
            finish(line_no, line)
            spaces, ranges, in_dispatch, started = [], [], False, True
        elif not started:
            raise MtreeError(line_no, line, "no FlatView heading before it")
        elif in_dispatch:
            continue
        elif line.startswith("  Dispatch"):
            in_dispatch = True
        elif line.startswith(" AS "):
            m = _VIEW_SPACE.fullmatch(line)
            if m is None:
                raise MtreeError(line_no, line, "not an address space")
            spaces.append(m["name"])
        elif line.startswith(" Root memory region: ") or line == "  No rendered FlatView":
            continue
        else:
            m = match(line)
            if m is None:
                raise MtreeError(line_no, line, "not a range of a flat view")
            ranges.append(_range(m, line_no, line, dump))
    finish(first_line + len(lines) - 1, "")
    return dump


def _range(m: re.Match[str], line_no: int, line: str, dump: Dump) -> FlatRange:
    start = int(m["start"], 16)
    last = int(m["last"], 16)
    if last < start:
        raise MtreeError(line_no, line, "it ends before it starts")
    slots_at = len(line)
    while line.endswith(_ACCELERATORS, m.end(), slots_at):
        slots_at = line.rindex(" ", 0, slots_at)
    end = _owners_at(line, slots_at)
    if end < slots_at:
        dump.shows_owners = True
    owner = _owner(line, end, slots_at)
    offset = _OFFSET.fullmatch(line, max(end - 18, m.end()), end)
    return FlatRange(
        start=start,
        size=last - start + 1,
        kind=_kind(m["kind"], line_no, line),
        name=line[m.end() : end if offset is None else end - 18],
        offset=int(offset[1], 16) if offset else 0,
        owner=owner,
        nonvolatile=m["nv"] is not None,
        memslot=slots_at < len(line),
    )
