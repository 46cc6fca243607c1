"""The program: `qmp-memlistener`, or `python -m qmp_memlistener`."""

import signal

__all__ = ["run"]


def run() -> None:
    """Run one command line and exit.  Until the verbs' own handlers are there, Ctrl-C just ends."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli.main import run

    run()


if __name__ == "__main__":
    run()
