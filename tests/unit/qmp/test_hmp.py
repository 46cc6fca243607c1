"""An argument of a human-monitor command stays one argument, whatever it holds."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qmp_memlistener.errors import InputError
from qmp_memlistener.qmp import Flag, hmp_line
from qmp_memlistener.qmp.hmp import _error_of


def split_as_qemu(line: str) -> list[tuple[str, bool]]:
    """Words of an HMP line as get_str() of monitor/hmp.c cuts them; True when it was quoted."""
    out: list[tuple[str, bool]] = []
    i = 0
    while True:
        while i < len(line) and line[i] in " \t\n\v\f\r":
            i += 1
        if i == len(line):
            return out
        word = ""
        if line[i] == '"':
            i += 1
            while line[i] != '"':
                if line[i] == "\\":
                    word += {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}[line[i + 1]]
                    i += 2
                else:
                    word += line[i]
                    i += 1
            i += 1
            out.append((word, True))
        else:
            while i < len(line) and line[i] not in " \t\n\v\f\r":
                word += line[i]
                i += 1
            out.append((word, False))


@given(st.lists(st.text(max_size=30), max_size=4))
@example(['a" b'])
@example(["a\n-f", "\\", '\\"', "-f", "", " "])
def test_arguments_arrive_unchanged_and_never_as_options(args: list[str]) -> None:
    try:
        line = hmp_line("device_del", *args)
    except InputError:
        assert any(
            ord(c) < 0x20 or c == "\x7f" or 0xD800 <= ord(c) < 0xE000 for a in args for c in a
        )
        return
    words = split_as_qemu(line)
    assert [w for w, _ in words] == ["device_del", *args]
    for word, quoted in words[1:]:
        assert quoted or not word.startswith("-")


def test_numbers_and_flags() -> None:
    assert hmp_line("info mtree", Flag("o"), Flag("D")) == "info mtree -o -D"
    assert hmp_line("gpa2hva", 0x1000) == "gpa2hva 0x1000"
    assert hmp_line("gpa2hva", (1 << 64) - 1) == "gpa2hva 0xffffffffffffffff"
    assert hmp_line("logfile", "/dev/shm/a-b/trace.log") == "logfile /dev/shm/a-b/trace.log"
    assert hmp_line("logfile", "-f") == 'logfile "-f"'


@pytest.mark.parametrize(
    ("command", "args"),
    [
        ("info mtree -f", ()),
        ("", ()),
        ("device_del x\n", ()),
        ("INFO", ()),
        ("device_del", ("a\0b",)),
        ("device_del", ("a\x1bb",)),
        ("device_del", ("x" * 1024,)),
        ("device_del", ("é" * 512,)),
        ("device_del", ("\ud800",)),
        ("gpa2hva", (-1,)),
        ("gpa2hva", (1 << 64,)),
        ("info mtree", (Flag("f -o"),)),
        ("info mtree", (Flag(""),)),
    ],
)
def test_what_cannot_be_said_is_refused(command: str, args: tuple[str | int | Flag, ...]) -> None:
    with pytest.raises(InputError):
        hmp_line(command, *args)


def test_the_longest_argument() -> None:
    assert hmp_line("device_del", "x" * 1023).endswith("x" * 1023)


@pytest.mark.parametrize(
    "text",
    [
        "Error: Device 'x' not found\r\n",
        "unknown command: 'info nosuch'\r\n",
        'mtree: extraneous characters at the end of line\r\nTry "help info mtree"\r\n',
        "mtree: unsupported option -q\r\n",
        "logfile: filename expected\r\n",
        "invalid char 'x' in expression\r\n",
        "Command 'x' not available until machine initialization has completed.\r\n",
    ],
)
def test_error_texts(text: str) -> None:
    assert _error_of(text, quiet=False) == text.splitlines()[0]


@pytest.mark.parametrize("text", ["", "address-space: memory\r\n  Error: not first\r\n", "0x1\r\n"])
def test_texts_that_are_no_errors(text: str) -> None:
    assert _error_of(text, quiet=False) is None


def test_a_quiet_command_that_speaks_has_failed() -> None:
    text = "Error opening logfile /x: Permission denied\r\n"
    assert _error_of(text, quiet=False) is None
    assert _error_of(text, quiet=True) == "Error opening logfile /x: Permission denied"
    assert _error_of("\r\n", quiet=True) is None
