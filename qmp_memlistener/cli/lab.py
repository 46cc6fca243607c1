"""`lab`: the verbs that run on /dev/kvm; each is a module of its own, imported when asked for."""

from __future__ import annotations

from importlib import import_module

import rich_click as click

__all__ = ["command"]

VERBS = {
    "race": "lab_race",
    "replay": "lab_replay",
    "cost": "lab_cost",
    "strategies": "lab_strategies",
}


class _Verbs(click.RichGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's interface
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        command = import_module(f".{VERBS[cmd_name]}", __package__).command
        assert isinstance(command, click.Command)
        return command


@click.group("lab", cls=_Verbs)
def command() -> None:
    """Run strategies for real, on a small VM of our own on /dev/kvm.

    No QEMU takes part and no guest of yours is touched. Exit code 4: KVM cannot be used here.

    Example: qmp-memlistener lab race --strategy naive,pause,hole
    """
