"""`lab`: the verbs that run on /dev/kvm; each is a module of its own, imported when asked for."""

from __future__ import annotations

import rich_click as click

from .verbs import VerbGroup

__all__ = ["command"]

VERBS = {
    "race": "lab_race",
    "replay": "lab_replay",
    "strategies": "lab_strategies",
}


class _Verbs(VerbGroup):
    verbs = VERBS


@click.group("lab", cls=_Verbs)
def command() -> None:
    """Run strategies for real, on a small VM of our own on /dev/kvm.

    No QEMU takes part and no guest of yours is touched. Exit code 4: KVM cannot be used here.

    Example: qmp-memlistener lab race --strategy naive,pause,hole
    """
