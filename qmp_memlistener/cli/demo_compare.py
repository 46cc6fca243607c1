"""The last part of the demo: a Linux guest gets more memory under each strategy, compared."""

from __future__ import annotations

from collections.abc import Callable

from ..agent import attach
from ..errors import MissingPrerequisite
from ..guests import QemuBuild
from ..guests.linux import LinuxImage, LinuxSpec, boot_linux
from ..host.bounded import in_thread
from ..reports.compare import comparison_lines
from ..updates.compare import CompareOptions, Comparison, compare
from ..updates.model import Strategy
from ..updates.options import parse_resize

__all__ = ["compare_strategies"]

WINDOW_S = 0.7
SIZE = "+256M"


async def compare_strategies(
    build: QemuBuild, repeat: int, say: Callable[[str], None]
) -> Comparison | None:
    """Boot Linux under TCG and compare; None, and the reason said, when there is no Linux guest."""
    say("")
    say(f"-- Linux under QEMU {build.version} gets 256 MiB more, under every strategy")
    try:
        image = await in_thread(LinuxImage.build)
    except MissingPrerequisite as exc:
        say(f"{' ' * 12}left out: {exc.message}")
        return None
    # a DIMM for direct and pause, a virtio-mem device with room for hole
    async with (
        boot_linux(image, LinuxSpec(machine="pc", virtio_mem=1 << 30), build) as linux,
        attach(f"unix:{linux.guest.monitors[0]}", guarded=True) as agent,
    ):
        await agent.measuring.wait_started()
        found = await compare(
            agent,
            parse_resize(SIZE),
            tuple(Strategy),
            CompareOptions(repeat, WINDOW_S),
            lambda text: say(f"{' ' * 12}{text}"),
        )
    say("")
    for line in comparison_lines(found, f"resize {SIZE}"):
        say(line)
    return found
