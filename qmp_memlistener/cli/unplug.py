"""`unplug`: take a device out of a running guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich_click as click

from .common import json_option, target_argument
from .update_options import (
    Attaching,
    attach_options,
    run_update,
    strategy_option,
    update_options,
)

if TYPE_CHECKING:
    from ..agent import Agent
    from ..updates.model import Unplug
    from ..updates.settings import UpdateOptions


@click.command("unplug")
@target_argument()
@click.argument("device", metavar="ID")
@click.option("--backends", is_flag=True, help="Remove its backends as well: memory backend, "
              "netdev, block node.")  # fmt: skip
@strategy_option
@update_options
@attach_options
@json_option
def command(
    attaching: Attaching,
    device: str,
    backends: bool,
    strategy: str,
    options: UpdateOptions,
    as_json: bool,
) -> int:
    """Unplug the device ID from a running guest, wait until it is gone, and report what that cost.

    A guest has to release a device. When it does not, the message says what is waited for, or what
    refused.

    Exit code 1: it was refused, failed, or is still there.

    Example: qmp-memlistener unplug /run/vm.qmp dimm0 --backends
    """
    try:
        device.encode()
    except UnicodeEncodeError:
        device = ""  # the shell gave bytes that are no text
    if not device:
        raise click.BadParameter("no device has this id", param_hint="'ID'")

    async def intend(agent: Agent) -> Unplug:
        from ..updates.guest_view import backends_of
        from ..updates.model import Unplug

        return Unplug(device, await backends_of(agent.monitor, device) if backends else ())

    return run_update(attaching, intend, strategy, options, f"unplug {device}", as_json=as_json)
