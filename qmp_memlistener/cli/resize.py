"""`resize`: give a running guest more or less memory."""

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
    from ..updates.settings import UpdateOptions


@click.command("resize", context_settings={"ignore_unknown_options": True})
@target_argument()
@click.argument("size", metavar="+SIZE|-SIZE|=SIZE")
@strategy_option
@update_options
@attach_options
@json_option
def command(
    attaching: Attaching, size: str, strategy: str, options: UpdateOptions, as_json: bool
) -> int:
    """Give a running guest more memory (+256M), less (-256M), or so much in all (=4G).

    direct and pause plug and unplug DIMMs; hole changes the size of virtio-mem devices inside
    their regions, which are there already.

    Exit code 1: it was refused, failed, or the guest has done a part of it only.

    Example: qmp-memlistener resize /run/vm.qmp +256M --strategy hole
    """
    from ..updates.options import parse_resize

    intent = parse_resize(size)
    return run_update(attaching, intent, strategy, options, f"resize {size}", as_json=as_json)
