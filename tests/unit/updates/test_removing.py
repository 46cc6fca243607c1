"""Backends are removed in one place, which looks for a migration right before."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import pytest

from qmp_memlistener import updates
from qmp_memlistener.errors import DeadlineExceeded
from qmp_memlistener.qmp import Command, Monitor
from qmp_memlistener.updates import journal
from qmp_memlistener.updates.journal import remove

OBJECT_DEL = Command("object-del", {"id": "m0"})


class FakeMonitor:
    """Answers query-migrate with one status after the other, the last one for ever."""

    def __init__(self, *statuses: str) -> None:
        self.statuses = list(statuses)
        self.sent: list[str] = []

    async def execute(
        self, name: str, arguments: object = None, *, deadline: float = 10.0
    ) -> dict[str, str]:
        del arguments, deadline
        self.sent.append(name)
        if name != "query-migrate":
            return {}
        return {"status": self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]}

    async def remove(self, command: Command) -> list[str]:
        await remove(cast(Monitor, self), command)
        return self.sent


@pytest.mark.asyncio
async def test_no_object_is_removed_while_a_migration_is_set_up() -> None:
    sent = await FakeMonitor("setup", "setup", "active").remove(OBJECT_DEL)
    assert sent == ["query-migrate"] * 3 + ["object-del"]
    assert await FakeMonitor("none").remove(OBJECT_DEL) == ["query-migrate", "object-del"]


@pytest.mark.asyncio
async def test_other_backends_hold_no_memory() -> None:
    netdev_del = Command("netdev_del", {"id": "n0"})
    assert await FakeMonitor("setup").remove(netdev_del) == ["netdev_del"]


@pytest.mark.asyncio
async def test_a_migration_that_is_set_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_SETUP_S", 0.03)
    monitor = FakeMonitor("setup")
    with pytest.raises(DeadlineExceeded, match="no object was removed meanwhile"):
        await monitor.remove(OBJECT_DEL)
    assert set(monitor.sent) == {"query-migrate"}


def test_nothing_else_sends_a_removal() -> None:
    """Neither a role's command nor what undoes a step; `remove` takes both."""
    sends = re.compile(r"\.(execute|timed)\(\s*[\w.]*(remove_command|undo\.name)")
    files = sorted(Path(updates.__file__).parent.glob("*.py"))
    assert [f.name for f in files if sends.search(f.read_text())] == []
