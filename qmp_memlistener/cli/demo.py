"""`demo`: a real guest punches and fills holes in its RAM; the agent shows what happened."""

from __future__ import annotations

import rich_click as click

from .common import json_option, print_json, run_async, say, terminal_shape


@click.command("demo")
@click.option("--machine", type=click.Choice(["pc", "q35"]), default="pc", show_default=True)
@click.option("--accel", type=click.Choice(["auto", "kvm", "tcg"]), default="auto",
              show_default=True, help="auto: KVM where it works, else TCG.")  # fmt: skip
@click.option("--qemu", metavar="VERSION", help="A QEMU that is here, by version; default: the "
              "installed one.")  # fmt: skip
@click.option("--repeat", type=click.IntRange(min=0), default=5, show_default=True, metavar="N",
              help="Rounds of the comparison at the end; 0 leaves it out.")  # fmt: skip
@json_option
def command(machine: str, accel: str, qemu: str | None, repeat: int, as_json: bool) -> None:
    """Boot a small guest that reshapes its own memory map, attach, and show what happens.

    The guest opens and closes PAM segments and SMRAM or TSEG (holes in its RAM) and maps a BAR of
    a device. One transition is planned under every strategy. Under KVM a vCPU then runs code in
    the RAM that comes and goes, on every QEMU that is here: 7.2 dies of it, 10.0 does not, nor
    does 7.2 under `steer --strategy hole`. At the end a Linux guest gets more memory again and
    again under every strategy, and they are compared. Nothing but these guests is touched.

    Example: qmp-memlistener demo --machine q35
    """
    from ..demo import Screen, run_demo
    from ..reports import Narrator
    from .plan import print_plans

    width, unicode = terminal_shape()
    narrator = Narrator(width=width, unicode=unicode)
    if as_json:
        screen = Screen(lambda *_: None, lambda _: None, narrator)
    else:
        screen = Screen(say, print_plans, narrator)
    document = run_async(run_demo(machine, accel, qemu, repeat, screen))
    if as_json:
        print_json(document)
