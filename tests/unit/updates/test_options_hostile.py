"""Whatever is in an option, it is one argument: kept as it is, or refused."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from qmp_memlistener.errors import InputError
from qmp_memlistener.updates.model import Addition, Role, Value
from qmp_memlistener.updates.options import parse_addition

IDS = st.from_regex(r"[A-Za-z][A-Za-z0-9._-]{0,30}", fullmatch=True)
NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,8}", fullmatch=True)
NONCHARACTERS = frozenset(
    {
        *map(chr, range(0xFDD0, 0xFDF0)),
        *(chr(n << 16 | e) for n in range(17) for e in (65534, 65535)),
    }
)
TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters={"\0", *NONCHARACTERS}),
    max_size=40,
) | st.text("a,='\"{}\\\n é", max_size=20)
HOSTILE = st.text(
    st.sampled_from("a0,=.'\"{}[]\\\n\0 é🐑\ud800\udfff\ufffe/|;%$#") | st.characters(), max_size=30
)
SCALARS = (
    TEXTS
    | st.booleans()
    | st.none()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
TEXT_TREES = st.recursive(
    TEXTS,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.dictionaries(NAMES, inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


def parsed(role: Role, text: str) -> Addition | None:
    """None when it is refused, as it must be: on one line, with a remedy."""
    try:
        return parse_addition(role, text)
    except InputError as error:
        refusal = error
    assert refusal.message.isprintable()
    assert refusal.remedy
    return None


def written(key: str, value: Value) -> list[str]:
    """Option text for a value, each part KEY=VALUE."""
    if isinstance(value, dict):
        return [part for k, v in value.items() for part in written(f"{key}.{k}", v)]
    if isinstance(value, list):
        return [part for i, v in enumerate(value) for part in written(f"{key}.{i}", v)]
    return [f"{key}={str(value).replace(',', ',,')}"]


def option_text(kind: str, values: dict[str, Value]) -> str:
    return ",".join([kind, *(part for k, v in values.items() for part in written(k, v))])


@given(st.sampled_from(Role), IDS, st.dictionaries(NAMES, TEXTS, max_size=5))
def test_flat_options_come_back(role: Role, name: str, options: dict[str, str]) -> None:
    assume(not {role.type_key, role.id_key} & options.keys())
    values: dict[str, Value] = {**options, role.id_key: name}
    found = parse_addition(role, option_text("some-type", values))
    assert found.arguments == {role.type_key: "some-type", **values}
    assert (found.id, found.typed) == (name, False)


@given(
    st.sampled_from((Role.OBJECT, Role.NETDEV, Role.BLOCKDEV)),
    IDS,
    st.dictionaries(NAMES, TEXT_TREES, max_size=4),
)
def test_nested_options_come_back(role: Role, name: str, options: dict[str, Value]) -> None:
    assume(not {role.type_key, role.id_key} & options.keys())
    values: dict[str, Value] = {role.id_key: name, **options}
    found = parse_addition(role, option_text("some-type", values))
    assert found.arguments == {role.type_key: "some-type", **values}


@given(st.sampled_from(Role), IDS, st.dictionaries(TEXTS, TREES, max_size=5), st.booleans())
def test_json_comes_back(
    role: Role, name: str, options: dict[str, Value], ensure_ascii: bool
) -> None:
    values: dict[str, Value] = {**options, role.type_key: "t", role.id_key: name}
    found = parse_addition(role, json.dumps(values, ensure_ascii=ensure_ascii))
    assert found.arguments == values
    assert json.dumps(dict(found.arguments), sort_keys=True) == json.dumps(values, sort_keys=True)
    assert (found.id, found.typed) == (name, True)


@given(st.sampled_from(Role), HOSTILE, st.booleans())
@example(Role.DEVICE, "a,driver=isa-debug-exit", False)
@example(Role.OBJECT, 'a"}, {"execute": "quit"}', True)
@example(Role.DEVICE, "a\n", False)
@example(Role.NETDEV, "\u0131d", True)
def test_ids_are_checked(role: Role, name: str, as_json: bool) -> None:
    """A comma is doubled by whoever writes the text; what then is an id, is QEMU's."""
    if as_json:
        text = json.dumps({role.type_key: "t", role.id_key: name})
    else:
        text = option_text("t", {role.id_key: name})
    found = parsed(role, text)
    if found is None:
        assert not re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]{0,30}", name)
        return
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*\Z", name)
    assert found.arguments == {role.type_key: "t", role.id_key: name}


@given(st.sampled_from(Role), HOSTILE)
@example(Role.DEVICE, "x,id=b,share")
@example(Role.DEVICE, "\ud83d\udc11")
def test_values_are_kept_or_refused(role: Role, value: str) -> None:
    found = parsed(role, option_text("t", {role.id_key: "a", "v": value}))
    if found is None:
        assert any(c == "\0" or "\ud800" <= c <= "\udfff" or c in NONCHARACTERS for c in value)
        return
    assert found.arguments == {role.type_key: "t", role.id_key: "a", "v": value}


@given(st.sampled_from(Role), HOSTILE | TEXTS)
@example(Role.BLOCKDEV, "t,node-name=a," + "v." * 500)
@example(Role.OBJECT, "{" * 5000)
def test_whatever_is_written_is_read_or_refused(role: Role, text: str) -> None:
    found = parsed(role, text)
    assert found is None or found.arguments[role.id_key] == found.id


@pytest.mark.parametrize(("role", "most"), [(Role.BLOCKDEV, 31), (Role.DEVICE, 127)])
def test_long_ids(role: Role, most: int) -> None:
    assert parse_addition(role, f"t,{role.id_key}={'a' * most}").id == "a" * most
    for name in ("a" * (most + 1), "a" * 100_000):
        with pytest.raises(InputError) as error:
            parse_addition(role, f"t,{role.id_key}={name}")
        assert f"is {len(name)} characters long" in error.value.message
        assert len(error.value.message) < 150


def test_long_values() -> None:
    value = "é,'\"" * 100_000
    found = parse_addition(Role.DEVICE, option_text("t", {"id": "a", "v": value}))
    assert found.arguments["v"] == value
    with pytest.raises(InputError) as error:
        parse_addition(Role.DEVICE, f"t,id=a,v={'x' * (1 << 20)}")
    assert "characters long" in error.value.message
