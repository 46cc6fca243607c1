"""Damaged and hostile `info mtree` texts: read, or refused with MtreeError or InputError.

The texts are recorded ones (tests/conformance/mtree) with bytes, digits and lines changed, and
small ones that were made to explode: aliases of aliases, lines that no regular expression likes.
"""

from __future__ import annotations

import functools
import gzip
import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qmp_memlistener.errors import InputError, MtreeError
from qmp_memlistener.memslots import ADDRESS_SPACES, plan_all
from qmp_memlistener.topology import FlatView, MemoryMap, parse, read_map, read_maps

SAMPLES = sorted((Path(__file__).parents[1] / "conformance" / "mtree").rglob("*.json.gz"))
LONGEST = 12_000  # characters; the same grammar as the longer ones, and many more tries
ROUNDS = 2000
HEX = "0123456789abcdef"
PIECES = [
    " ", "\r", "\n", "\0", "  ", "-", "@", ":", "[disabled]", " [disabled]", "owner:{", "}",
    "alias ", " orphan", " KVM", "(prio ", "99999999999999999999", "ffffffffffffffff",
    "0000000000000000", "nv-", "ram", "i/o", "container", "FlatView #0", "address-space: memory",
    "memory-region: ", "[DETECTED OVERFLOW!] ", "é", "\u0661", "\ud7ff", "\x1b", "\u2028", "\x85",
]  # fmt: skip


@functools.cache
def texts() -> list[str]:
    """Short recorded texts of every form, version and machine."""
    rng = random.Random(20)
    found: dict[tuple[str, str, str], str] = {}
    for path in rng.sample(SAMPLES, len(SAMPLES)):
        machine = path.name.partition("-")[0]
        if all((path.parent.name, machine, form) in found for form in ("", " -f -o", " -o -D")):
            continue
        with gzip.open(path) as file:
            outputs: dict[str, str] = json.load(file)["outputs"]
        for command, text in outputs.items():
            form = command.removeprefix("info mtree")
            if form != command and len(text) <= LONGEST:
                found.setdefault((path.parent.name, machine, form), text)
    assert len(found) > 40
    return list(found.values())


def mutated(rng: random.Random, text: str) -> str:
    """The text with one to four accidents."""
    for _ in range(rng.randint(1, 4)):
        lines = text.split("\n")
        at = rng.randrange(len(text) + 1)
        line = rng.randrange(len(lines))
        match rng.randrange(11):
            case 0:
                text = text[:at]
            case 1:
                other = rng.randrange(len(lines))
                lines[line], lines[other] = lines[other], lines[line]
                text = "\n".join(lines)
            case 2:
                digits = [i for i, c in enumerate(text) if c in HEX]
                for i in rng.sample(digits, min(len(digits), rng.randint(1, 8))):
                    text = text[:i] + rng.choice(HEX) + text[i + 1 :]
            case 3:
                text = text[:at] + rng.choice(PIECES) + text[at:]
            case 4:
                del lines[line]
                text = "\n".join(lines)
            case 5:
                lines[line:line] = lines[line : line + rng.randint(1, 12)]
                text = "\n".join(lines)
            case 6:
                lines[line] = "  " * rng.randrange(4) + lines[line].lstrip(" ")
                text = "\n".join(lines)
            case 7:
                lines[line] = "  " * rng.randrange(60) + lines[line]
                text = "\n".join(lines)
            case 8:
                # a name becomes another one's: aliases find wrong targets, or themselves
                names = sorted({part for part in text.split() if part.isidentifier()})
                text = text.replace(rng.choice(names), rng.choice(names)) if names else text
            case 9:
                text = text[:at] + text[at + rng.randint(1, 60) :]
            case _:
                other_text = rng.choice(texts())
                cut = rng.randrange(len(other_text))
                text = text[:at] + other_text[cut : cut + rng.randint(1, 2000)]
    return text


def check(maps: dict[str, MemoryMap]) -> None:
    """What was read makes sense, whatever it was read from."""
    for m in maps.values():
        for a, b in pairwise(m.view):
            assert a.end <= b.start
        for r in m.view:
            assert 0 <= r.start < r.end <= 1 << 64
        for block in m.ram_blocks:
            assert block.mapped
            for hole in block.holes:
                assert hole.size > 0
                assert any(x.start <= hole.start and hole.end <= x.end for x in block.mapped)


