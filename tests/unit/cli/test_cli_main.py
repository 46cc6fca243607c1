"""The command line as a whole: overview, help, exit codes, odd terminals and outputs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest

from qmp_memlistener import __version__
from qmp_memlistener.cli import lab
from qmp_memlistener.cli.main import VERBS
from tests.unit.cli.cli_support import RamMap, process, run, sample_outputs, tree

RAM_64M = 64 << 20
ESCAPE = "\x1b"

# every command line that does something
LEAVES: dict[tuple[str, ...], click.Command] = {
    (verb,): import_module(f"qmp_memlistener.cli.{module}").command
    for verb, module in VERBS.items()
    if verb != "lab"
}
LEAVES |= {("lab", verb): command for verb, command in lab.command.commands.items()}


@pytest.fixture
def map_file(tmp_path: Path) -> Path:
    """A saved `info mtree` output."""
    return RamMap(RAM_64M).cover(0xA0000, 0x20000, "vga", owner="vga0").file(tmp_path / "m.txt")


def plain(text: str) -> str:
    """Words with single blanks between them, whatever box they were drawn in."""
    return " ".join(text.replace("│", " ").split())


# -- overview and help ---------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "--version")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"qmp-memlistener, version {__version__}\n"


def test_version_of_the_process() -> None:
    done = process("--version")
    assert (done.code, done.out) == (0, f"qmp-memlistener, version {__version__}\n")


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_the_overview_names_every_verb_and_exit_code(
    capsys: pytest.CaptureFixture[str], option: str
) -> None:
    done = run(capsys, option)
    assert (done.code, done.err) == (0, "")
    words = plain(done.out)
    for verb in VERBS:
        assert f" {verb} " in words
    assert "Exit codes: 0 good, 1 " in words
    assert "2 bad usage" in words
    assert "3 target unreachable" in words
    assert "4 a needed privilege" in words


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_verb_explains_itself_with_an_example(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    done = run(capsys, *words, "--help")
    assert (done.code, done.err) == (0, "")
    shown = plain(done.out)
    assert f"Example: qmp-memlistener {' '.join(words)}" in shown
    assert "--json" in shown or words == ("run",)  # it becomes QEMU: it has nothing to say


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_the_example_is_a_command_line_that_is_understood(words: tuple[str, ...]) -> None:
    """Its options are parsed; nothing is carried out."""
    command = LEAVES[words]
    (example,) = [
        line.strip()
        for line in str(command.help).splitlines()
        if line.strip().startswith("Example: ")
    ]
    given = example.removeprefix("Example: ").split()
    assert given[: 1 + len(words)] == ["qmp-memlistener", *words]
    context = command.make_context(words[-1], given[1 + len(words) :])
    assert context.args == []


def test_the_lab_names_its_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "lab", "--help")
    assert (done.code, done.err) == (0, "")
    for verb in lab.command.commands:
        assert f" {verb} " in plain(done.out)


def test_no_verb_shows_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys)
    assert done.code == 2
    assert "watch" in done.out + done.err


# -- bad usage -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["nonsense"],
        ["shows"],
        ["--nonsense"],
        ["show", "--nonsense"],
        ["watch"],
        ["record", "/x"],
        ["record"],
        ["watch", "/x", "--for", "soon"],
        ["watch", "/x", "--count", "0"],
        ["watch", "/x", "--count", "many"],
        ["plan", "--strategy", "nonsense"],
        ["plan", "--max-holes", "-1"],
        ["plan", "--bitmaps", "kept"],
        ["demo", "--machine", "vax"],
        ["list", "surplus"],
    ],
    ids=" ".join,
)
def test_bad_usage(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    err = run(capsys, *argv).refused()
    assert "qmp-memlistener" in err


def test_bad_usage_of_the_process() -> None:
    assert "No such command 'nonsense'" in process("nonsense").refused()


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["watch", "/nonexistent/qmp"], 3),
        (["show", "unix:/nonexistent/qmp"], 3),
        (["record", "/nonexistent/qmp", "-o", "/nonexistent/r"], 3),
        (["watch", "pid:4194303"], 3),
        (["watch", "no target at all"], 2),
        (["watch", ""], 2),
        (["watch", "/x", "--for", "0"], 2),
        (["watch", "localhost:99999"], 2),
        (["demo", "--qemu", "0.1"], 4),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else str(v),
)
def test_the_exit_code_says_whose_fault_it_is(
    capsys: pytest.CaptureFixture[str], argv: list[str], code: int
) -> None:
    run(capsys, *argv).refused(code)


# -- odd outputs ---------------------------------------------------------------------------


def test_what_is_piped_has_no_escape_sequences(map_file: Path) -> None:
    for env in ({"TERM": "xterm"}, {"TERM": "dumb"}, {"NO_COLOR": "1"}, {"COLUMNS": "40"}):
        for argv in (["show", "--from", str(map_file)], ["plan", "--help"]):
            done = process(*argv, env=env)
            assert done.code == 0, (env, done.err)
            assert ESCAPE not in done.out


@pytest.mark.parametrize("locale", ["C", "POSIX", "C.UTF-8"])
def test_any_locale_will_do(tmp_path: Path, locale: str) -> None:
    path = tmp_path / "m.txt"
    path.write_text(
        tree("0000000000000000-0000000000000fff (prio 0, ram): größe-😀"), encoding="utf-8"
    )
    for argv in (["show", "--from", str(path)], ["show", "--from", str(path), "--json"]):
        done = process(*argv, env={"LC_ALL": locale})
        assert done.code == 0, done.err
        assert "größe-😀" in done.out


def test_an_output_that_cannot_show_a_name_is_no_reason_to_fail(tmp_path: Path) -> None:
    path = tmp_path / "m.txt"
    path.write_text(tree("0000000000000000-0000000000000fff (prio 0, ram): größe"), "utf-8")
    done = process("show", "--from", path, env={"PYTHONIOENCODING": "ascii"})
    assert "Traceback" not in done.err
    assert done.code == 0
    assert "0x0000000000-0x0000000fff" in done.out


@pytest.mark.parametrize(
    "argv", [["show"], ["show", "--json"], ["plan"], ["plan", "--json"], ["--version"]]
)
def test_nobody_reads_the_output(map_file: Path, argv: list[str]) -> None:
    """As in `… | head -1`: the end of the reader is no failure of ours."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = process(*arguments(argv, map_file), stdout=writer)
    finally:
        os.close(writer)
    assert done.err == ""
    assert done.code == 0


