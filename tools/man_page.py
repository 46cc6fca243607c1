"""The man page, made from what `--help` says.

python tools/man_page.py > qmp-memlistener.1
man -l qmp-memlistener.1
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import click  # noqa: E402

from qmp_memlistener import __version__  # noqa: E402
from qmp_memlistener.cli.main import cli  # noqa: E402

__all__ = ["man_page"]

PROGRAM = "qmp-memlistener"


def man_page() -> str:
    """The page of all verbs, in the language of man(7)."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    context = click.Context(cli, info_name=PROGRAM, **cli.context_settings)
    help_text = _paragraphs(cli.help)
    yield f'.TH {PROGRAM.upper()} 1 "" "{PROGRAM} {__version__}" "User Commands"'
    yield ".SH NAME"
    yield _text(f"{PROGRAM} - {help_text[0].rstrip('.')}")
    yield ".SH SYNOPSIS"
    yield f".B {_text(PROGRAM)}"
    yield r"\fIVERB\fR [\fIOPTIONS\fR] \fIARGUMENTS\fR"
    yield ".SH DESCRIPTION"
    yield from _joined(help_text[1:])
    yield ".SH OPTIONS"
    yield from _options(cli, context)
    yield ".SH VERBS"
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        yield from _verb(command, click.Context(command, parent=context, info_name=name))
    yield ".SH EXIT STATUS"
    yield _text((cli.epilog or "").removeprefix("Exit codes: "))


def _verb(command: click.Command, context: click.Context) -> Iterator[str]:
    """One verb, and those below it."""
    yield f".SS {_text(context.command_path.removeprefix(PROGRAM + ' '))}"
    pieces = " ".join(command.collect_usage_pieces(context))
    yield f".B {_text(context.command_path)}"
    yield _text(pieces)
    yield ".PP"
    yield from _joined(_paragraphs(command.help))
    yield from _options(command, context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _verb(inner, click.Context(inner, parent=context, info_name=name))


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            yield ".TP"
            yield rf"\fB{_text(record[0])}\fR"
            yield _text(record[1]) or r"\&"


def _paragraphs(help_text: str | None) -> list[str]:
    found = re.split(r"\n\s*\n", (help_text or "").strip())
    return [" ".join(paragraph.replace("\b", "").split()) for paragraph in found]


def _joined(paragraphs: list[str]) -> Iterator[str]:
    for index, paragraph in enumerate(paragraphs):
        if index:
            yield ".PP"
        yield _text(paragraph)


def _text(text: str) -> str:
    """So that roff shows it as it is, on one line."""
    text = " ".join(text.split()).replace("\\", r"\e").replace("-", r"\-")
    text = "".join(c if c.isascii() else rf"\[u{ord(c):04X}]" for c in text)
    return rf"\&{text}" if text.startswith((".", "'")) else text


if __name__ == "__main__":
    sys.stdout.write(man_page())