def read(text: str) -> dict[str, MemoryMap]:
    """All address spaces, or nothing when the text is refused."""
    try:
        dump = parse(text)
        maps = read_maps(text, [*dump.flat_views] if dump.is_flat else [*dump.address_spaces])
    except MtreeError as exc:
        refused = exc
    else:
        check(maps)
        return maps
    assert 1 <= refused.line_no <= text.count("\n") + 1
    assert refused.remedy
    return {}


@pytest.mark.timeout(60)
def test_recorded_texts_with_accidents() -> None:
    rng = random.Random(7)
    accepted = 0
    for n in range(ROUNDS):
        text = mutated(rng, texts()[n % len(texts())])
        try:
            accepted += bool(read(text))
        except Exception as exc:
            exc.add_note(f"round {n}, text:\n{text[:20_000]}")
            raise
    assert 0 < accepted < ROUNDS, "both happen"


@pytest.mark.timeout(60)
def test_what_is_read_can_be_planned() -> None:
    """Two damaged maps are still two maps: their transition has a plan under every strategy, unless
    a slot would be too large for KVM."""
    rng = random.Random(8)
    spaces = list(ADDRESS_SPACES)
    planned = 0
    for n in range(200):
        base = texts()[n % len(texts())]
        pair: list[dict[int, FlatView]] = []
        for text in (base, mutated(rng, base)):
            try:
                maps = read_maps(text, spaces)
            except MtreeError:
                break
            pair.append({ADDRESS_SPACES[name]: m.view for name, m in maps.items()})
        if len(pair) == 2:
            try:
                plans = plan_all(*pair)
            except InputError as exc:
                assert "pages: KVM refuses such a slot" in exc.message  # noqa: PT017
                continue
            for plan in plans:
                assert plan.after.mapped(0) is not None
            planned += 1
    assert planned > 50


@given(st.text(max_size=300))
@settings(max_examples=150)
def test_any_text(text: str) -> None:
    read(text)


@given(st.text(alphabet="0123456789abcdef -():@[]{}\r\nrampioFV#", max_size=200))
@settings(max_examples=100)
@example("FlatView #0\n")
@example("address-space: \n")
@example("memory-region: x\n")
@example("[")
def test_text_of_the_grammars_own_letters(text: str) -> None:
    read(
        "address-space: memory\n  0000000000000000-ffffffffffffffff (prio 0, i/o): system\n" + text
    )
    read("FlatView #0\n" + text)


# -- texts that were made to explode -------------------------------------------------------

WHOLE = f"{0:016x}-{(1 << 48) - 1:016x}"
SYSTEM = "  0000000000000000-ffffffffffffffff (prio 0, i/o): system"


def section(name: str, span: str, *children: str) -> list[str]:
    return [f"memory-region: {name}", f"  {span} (prio 0, i/o): {name}", *children, ""]


def space(*children: str) -> list[str]:
    return ["address-space: memory", SYSTEM, *children, ""]


def alias_in_front_of_alias(levels: int = 28, width: int = 2) -> str:
    """Every level shows the next one `width` times at one place: width ** levels paths."""

    def shows(level: int) -> list[str]:
        return [f"    {WHOLE} (prio {w}, i/o): alias a{w} @l{level} {WHOLE}" for w in range(width)]

    lines = space(*shows(0))
    for level in range(levels):
        ram = [f"    {0:016x}-{0xFFF:016x} (prio 0, ram): x"]
        lines += section(f"l{level}", WHOLE, *(shows(level + 1) if level + 1 < levels else ram))
    return "\n".join(lines) + "\n"


def alias_beside_alias(levels: int = 28) -> str:
    """Every level shows the next one twice, side by side: 2 ** levels ranges in two KiB of text."""

    def shows(level: int, size: int) -> list[str]:
        half = size // 2
        return [
            f"    {k * half:016x}-{k * half + half - 1:016x} (prio 0, i/o): "
            f"alias a{k} @l{level} {0:016x}-{half - 1:016x}"
            for k in (0, 1)
        ]

    size = 1 << (levels + 12)
    lines = space(*shows(0, size))
    for level in range(levels):
        size //= 2
        ram = [f"    {0:016x}-{0x7FF:016x} (prio 0, ram): x"]
        children = shows(level + 1, size) if level + 1 < levels else ram
        lines += section(f"l{level}", f"{0:016x}-{size - 1:016x}", *children)
    return "\n".join(lines) + "\n"


