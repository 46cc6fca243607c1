"""Completion of verbs, options and guests, in a shell where there is one; the man page."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from qmp_memlistener.cli.common import complete_target
from qmp_memlistener.cli.main import VERBS, cli
from tests.unit.cli.cli_support import process, run
from tools.man_page import man_page

SHELLS = ("bash", "zsh", "fish")


def completed(*words: str) -> list[str]:
    """What is offered for the last word, by the protocol of bash's script."""
    env = {
        "_QMP_MEMLISTENER_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(("qmp-memlistener", *words)),
        "COMP_CWORD": str(len(words)),
    }
    ran = process(env=env)
    assert (ran.code, ran.err) == (0, "")
    return ran.out.splitlines()


def test_verbs_and_options_are_completed() -> None:
    assert completed("rep") == ["plain,report"]
    assert completed("export", "--for") == ["plain,--format"]
    assert completed("export", "--format", "p") == ["plain,perfetto", "plain,parquet"]


def test_files_are_left_to_the_shell() -> None:
    assert completed("export", "boo") == ["file,boo"]


def test_a_name_that_a_shell_acts_on_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other users name guests; bash puts what is completed into the line as it is."""
    targets = ["name:web-1", "name:a;reboot", "name:$(id)", "name:a b", "name:x\ny", "unix:/a'b"]
    guest = SimpleNamespace(name="")
    monkeypatch.setattr("qmp_memlistener.qmp.find_guests", lambda: [guest])
    monkeypatch.setattr("qmp_memlistener.qmp.resolving.targets_of", lambda *_: targets)
    context = click.Context(cli)
    parameter = click.Argument(["target"])
    assert complete_target(context, parameter, "") == ["name:web-1"]
    assert complete_target(context, parameter, "unix:") == []


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_one_of_that_shell(shell: str, tmp_path: Path) -> None:
    ran = process("completion", shell)
    assert (ran.code, ran.err) == (0, "")
    assert f"_QMP_MEMLISTENER_COMPLETE={shell}_complete" in ran.out
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"needs {shell}: apt-get install {shell}")
    script = tmp_path / "script"
    script.write_text(ran.out)
    subprocess.run([found, "-n", str(script)], check=True, timeout=30)


def test_bash_completes(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash: apt-get install bash")
    program = tmp_path / "qmp-memlistener"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m qmp_memlistener "$@"\n')
    program.chmod(0o755)
    script = (
        f'eval "$({program} completion bash)"; COMP_WORDS=(qmp-memlistener rep); COMP_CWORD=1; '
        f'_qmp_memlistener_completion {program}; echo "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(
        [bash, "--norc", "-c", script], capture_output=True, text=True, timeout=60, check=True,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("report\n", "")


def test_a_shell_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "tcsh" in run(capsys, "completion", "tcsh").refused(2)


def test_the_script_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    document = run(capsys, "completion", "fish", "--json").document()
    assert document.keys() == {"schema", "shell", "script"}
    assert document["shell"] == "fish"


def test_the_man_page_has_every_verb_and_option() -> None:
    page = man_page()
    for name in VERBS:
        assert f".SS {name}".replace("-", r"\-") in page
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert parameter.opts[-1].replace("-", r"\-") in page, (name, parameter.opts)
    assert not [line for line in page.splitlines() if line.startswith("'")]
    assert ".SS lab race" in page


def test_groff_has_no_complaint_about_the_man_page() -> None:
    groff = shutil.which("groff")
    if groff is None:
        pytest.skip("needs groff: apt-get install groff-base")
    done = subprocess.run(
        [groff, "-man", "-Tutf8", "-ww"], input=man_page(), capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    assert done.stderr == ""
