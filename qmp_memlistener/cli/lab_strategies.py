"""`lab strategies`: what the lab can run, what each is, and what it lacks here."""

from __future__ import annotations

import rich_click as click

from .common import json_option, print_json, say
from .lab import device_option


@click.command("strategies")
@device_option
@json_option
def command(device: str, as_json: bool) -> None:
    """List the lab's strategies: what each is, and why it does not run here.

    Without a usable KVM device the list is the same, and that is the reason for each.

    Example: qmp-memlistener lab strategies
    """
    from ..errors import MissingPrerequisite
    from ..kvmlab.race import host_facts
    from ..kvmlab.strategies import STRATEGIES, why_not
    from ..kvmlab.system import Cpus
    from ..kvmlab.vm import Kvm
    from ..reports.lab import strategy_lines

    facts: dict[str, object] | None = None
    remedy: str | None = None
    try:
        with Kvm(device) as kvm:
            found = [(s.name, s.fidelity, why_not(s, kvm)) for s in STRATEGIES]
            facts = host_facts(kvm, Cpus.split())
    except MissingPrerequisite as exc:
        found = [(s.name, s.fidelity, s.only_model or exc.message) for s in STRATEGIES]
        remedy = exc.remedy
    if as_json:
        entries = [{"name": n, "fidelity": f, "skipped": w} for n, f, w in found]
        print_json({"schema": 1, "host": facts, "strategies": entries})
        return
    for line in strategy_lines(found):
        say(line)
    if remedy is not None:
        say(f"remedy: {remedy}")
