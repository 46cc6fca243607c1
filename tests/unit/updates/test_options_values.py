"""Sizes, numbers and booleans in options, read as QEMU reads them; changes of memory."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qmp_memlistener.errors import InputError
from qmp_memlistener.updates.model import Resize, Value
from qmp_memlistener.updates.options import parse_resize
from qmp_memlistener.updates.property_types import text_to

M = 1 << 20
G = 1 << 30


@pytest.mark.parametrize(
    ("text", "sign", "size"),
    [
        ("+256M", "+", 256 * M),
        ("-512M", "-", 512 * M),
        ("=4G", "=", 4 * G),
        ("+1g", "+", G),
        ("+2048k", "+", 2 * M),
        ("=1T", "=", 1 << 40),
        ("+1.5G", "+", 1536 * M),
        ("+0.5GiB", "+", 512 * M),
        ("-256MiB", "-", 256 * M),
        ("+268435456", "+", 256 * M),
        ("+1048576.0", "+", M),
        ("+007M", "+", 7 * M),
        ("=8388607T", "=", 8388607 << 40),
    ],
)
def test_resize(text: str, sign: str, size: int) -> None:
    assert parse_resize(text) == Resize(sign, size)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a change"),
        ("256M", "not a change"),
        ("+", "not a change"),
        ("--512M", "not a change"),
        ("+-512M", "not a change"),
        ("=-4G", "not a change"),
        ("+4GB", "not a change"),
        ("+4iB", "not a change"),
        ("+4 G", "not a change"),
        (" +4G", "not a change"),
        ("+4G\n", "not a change"),
        ("+0x10M", "not a change"),
        ("+1e3M", "not a change"),
        ("+.5G", "not a change"),
        ("+1.G", "not a change"),
        ("+1,5G", "not a change"),
        ("+4\u212a", "not a change"),
        ("+\u0664G", "not a change"),
        ("+0", "changes nothing"),
        ("=0G", "changes nothing"),
        ("-0.0M", "changes nothing"),
        ("+256", "did you mean +256M?"),
        ("-512K", "less than a MiB"),
        ("+0.3G", "whole number of bytes"),
        ("+1048576.5", "whole number of bytes"),
        ("=8388608T", "more than any guest"),
        ("+9223372036854775808", "more than any guest"),
        ("+" + "9" * 10_000 + "G", "too long"),
    ],
)
def test_resize_refused(text: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        parse_resize(text)
    assert words in f"{error.value.message} | {error.value.remedy}"
    assert error.value.remedy
    assert error.value.message.isprintable()


@given(st.sampled_from("+-="), st.integers(1, 1 << 40), st.sampled_from((("M", 20), ("K", 10))))
def test_resize_comes_back(sign: str, count: int, suffix: tuple[str, int]) -> None:
    size = count << suffix[1]
    if size < M:
        return
    assert parse_resize(f"{sign}{count}{suffix[0]}") == Resize(sign, size)
    assert parse_resize(f"{sign}{size}") == Resize(sign, size)


@given(st.text("+-=0123456789.KMGTiB \u212a\u0664", max_size=12) | st.text(max_size=8))
def test_resize_reads_or_refuses(text: str) -> None:
    try:
        found = parse_resize(text)
    except InputError:
        return
    assert found.sign == text[0]
    assert M <= found.size < 1 << 63


@pytest.mark.parametrize(
    ("type_name", "text", "value"),
    [
        *(("bool", text, True) for text in ("on", "yes", "true", "y")),
        *(("bool", text, False) for text in ("off", "no", "false", "n")),
        ("uint32", "4", 4),
        ("uint32", "0x1f", 31),
        ("uint8", "010", 8),
        ("uint8", "0", 0),
        ("int32", "-1", -1),
        ("int32", "-010", -8),
        ("uint64", "-1", (1 << 64) - 1),
        ("usize", "18446744073709551615", (1 << 64) - 1),
        ("int64", "-9223372036854775808", -(1 << 63)),
        ("size", "256M", 256 * M),
        ("size", "256m", 256 * M),
        ("size", "1.5G", 1536 * M),
        ("size", ".5k", 512),
        ("size", "1.k", 1024),
        ("size", "1.0", 1),
        ("size", "010", 10),
        ("size", "0x10", 16),
        ("size", "0x1B", 27),
        ("size", "7B", 7),
        ("size", "0.1G", 107374182),
        ("size", "0.00048828125k", 1),
        ("size", "15E", 15 << 60),
        ("size", "0", 0),
        ("int", "128K", 128 << 10),
        ("int", "-5", -5),
        ("uint", "0x10", 16),
        ("number", "2.5", 2.5),
        ("double", "-1e3", -1000.0),
        ("str", "0x10", "0x10"),
        ("OnOffAuto", "on", "on"),
        ("PCIELinkWidth", "16", "16"),
        ("link<memory-backend>", "m0", "m0"),
        ("", "5", "5"),
    ],
)
def test_texts_as_qemu_reads_them(type_name: str, text: str, value: Value) -> None:
    found = text_to(type_name, text, "key")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("type_name", "text"),
    [
        *(("bool", text) for text in ("", "1", "On", "TRUE", "auto", "on ")),
        *(("uint32", text) for text in ("", "4294967296", "-1", "1M", "08", "0x", "+1", "1.0")),
        *(("uint8", text) for text in ("256", "1_0", "\u0664", "1" * 5000)),
        *(("int8", text) for text in ("128", "-129")),
        ("uint64", "-18446744073709551616"),
        ("int64", "9223372036854775808"),
        *(("size", text) for text in ("", "M", ".", ".M", "-1M", "1.5", "1.5B", "0x1M", "1MB")),
        *(("size", text) for text in ("16E", "1e3", "18446744073709551616", "1 M", "1" * 5000)),
        *(("size", text) for text in ("1\u212a", "1..5M")),
        *(("int", text) for text in ("", "x", "010", "-1M")),
        *(("number", text) for text in ("", "nan", "inf", "1e999", "0x1p3", "1,5")),
        ("list", "a"),
        ("IOThreadVirtQueueMappingList", "iot0"),
    ],
)
def test_texts_that_are_none(type_name: str, text: str) -> None:
    with pytest.raises(InputError) as error:
        text_to(type_name, text, "key")
    assert error.value.message.startswith("key=")
    assert error.value.message.isprintable()
    assert error.value.remedy
    assert len(error.value.message) < 200


@given(st.integers(0, (1 << 64) - 1), st.sampled_from("BKMGTPE"))
@example((1 << 64) - 1, "E")
def test_sizes_are_exact(count: int, suffix: str) -> None:
    size = count << 10 * "BKMGTPE".index(suffix)
    if size < 1 << 64:
        assert text_to("size", f"{count}{suffix}", "key") == size
        assert text_to("size", hex(size), "key") == size
    else:
        with pytest.raises(InputError):
            text_to("size", f"{count}{suffix}", "key")


@given(st.integers(-(1 << 63), (1 << 63) - 1))
def test_integers_in_every_base(value: int) -> None:
    sign = "-" if value < 0 else ""
    for text in (str(value), hex(value), f"{sign}0{abs(value):o}"):
        assert text_to("int64", text, "key") == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_come_back(value: float) -> None:
    found = text_to("number", repr(value), "key")
    assert isinstance(found, float)
    assert math.copysign(1, found) == math.copysign(1, value)
    assert found == value


@given(st.sampled_from(("bool", "uint32", "int64", "size", "int", "number")), st.text(max_size=12))
def test_any_text_is_read_or_refused(type_name: str, text: str) -> None:
    try:
        found = text_to(type_name, text, "key")
    except InputError:
        return
    assert not isinstance(found, str)
