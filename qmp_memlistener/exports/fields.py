"""The fields of each record type as tables show them, and decoders that keep what is absent absent.

A recording of a former version lacks keys, for which the types in `records` have defaults (0 slot
operations, 1 merged change).  An export must not show a number that nobody recorded, so lines are
decoded into types of the same fields whose default is UNSET.  Lists and objects stay the JSON
that they are in the file.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Any, TypeAlias

import msgspec

from ..records import RECORD_TYPES

__all__ = ["DECODERS", "FIELDS", "CauseColumns", "Field", "FieldKind", "Recorded", "cause_of"]

Recorded: TypeAlias = Any
"""A record as its line has it: the fields are attributes, of types made at run time."""

_ADDRESSES = frozenset({"gpa", "hva", "ip", "size", "flags"})
"""Any 64 bits; what else is an integer is a count, or a time, and fits 63."""


class FieldKind(StrEnum):
    """What values a field has, where it is not absent."""

    INTEGER = "integer"
    ADDRESS = "address"
    BOOLEAN = "boolean"
    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Field:
    """One key of a record type."""

    name: str
    kind: FieldKind
    required: bool = False
    """Each record has it, and it is not null."""


class CauseColumns(msgspec.Struct, frozen=True, gc=False):
    """Of the cause of a transition or a stall, what has columns of its own."""

    type: str | None = None
    device: str | None = None
    ref: int | str | None = None


_CAUSE = msgspec.json.Decoder(CauseColumns | None)


def cause_of(raw: msgspec.Raw | msgspec.UnsetType) -> CauseColumns | None:
    """The cause in a record; raises msgspec.DecodeError."""
    return None if raw is msgspec.UNSET else _CAUSE.decode(raw)


_ONE_TYPE: dict[type, FieldKind] = {bool: FieldKind.BOOLEAN, str: FieldKind.TEXT}
_DECODED: dict[FieldKind, type] = {
    FieldKind.INTEGER: int,
    FieldKind.ADDRESS: int,
    FieldKind.BOOLEAN: bool,
    FieldKind.TEXT: str,
}


def _kind(name: str, annotation: object) -> tuple[FieldKind, bool]:
    """The kind of a field, and whether null is one of its values."""
    parts = [annotation]
    if isinstance(annotation, types.UnionType):
        parts = [p for p in annotation.__args__ if p is not types.NoneType]
    null = parts != [annotation] and types.NoneType in getattr(annotation, "__args__", ())
    only = parts[0] if len(parts) == 1 else None
    if only is int:
        return FieldKind.ADDRESS if name in _ADDRESSES else FieldKind.INTEGER, null
    if isinstance(only, type) and issubclass(only, Enum):
        return FieldKind.TEXT, null  # a word of a later version, too
    return (_ONE_TYPE.get(only, FieldKind.JSON) if isinstance(only, type) else FieldKind.JSON), null


def _decoder(tag: str, cls: type[msgspec.Struct]) -> msgspec.json.Decoder[Any]:
    """Refuses what the record type refuses, but for what is inside lists and objects."""
    decoded: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    for field in msgspec.structs.fields(cls):
        kind, null = _kind(field.encode_name, field.type)
        value: Any = _DECODED.get(kind, msgspec.Raw)
        if null and kind is not FieldKind.JSON:
            value = value | None
        if field.required:
            decoded.append((field.encode_name, value))
        else:
            decoded.append((field.encode_name, value | msgspec.UnsetType, msgspec.UNSET))
    return msgspec.json.Decoder(msgspec.defstruct(tag, decoded, kw_only=True, gc=False))


def _fields(cls: type[msgspec.Struct]) -> Iterator[Field]:
    for field in msgspec.structs.fields(cls):
        kind, null = _kind(field.encode_name, field.type)
        yield Field(field.encode_name, kind, field.required and not null)


FIELDS: dict[str, tuple[Field, ...]] = {
    tag: tuple(_fields(cls)) for tag, cls in RECORD_TYPES.items()
}
"""By record type, in the order of `records`."""

DECODERS: dict[str, msgspec.json.Decoder[Any]] = {
    tag: _decoder(tag, cls) for tag, cls in RECORD_TYPES.items()
}
"""For `Recording.read_as`: objects with the fields as attributes, UNSET where the file has none.
The name of their class is the record type."""
