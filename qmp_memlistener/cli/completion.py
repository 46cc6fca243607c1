"""`completion`: the script by which a shell completes verbs, options, and guests that run here."""

from __future__ import annotations

import rich_click as click

from .common import json_option, print_json, say

PROGRAM = "qmp-memlistener"
VARIABLE = "_QMP_MEMLISTENER_COMPLETE"
"""Set by the script when it asks; click's own name for it."""


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
def command(shell: str, as_json: bool) -> None:
    """Print what makes SHELL complete verbs, options and running guests.

    bash: put eval "$(qmp-memlistener completion bash)" into ~/.bashrc; zsh: the same in ~/.zshrc;
    fish: qmp-memlistener completion fish > ~/.config/fish/completions/qmp-memlistener.fish

    Example: qmp-memlistener completion bash
    """
    from click.shell_completion import get_completion_class

    from .main import cli

    kind = get_completion_class(shell)
    assert kind is not None
    made = kind(cli, {}, PROGRAM, VARIABLE)
    # not made.source(): that runs a bash to find its version, and there may be none here
    script = made.source_template % made.source_vars()
    if as_json:
        print_json({"schema": 1, "shell": shell, "script": script})
    else:
        say(*script.strip().splitlines())
