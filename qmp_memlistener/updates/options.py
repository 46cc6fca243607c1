"""What is to be added, and by how much memory changes, as users write it.  Pure.

    virtio-net-pci,id=net1,netdev=n1,mac=52:54:00:12:34:56
    {"driver":"virtio-net-pci","id":"net1","netdev":"n1"}

The first is QEMU's own option syntax, the second the arguments of the QMP command.  An option is
text: which of them are numbers or booleans is not visible here, see `property_types`.

The grammar follows QEMU's util/keyval.c and util/qemu-option.c (read in 7.2 and 10.0), and is
stricter than they are where they guess, so that nothing can be read as something else: a key is
given once (QEMU: the last one counts), and a flag without `=` is refused (util/keyval.c refuses
it; util/qemu-option.c reads `share` as `share=on` and `noshare` as `share=off`, with a warning
since 6.0; more often it is the rest of a value whose comma was not doubled).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import NoReturn

from ..errors import InputError
from ..text import quoted
from .model import Addition, Resize, Role, Value

__all__ = ["parse_addition", "parse_resize", "shown"]

_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.,_+-]*")
_NAME = re.compile(r"(?:__[A-Za-z0-9.-]*_)?[A-Za-z][A-Za-z0-9_-]*")
_INDEX = re.compile(r"[0-9]+")
_FLAT_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\[\]-]*")
_RESIZE = re.compile(r"([+=-])([0-9]+(?:\.[0-9]+)?)(?:([KMGT])(?:iB)?)?", re.IGNORECASE | re.ASCII)

_UNSPEAKABLE = re.compile(
    "[\0\ud800-\udfff\ufdd0-\ufdef{}]".format(
        "".join(chr(plane << 16 | end) for plane in range(17) for end in (0xFFFE, 0xFFFF))
    )
)

_MAX_NAME = 127
"""Of a key's part as in util/keyval.c.  Of ids too: QEMU has no limit of its own, but a memory
backend's id becomes the name of a RAM block, which is cut at 255 bytes, and QEMU aborts when two
then are the same (idstr in include/exec/ramblock.h; qemu_ram_set_idstr of system/physmem.c)."""
_MAX_NODE_NAME = 31
"""`node_name` in include/block/block_int-common.h."""
_MAX_TEXT = 1 << 20
_MAX_DEPTH = 64
_MAX_SHOWN = 60
_SHIFTS = {"K": 10, "M": 20, "G": 30, "T": 40}
_MIN_RESIZE = 1 << 20
_MAX_RESIZE = 1 << 63


def parse_addition(role: Role, text: str) -> Addition:
    """What `text` describes, in option syntax or, when it begins with a brace, in JSON.

    In option syntax the type may stand first without its key, and a comma inside a value is
    written twice.  The keys of devices are flat; in those of objects, netdevs and blockdevs dots
    make nested objects, and numbers lists: `file.filename=x`, `host-nodes.0=1`.  Values are text,
    and keep every character; those that QMP cannot carry (NUL, surrogates, and what Unicode calls
    noncharacters: qobject/json-parser.c, util/unicode.c) are refused.

    Raises InputError, also for an id that QEMU would not accept (id_wellformed in util/id.c).
    """
    if len(text) > _MAX_TEXT:
        raise InputError(
            f"{role} {shown(text)} is {len(text)} characters long",
            remedy=f"at most {_MAX_TEXT} are accepted",
        )
    typed = text.lstrip().startswith("{")
    values = _from_json(role, text) if typed else _from_options(role, text)
    kind = values.get(role.type_key)
    if kind is None:
        raise InputError(
            f"{role} {shown(text)} does not name its type",
            remedy=f"add its {role.type_key}"
            if typed
            else f"begin with its type, or add {role.type_key}=…",
        )
    if not isinstance(kind, str) or not _TYPE.fullmatch(kind) or len(kind) > _MAX_NAME:
        raise InputError(
            f"{role} {shown(text)}: {shown(kind)} is not the name of a type",
            remedy=f"`qemu-system-x86_64 -{role} help` lists them",
        )
    name = values.get(role.id_key)
    if name is None:
        raise InputError(
            f"{role} {shown(kind)} has no {role.id_key}",
            remedy=f'add "{role.id_key}": "NAME"' if typed else f"add {role.id_key}=NAME",
        )
    return Addition(role, _checked_id(role, name), values, typed)


def parse_resize(text: str) -> Resize:
    """`+256M`, `-512M` or `=4G`: more memory, less, or that much in all.

    Suffixes are K, M, G and T, binary, in either case, `GiB` too.  A number without one counts
    bytes, as in QMP (virsh would take KiB, `-m` MiB).  A fraction must come out at whole bytes.
    No machine can change by less than a MiB (the smallest block of virtio-mem, hw/virtio/
    virtio-mem.c; DIMMs are coarser), so that `+256` is refused: it is a forgotten suffix.

    Raises InputError.
    """
    found = _RESIZE.fullmatch(text)
    if found is None:
        raise InputError(
            f"{shown(text)} is not a change of memory",
            remedy="write +256M for more, -256M for less, =4G for that much in all",
        )
    sign, number, suffix = found.groups()
    if len(number) > 40:
        raise InputError(f"{shown(text)} is too long", remedy="such as +256M")
    size = Fraction(number) * (1 << _SHIFTS[suffix.upper()] if suffix else 1)
    if size.denominator != 1:
        raise InputError(
            f"{shown(text)} is not a whole number of bytes", remedy="use a smaller suffix"
        )
    if size == 0:
        raise InputError(f"{shown(text)} changes nothing, or all", remedy="such as +256M or =4G")
    if size < _MIN_RESIZE:
        hint = "" if suffix else f", or did you mean {sign}{number}M?"
        raise InputError(
            f"{shown(text)} is {size} bytes, and no guest can be changed by less than a MiB",
            remedy=f"name a multiple of 1M{hint}",
        )
    if size >= _MAX_RESIZE:
        raise InputError(f"{shown(text)} is more than any guest can have", remedy="such as =4G")
    return Resize(sign, int(size))


def shown(value: object) -> str:
    """A value as it appears in messages: quoted, on one line, and not long."""
    return quoted(value, _MAX_SHOWN, only_ascii=True)


def _checked_id(role: Role, name: Value) -> str:
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise InputError(
            f"{role.id_key} {shown(name)} is not one that QEMU accepts",
            remedy="begin with a letter; letters, digits and - . _ may follow",
        )
    limit = _MAX_NODE_NAME if role is Role.BLOCKDEV else _MAX_NAME
    if len(name) > limit:
        raise InputError(
            f"{role.id_key} {shown(name)} is {len(name)} characters long",
            remedy=f"use at most {limit}",
        )
    return name


# -- option syntax -------------------------------------------------------------------------------


def _from_options(role: Role, text: str) -> dict[str, Value]:
    flat: dict[str, str] = {}
    for number, part in enumerate(_parts(text)):
        key, equals, value = part.partition("=")
        if not equals:
            if number:
                _refuse_flag(role, text, part)
            if not part:
                raise InputError(f"{role} {shown(text)} is empty", remedy="write TYPE,KEY=VALUE,…")
            key, value = role.type_key, part
        if key in flat:
            raise InputError(
                f"{role} {shown(text)} has {shown(key)} twice",
                remedy="give it once"
                if role is Role.DEVICE
                else f"give it once; a list is written {key}.0=…,{key}.1=…",
            )
        _check_text(value)
        flat[key] = value
    if role is not Role.DEVICE:
        return _nested(role, text, flat)
    for key in flat:
        if not _FLAT_KEY.fullmatch(key) or len(key) > _MAX_NAME:
            _refuse_key(role, text, key)
    return dict(flat)


def _refuse_flag(role: Role, text: str, part: str) -> NoReturn:
    raise InputError(
        f"{role} {shown(text)}: {shown(part)} is not KEY=VALUE",
        remedy="write KEY=on for a flag, and a comma inside a value twice",
    )


def _refuse_key(role: Role, text: str, key: str) -> NoReturn:
    raise InputError(
        f"{role} {shown(text)}: {shown(key)} is not the name of an option",
        remedy="write a comma inside a value twice",
    )


def _parts(text: str) -> Iterator[str]:
    """The text between single commas, double ones made single; one comma may end the text."""
    part: list[str] = []
    for piece in re.split(r"(,,|,)", text):
        if piece == ",":
            yield "".join(part)
            part = []
        else:
            part.append("," if piece == ",," else piece)
    last = "".join(part)
    if last or not text.endswith(","):
        yield last


class _Node(dict[str, "str | _Node"]):
    """The children of an inner node of the tree that dotted keys make, before lists are lists."""


def _nested(role: Role, text: str, flat: Mapping[str, str]) -> dict[str, Value]:
    root = _Node()
    for key, value in flat.items():
        *path, last = _fragments(role, text, key)
        node = root
        for step in path:
            inner = node.setdefault(step, _Node())
            if isinstance(inner, str):
                _refuse_inconsistent(role, text, key)
            node = inner
        if last in node:
            _refuse_inconsistent(role, text, key)
        node[last] = value
    return {k: _listed(role, text, k, v) for k, v in root.items()}


def _fragments(role: Role, text: str, key: str) -> list[str]:
    """The parts of a dotted key: names, and, except for the first, indices without leading 0."""
    found: list[str] = []
    at = 0
    while True:
        index = _INDEX.match(key, at) if found else None
        match = index or _NAME.match(key, at)
        if match is None or match.end() - at > _MAX_NAME or len(found) == _MAX_DEPTH:
            _refuse_key(role, text, key)
        found.append((match[0].lstrip("0") or "0") if index else match[0])
        at = match.end()
        if at == len(key):
            return found
        if key[at] != ".":
            _refuse_key(role, text, key)
        at += 1


def _refuse_inconsistent(role: Role, text: str, key: str) -> NoReturn:
    raise InputError(
        f"{role} {shown(text)}: {shown(key)} contradicts another option",
        remedy="an option is a value, or has named parts, or is a list",
    )


def _listed(role: Role, text: str, path: str, value: str | _Node) -> Value:
    if isinstance(value, str):
        return value
    inner = {k: _listed(role, text, f"{path}.{k}", v) for k, v in value.items()}
    indices = [k for k in inner if k.isdecimal()]
    if not indices:
        return inner
    if len(indices) < len(inner):
        _refuse_inconsistent(role, text, f"{path}.{indices[0]}")
    missing = next((i for i in range(len(inner)) if str(i) not in inner), None)
    if missing is not None:
        raise InputError(
            f"{role} {shown(text)}: {shown(f'{path}.{missing}')} is missing",
            remedy="number the members of a list from 0, without gaps",
        )
    return [inner[str(i)] for i in range(len(inner))]


# -- JSON ----------------------------------------------------------------------------------------


def _from_json(role: Role, text: str) -> dict[str, Value]:
    try:
        value: object = json.loads(
            text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{role} {shown(text)} is not JSON: {error}", remedy="check quotes and braces"
        ) from None
    checked = _checked(value, 0)
    if not isinstance(checked, dict):
        raise InputError(f"{role} {shown(text)} is not a JSON object", remedy="write {…}")
    return checked


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"{shown(key)} is there twice in one object", remedy="give it once")
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise InputError(f"{name} is not JSON", remedy="give a number")


def _checked(value: object, depth: int) -> Value:
    """The value, if QMP carries it unchanged."""
    if depth > _MAX_DEPTH:
        raise InputError(f"nested deeper than {_MAX_DEPTH} levels", remedy="make it flatter")
    if isinstance(value, dict):
        return {_check_text(str(k)): _checked(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list):
        return [_checked(v, depth + 1) for v in value]
    if isinstance(value, str):
        return _check_text(value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        # What does not fit becomes a double in QEMU (parse_literal of qobject/json-parser.c).
        if not -(1 << 63) <= value < 1 << 64:
            raise InputError(f"{shown(value)} does not fit into 64 bits", remedy="give less")
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise InputError(f"{shown(value)} cannot be expressed in QMP", remedy="give a JSON value")


def _check_text(text: str) -> str:
    """The text, if QMP carries it unchanged.

    QEMU's JSON parser turns a NUL into two bytes of its own.  What is no valid code point for it
    (util/unicode.c), it answers with an error that belongs to no command, which ends our session.
    """
    found = _UNSPEAKABLE.search(text)
    if found is not None:
        raise InputError(
            f"{shown(text)} has a character that QMP cannot carry, U+{ord(found[0]):04X}",
            remedy="leave it out",
        )
    return text
