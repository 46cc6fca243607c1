"""`qmp-memlistener VERB`: finds the verb's module, turns errors into messages and exit codes."""

from __future__ import annotations

import io
import os
import sys
from importlib import import_module

import rich_click as click

from .. import __version__
from ..errors import MemListenerError, OperationFailed
from .common import READER_GONE, Interrupted, print_error, print_traceback, printable, say
from .signals import EXIT_CODE, signals

__all__ = ["cli", "run"]

# the verbs in the order of the overview, each with its module
VERBS = {
    "list": "list_guests",
    "doctor": "doctor",
    "show": "show",
    "watch": "watch",
    "record": "record",
    "hotplug": "hotplug",
    "unplug": "unplug",
    "resize": "resize",
    "compare": "compare",
    "steer": "steer",
    "run": "run",
    "report": "report",
    "export": "export",
    "plan": "plan",
    "lab": "lab",
    "dbus-serve": "dbus_serve",
    "demo": "demo",
    "completion": "completion",
}


class _Verbs(click.RichGroup):
    """Each verb is a module of its own with a `command`, imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's interface
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        command = import_module(f".{VERBS[cmd_name]}", __package__).command
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 good, 1 the check or operation failed, 2 bad usage or bad input, "
    "3 target unreachable, busy or lost, 4 a needed privilege or component is missing, "
    "130 interrupted before it was done.",
)
@click.version_option(__version__, prog_name="qmp-memlistener")
def cli() -> None:
    """Watch a running QEMU/KVM guest change its memory map.

    TARGET is unix:PATH (or just a path), HOST:PORT, pid:N, name:GUEST or libvirt:DOMAIN.
    """


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    try:
        result = cli.main(argv, prog_name="qmp-memlistener", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as exc:
        exc.message = printable(exc.message)  # type: ignore[misc]  # it quotes what was typed
        exc.show()
        return 2
    except MemListenerError as exc:
        print_error(exc)
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt, Interrupted):
        say("interrupted", err=True)
        return EXIT_CODE
    except RuntimeError as exc:
        # Python before 3.12 wraps what comes while a class of a module is made
        if not isinstance(exc.__cause__, Interrupted | KeyboardInterrupt):
            raise
        say("interrupted", err=True)
        return EXIT_CODE
    except (SystemExit, OSError) as exc:
        return _end_of_output(exc)
    return result if isinstance(result, int) else 0


def _end_of_output(exc: SystemExit | OSError) -> int:
    """Exit code when stdout could not be written; click turns EPIPE into SystemExit."""
    cause = exc if isinstance(exc, OSError) else exc.__context__
    if not isinstance(cause, OSError):
        assert isinstance(exc, SystemExit)
        return exc.code if isinstance(exc.code, int) else 1
    # what is still buffered has nowhere to go: keep the interpreter from complaining at exit
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if signals.came:
        return EXIT_CODE
    if cause.errno in READER_GONE:
        return 0  # as in `| head`: whoever read has had enough
    print_error(
        OperationFailed(
            f"the output cannot be written: {cause.strerror or cause}",
            remedy="make room, or send it somewhere else",
        )
    )
    return 1


def run() -> None:
    """Run this process's command line, and exit with its code."""
    # Python leaves a stream that was closed at the start None; print() would then take stdout
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 - for the rest of the process
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = print_traceback
    try:
        signals.install()
        code = main()
        signals.finish()
    except Interrupted:  # between them
        signals.finish()
        code = EXIT_CODE
    sys.exit(code)
