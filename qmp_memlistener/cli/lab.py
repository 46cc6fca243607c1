"""`lab`: the verbs that run on /dev/kvm, each a module of its own, and what they share: options, a
progress bar, and how they end."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import rich_click as click

from ..errors import MemListenerError
from ..text import quoted
from .common import print_error
from .verbs import VerbGroup

__all__ = [
    "command",
    "device_option",
    "exit_code",
    "progress_bar",
    "size",
    "strategies_option",
]

VERBS = {
    "race": "lab_race",
    "replay": "lab_replay",
    "strategies": "lab_strategies",
}

F = TypeVar("F", bound=Callable[..., object])
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


class _Verbs(VerbGroup):
    verbs = VERBS


@click.group("lab", cls=_Verbs)
def command() -> None:
    """Run strategies for real, on a small VM of our own on /dev/kvm.

    No QEMU takes part and no guest of yours is touched. Exit code 4: KVM cannot be used here.

    Example: qmp-memlistener lab race --strategy naive,pause,hole
    """


def size(text: str) -> int:
    """`4096`, `4K`, `64M` in bytes, for an option's `type`."""
    match = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"{quoted(text)} is not a size such as 4096, 4K or 64M")
    return int(match[1]) << _UNITS[match[2].upper()]


def device_option(function: F) -> F:
    """`--device`."""
    return click.option(
        "--device", default="/dev/kvm", show_default=True, metavar="PATH", help="The KVM device."
    )(function)


def strategies_option(function: F) -> F:
    """`--strategy`; the verb gets a tuple of names as `strategies`."""
    return click.option(
        "--strategy", "strategies", default="all", show_default=True, metavar="NAME[,NAME]",
        callback=_names, help="Which to run; `lab strategies` lists them. The control always runs.",
    )(function)  # fmt: skip


def _names(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:  # noqa: ARG001
    names = tuple(name.strip() for name in value.split(","))
    if not all(names):
        raise click.BadParameter(f"{quoted(value)} is no list such as naive,pause,hole")
    return names


def exit_code(problem: MemListenerError | None) -> int:
    """That of a problem, which is printed; 0 when there is none."""
    if problem is None:
        return 0
    print_error(problem)
    return problem.exit_code


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Tells a bar on a terminal's stderr how many are done and how many there are."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
