"""Names, descriptions, logs and recordings of others, printed: nothing in them acts on a terminal.

Whatever a guest, QEMU, a file or another user says may hold terminal escapes (C0 and C1), line
ends that forge a line of ours, bidirectional controls that show one thing for another, or no text.
"""

from __future__ import annotations

import ast
import json
import types
import typing
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qmp_memlistener.cli
from qmp_memlistener.cli.common import print_error, print_json, print_table, printable, say
from qmp_memlistener.errors import OperationFailed
from qmp_memlistener.records import Header, Record, RecordingWriter
from qmp_memlistener.records.recording import RECORD_TYPES
from qmp_memlistener.records.records import OpenEnum
from qmp_memlistener.reports.terminal import Narrator
from tests.support.records import HEADER
from tests.unit.cli.cli_support import run

CLI = Path(qmp_memlistener.cli.__file__).parent

EVIL = (
    "\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "\r\n", "\n", "\x08\x08", "\x7f", "\0", "\u202e",
    "\u2066", "\u200b", "\u2028", "\ufeff", "\U000e0041", "\udcff", "[red]", "\t",
)  # fmt: skip
hostile = st.one_of(
    st.sampled_from(EVIL),
    st.lists(st.sampled_from((*EVIL, "pc.ram", "é", " ")), max_size=4).map("".join),
    st.text(max_size=8),
)
encodable = hostile.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))


def assert_harmless(out: str) -> None:
    bad = {c for c in out if not c.isprintable() and c != "\n"}
    assert not bad, f"{bad!r} in {out!r}"


# -- the four ways to print ------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=hostile)
def test_lines_errors_and_tables(capsys: pytest.CaptureFixture[str], text: str) -> None:
    capsys.readouterr()
    say(text, f"x{text}y")
    out = capsys.readouterr().out
    assert_harmless(out)
    assert out.count("\n") == 2
    say(text, err=True)
    print_error(OperationFailed(text, remedy=text or "none"))
    err = capsys.readouterr().err
    assert_harmless(err)
    assert err.count("\n") == 3
    print_table(("range", "name"), [(text, text)])
    assert_harmless(capsys.readouterr().out)


@given(text=hostile)
def test_what_is_printed_tells_texts_apart(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text
    elif "\\" not in text:
        assert shown.encode("ascii", "backslashreplace").decode("unicode_escape") == text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=encodable)
def test_json_says_the_same_in_harmless_characters(
    capfdbinary: pytest.CaptureFixture[bytes], text: str
) -> None:
    capfdbinary.readouterr()
    print_json({text: [text]})
    out = capfdbinary.readouterr().out.decode()
    assert_harmless(out)
    assert out.count("\n") == 1
    assert json.loads(out) == {text: [text]}


PRINTERS = [
    Path("cli/common.py"),
    Path("kvmlab/__main__.py"),  # for a guest without most of Python; it prints JSON
    Path("steer/injector.py"),  # a process of ours, which reads its JSON
]


def test_nothing_else_prints() -> None:
    """Only `common` writes to a stream, so that there is one place where text becomes harmless."""
    offenders = []
    for path in sorted(CLI.parent.rglob("*.py")):
        if path.relative_to(CLI.parent) in PRINTERS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(CLI.parent)}:{getattr(node, 'lineno', 0)}"
            match node:
                case ast.Call(func=ast.Name("print")):
                    offenders.append(f"{where} print")
                case ast.Attribute(ast.Name("click"), "echo" | "secho" | "echo_via_pager" as name):
                    offenders.append(f"{where} click.{name}")
                case ast.Call(func=ast.Attribute(_, "write" | "writelines" as name)) if (
                    "sys.std" in ast.unparse(node.func)
                ):
                    offenders.append(f"{where} {name}")
    assert offenders == []


# -- verbs on files --------------------------------------------------------------------------------


def value_of(kind: object, depth: int = 0) -> st.SearchStrategy[Any]:
    """Any value of a field's type, its text hostile."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(value_of(a, depth) for a in arguments))
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(value_of(arguments[0], depth + 1), max_size=0 if depth > 3 else 2)
    if origin is tuple:
        return st.tuples(*(value_of(a, depth + 1) for a in arguments if a is not Ellipsis))
    if origin is dict:
        keys, values = (value_of(a, depth + 1) for a in arguments)
        return st.dictionaries(keys, values, max_size=0 if depth > 3 else 2)
    if kind is str or kind is typing.Any:
        return encodable
    if kind is type(None):
        return st.none()
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(0, 1 << 40)
    if kind is float:
        return st.floats(0, 1e6)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return struct_of(kind, depth + 1)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        members: st.SearchStrategy[Any] = st.sampled_from(list(kind))
        return members | encodable.map(kind) if issubclass(kind, OpenEnum) else members
    raise AssertionError(f"a field of type {kind!r}")


def later(kind: object, depth: int) -> st.SearchStrategy[Any]:
    return st.deferred(lambda: value_of(kind, depth))


def struct_of(kind: type[msgspec.Struct], depth: int = 0) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind)
    fields = {
        f.name: st.none() if depth > 4 and type(None) in typing.get_args(hints[f.name])
        else later(hints[f.name], depth)
        for f in msgspec.structs.fields(kind)
    }  # fmt: skip
    return st.builds(kind, **fields)


RECORDS = sorted((t for t in RECORD_TYPES.values() if t is not Header), key=lambda t: t.__name__)


@pytest.mark.parametrize("kind", RECORDS, ids=lambda t: t.__name__)
@settings(max_examples=15)
@given(data=st.data())
def test_every_record_in_words(kind: type[Record], data: st.DataObject) -> None:
    record = data.draw(struct_of(kind))
    narrator = Narrator(width=80)
    for line in (*narrator.lines(HEADER), *narrator.lines(record)):
        assert_harmless(printable(line))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_report_of_a_hostile_recording(
    capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("hostile") / "r.jsonl"
    kinds = data.draw(st.lists(st.sampled_from(RECORDS), max_size=4))
    header = msgspec.structs.replace(data.draw(struct_of(Header)), schema=1)
    with RecordingWriter(str(path), header) as writer:
        for kind in kinds:
            writer.write(data.draw(struct_of(kind)))
    for options in ((), ("--json",)):
        for verb in ("report", "plan"):
            ran = run(capsys, verb, path, *options)
            assert_harmless(ran.out)
            assert_harmless(ran.err)
            assert ran.code in (0, 1, 2), ran.err


TREE = """\
address-space: memory
  0000000000000000-ffffffffffffffff (prio 0, i/o): system
    0000000000000000-0000000003ffffff (prio 0, ram): {name}
    00000000000a0000-00000000000bffff (prio 1, i/o): {name}-io
"""


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=encodable)
def test_show_of_a_hostile_map(
    capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    path = (
        tmp_path_factory.mktemp("hostile") / f"map{'' if '/' in name or chr(0) in name else name}"
    )
    try:
        path.write_text(TREE.format(name=name), newline="")
    except OSError:
        return
    for options in ((), ("--json",)):
        ran = run(capsys, "show", "--from", path, *options)
        assert_harmless(ran.out)
        assert_harmless(ran.err)
