"""`run`: start a QEMU whose memory-map changes are made under a strategy."""

from __future__ import annotations

import os
import shutil

import rich_click as click

from ..errors import InputError, MissingPrerequisite


@click.command("run", context_settings={"ignore_unknown_options": True})
@click.option(
    "--strategy", type=click.Choice(("observe", "pause", "inhibit", "hole")), required=True
)
@click.option("--strict", is_flag=True, help="With hole: keep vCPUs out of KVM as well.")
@click.argument("command_line", nargs=-1, required=True, type=click.UNPROCESSED,
                metavar="-- QEMU ...")  # fmt: skip
def command(strategy: str, strict: bool, command_line: tuple[str, ...]) -> None:
    """Start QEMU with a strategy applied from its first memslot on.

    This process becomes QEMU. `steer` changes the strategy later, or takes it out.

    Example: qmp-memlistener run --strategy hole -- qemu-system-x86_64 -accel kvm ...
    """
    from ..steer import OBJECT, Mode
    from ..steer.channel import number_of

    if strict and strategy != "hole":
        raise click.UsageError("--strict goes with --strategy hole")
    if not OBJECT.exists():
        raise MissingPrerequisite(
            "the interposer was not built", remedy="install a C compiler and install this again"
        )
    program = shutil.which(command_line[0])
    if program is None:
        raise InputError(f"{command_line[0]}: no such program", remedy="give its path")
    environment = dict(os.environ)
    preloaded = environment.get("LD_PRELOAD")
    environment["LD_PRELOAD"] = f"{OBJECT}:{preloaded}" if preloaded else str(OBJECT)
    environment["QMP_MEMLISTENER_STEER"] = str(number_of(Mode(strategy)))
    environment.pop("QMP_MEMLISTENER_STRICT", None)
    if strict:
        environment["QMP_MEMLISTENER_STRICT"] = "1"
    os.execve(program, command_line, environment)
