"""`hotplug`: plug a device, and its backends, into a running guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich_click as click

from .common import json_option, target_argument
from .update_options import (
    Attaching,
    additions_options,
    attach_options,
    plug_of,
    run_update,
    strategy_option,
    update_options,
)

if TYPE_CHECKING:
    from ..updates.settings import UpdateOptions


@click.command("hotplug")
@target_argument()
@additions_options
@strategy_option
@update_options
@attach_options
@json_option
def command(
    attaching: Attaching,
    device: str | None,
    objects: tuple[str, ...],
    netdevs: tuple[str, ...],
    blockdevs: tuple[str, ...],
    strategy: str,
    options: UpdateOptions,
    as_json: bool,
) -> int:
    """Plug a device into a running guest, and report what that cost it.

    Backends are made first, and removed again if plugging fails. What the strategy cannot do for
    this guest is refused before anything is touched. With --strategy pause a guard, a process of
    its own, resumes the guest if we cannot.

    Exit code 1: it was refused, failed, or the guest has not done its part in time.

    Example: qmp-memlistener hotplug /run/vm.qmp --object memory-backend-ram,id=m0,size=256M
    --device pc-dimm,id=dimm0,memdev=m0 --strategy pause
    """
    if device is None:
        raise click.UsageError("name what to plug: --device DRIVER,id=ID,…")
    plug = plug_of(device, objects, netdevs, blockdevs)
    what = f"plug {plug.device.type} {plug.device.id}"
    return run_update(attaching, plug, strategy, options, what, as_json=as_json)
