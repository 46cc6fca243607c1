"""Before code is loaded into QEMU a person at a terminal is asked; a script is not."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import rich_click as click
from click.testing import CliRunner, Result

from qmp_memlistener.cli import compare, steer

STEERING = pytest.mark.parametrize(
    ("command", "words"),
    [
        (steer.command, ("--strategy", "hole")),
        (compare.command, ("--transition", "pam")),
        (compare.command, ("--guest-made", "3")),
    ],
    ids=["steer", "compare --transition", "compare --guest-made"],
)
RISK = "A fault in it can end the guest."


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a verb on a guest that there is not, at a terminal where `answer` is typed."""

    def run(command: click.Command, *words: str, answer: str = "", terminal: bool = True) -> Result:
        runner = CliRunner()
        with runner.isolation(input=answer):
            kind = type(sys.stdin)
        monkeypatch.setattr(kind, "isatty", lambda _: terminal)
        return runner.invoke(command, ["unix:/nonexistent/qmp", *words], input=answer)

    return run


@STEERING
def test_no_is_an_answer(
    command: click.Command, words: tuple[str, ...], asked: Callable[..., Result]
) -> None:
    ran = asked(command, *words, answer="n\n")
    assert RISK in ran.output
    assert isinstance(ran.exception, SystemExit)  # click.Abort; no guest was looked for
    assert ran.exit_code == 1
    assert "Aborted" in ran.output


@STEERING
@pytest.mark.parametrize(
    ("more", "answer", "terminal"),
    [((), "y\n", True), (("--yes",), "", True), ((), "", False)],
    ids=["yes", "--yes", "no terminal"],
)
def test_otherwise_the_guest_is_looked_for(
    command: click.Command,
    words: tuple[str, ...],
    more: tuple[str, ...],
    answer: str,
    terminal: bool,
    asked: Callable[..., Result],
) -> None:
    ran = asked(command, *words, *more, answer=answer, terminal=terminal)
    assert (RISK in ran.output) is (answer != "")
    assert "Aborted" not in ran.output
    assert ran.exception is not None  # there is none
    assert not isinstance(ran.exception, SystemExit)


def test_taking_it_out_is_not_asked_about(asked: Callable[..., Result]) -> None:
    ran = asked(steer.command, "--strategy", "off")
    assert RISK not in ran.output
    assert not isinstance(ran.exception, SystemExit)