@pytest.mark.parametrize("argv", [["show"], ["show", "--json"], ["plan"], ["plan", "--json"]])
def test_an_output_on_a_full_disk_is_an_error(map_file: Path, argv: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = process(*arguments(argv, map_file), stdout=full.fileno())
    assert "Traceback" not in done.err
    assert "No space left on device" in done.err
    assert done.code == 1


@pytest.mark.parametrize("argv", [["show"], ["show", "--json"], ["plan"], ["list", "--json"]])
def test_closed_standard_output(map_file: Path, argv: list[str]) -> None:
    """As a careless service manager does it: `>&-`."""
    done = shell(">&-", *arguments(argv, map_file))
    assert "Traceback" not in done.stderr.decode()


def test_closed_standard_input() -> None:
    done = shell("<&-", "show", "--from", "-")
    assert "Traceback" not in done.stderr.decode()
    assert done.returncode == 2


def test_messages_never_go_to_standard_output() -> None:
    """Even when standard error is closed: what reads our JSON would choke on them."""
    done = shell("2>&-", "show", "--from", "/nonexistent")
    assert done.returncode == 2
    assert done.stdout == b""


def arguments(argv: list[str], path: Path) -> list[str]:
    """The verb with its input."""
    match argv[0]:
        case "show":
            return [*argv, "--from", str(path)]
        case "plan":
            return [*argv, "--before", str(path), "--after", str(path)]
        case _:
            return argv


def shell(redirection: str, *argv: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "qmp_memlistener", *argv]
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
        check=False,
    )


def test_a_narrow_terminal_cuts_no_addresses(tmp_path: Path) -> None:
    path = sample_outputs(tmp_path, "10.0/q35-plain-kvm-reset")["info mtree -o"]
    done = process("show", "--from", path, env={"COLUMNS": "80"})
    assert done.code == 0
    assert "0x00fec00000-0x00fec00fff" in done.out
    assert max(map(len, done.out.splitlines())) < 200