def fan(n: int = 1500) -> str:
    """n aliases to one section of n regions: n * n pieces from 2 * n lines."""
    lines = space(*(f"    {WHOLE} (prio {i}, i/o): alias a{i} @l {WHOLE}" for i in range(n)))
    ram = (f"    {i << 12:016x}-{(i << 12) + 0xFFF:016x} (prio 0, ram): r{i}" for i in range(n))
    return "\n".join([*lines, *section("l", WHOLE, *ram)]) + "\n"


def many_loops() -> str:
    """Sections that show themselves and each other, twice each."""
    lines = space(f"    {WHOLE} (prio 0, i/o): alias a @l0 {WHOLE}")
    for level in range(20):
        shows = [
            f"    {WHOLE} (prio {k}, i/o): alias a{k} @l{other} {0x1000:016x}-{0xFFFFFFF:016x}"
            for k, other in enumerate((level, (level + 1) % 20))
        ]
        lines += section(f"l{level}", WHOLE, *shows)
    return "\n".join(lines) + "\n"


def sections_of_one_name(n: int = 1000) -> str:
    """n aliases to n sections that are all called the same."""
    page = f"{0:016x}-{0xFFF:016x}"
    lines = space(
        *(
            f"    {i << 12:016x}-{(i << 12) + 0xFFF:016x} (prio 0, i/o): alias a{i} @bus {page}"
            for i in range(n)
        )
    )
    for i in range(n):
        lines += section("bus", page, f"    {page} (prio 0, ram): r{i}")
    return "\n".join(lines) + "\n"


def line_of(rest: str) -> Callable[[], str]:
    def text() -> str:
        return "\n".join(space(f"    {0:016x}-{0xFFF:016x} (prio 0, ram): {rest}")) + "\n"

    return text


def flat_line_of(rest: str) -> Callable[[], str]:
    def text() -> str:
        head = 'FlatView #0\n AS "memory", root: system\n Root memory region: system\n'
        return f"{head}  {0:016x}-{0xFFF:016x} (prio 0, ram): {rest}\n"

    return text


def deep(levels: int = 400) -> str:
    """Regions in regions."""
    inner = (f"{'  ' * (i + 2)}{WHOLE} (prio 0, i/o): r{i}" for i in range(levels))
    return "\n".join(space(*inner)) + "\n"


ZERO = "0" * 16
LONG = 20_000
BOMBS: dict[str, Callable[[], str]] = {
    "alias-in-front-of-alias": alias_in_front_of_alias,
    "alias-beside-alias": alias_beside_alias,
    "fan": fan,
    "many-loops": many_loops,
    "sections-of-one-name": sections_of_one_name,
    "deep": deep,
    "orphans": line_of("a" + " orphan" * LONG + "!"),
    "owners": line_of("a" + " owner:{" * LONG),
    "at-signs": line_of("alias a" + " @b" * LONG + "!"),
    "windows": line_of("alias a" + f" @b {ZERO}-{ZERO}" * (LONG // 10) + " orphan" * LONG + "!"),
    "disabled": line_of("a" + " [disabled]" * LONG + "!"),
    "long-name": line_of("a" * 1_000_000),
    "flat-orphans": flat_line_of("a" + " orphan" * LONG + " @!"),
    "flat-slots": flat_line_of("a" + " KVM" * LONG + "!"),
    "flat-offsets": flat_line_of("a" + f" @{ZERO}" * LONG + "!"),
    "huge-priority": lambda: line_of("a")().replace("prio 0, ram", "prio " + "9" * 5000 + ", ram"),
    "huge-negative-priority": lambda: line_of("a")().replace(
        "prio 0, ram", "prio -" + "9" * 100_000 + ", ram"
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_read_or_refused_soon(name: str) -> None:
    """The timeout is there for what would never end; nothing here needs a fraction of it."""
    text = BOMBS[name]()
    refused: InputError | None = None
    try:
        check({"memory": read_map(text)})
    except InputError as exc:
        refused = exc
    assert refused is None or len(refused.message) < 500


def test_small_bombs_are_read_as_they_are() -> None:
    """The same shapes in sizes that a machine could have."""
    m = read_map(alias_beside_alias(levels=6))
    assert [r.start for r in m.view] == [i << 12 for i in range(64)]
    m = read_map(alias_in_front_of_alias(levels=6))
    assert [(r.start, r.size) for r in m.view] == [(0, 0x1000)]
    assert len(read_map(fan(20)).view) == 20
