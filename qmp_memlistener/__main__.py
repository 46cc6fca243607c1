"""`python -m qmp_memlistener` is the command line."""

from .cli.main import run

run()
