"""A group of verbs, each a module of its own with a `command`, imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import ClassVar

import rich_click as click

__all__ = ["VerbGroup"]


class VerbGroup(click.RichGroup):
    """Subclasses say which verbs they have."""

    verbs: ClassVar[Mapping[str, str]]
    """Names in the order of the overview, each with its module in this package."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's interface
        return list(self.verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in self.verbs:
            return None
        command = import_module(f".{self.verbs[cmd_name]}", __package__).command
        assert isinstance(command, click.Command)
        return command
