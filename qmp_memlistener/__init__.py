"""Watch a running QEMU/KVM guest change its memory map, as exact KVM slot operations.

::

    from qmp_memlistener import MemoryListener, attach

    class Holes(MemoryListener):
        def hole_punched(self, hole):
            print(f"{hole.block}: {hole.start:#x}+{hole.size:#x} behind {hole.covered_by}")

    async with attach("unix:/run/vm.qmp") as agent:
        agent.register(Holes())
        await agent.wait_lost()

The names below are loaded on first use, so that `import qmp_memlistener` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .agent import Agent, attach
    from .errors import MemListenerError
    from .listener import MemoryListener
    from .mirror.backend import ModelBackend, SlotBackend
    from .mirror.mirroring import check_guest, mirroring
    from .updates.model import Outcome, Strategy

__version__ = "0.1.0"

__all__ = [
    "attach",
    "Agent",
    "MemoryListener",
    "Strategy",
    "Outcome",
    "mirroring",
    "check_guest",
    "SlotBackend",
    "ModelBackend",
    "MemListenerError",
    "__version__",
]

_HOME = {
    "Agent": "agent",
    "attach": "agent",
    "MemListenerError": "errors",
    "MemoryListener": "listener",
    "ModelBackend": "mirror.backend",
    "Outcome": "updates.model",
    "SlotBackend": "mirror.backend",
    "Strategy": "updates.model",
    "check_guest": "mirror.mirroring",
    "mirroring": "mirror.mirroring",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
