"""A monitor that sends whatever a test has to say to a QEMU, also what we would never send."""

from __future__ import annotations

from qmp_memlistener.qmp import Command, Monitor

__all__ = ["AnyMonitor"]


class AnyMonitor(Monitor):
    """For a test's own connection; what the product sends goes over its own ones."""

    def _check(self, command: Command) -> None:
        pass
