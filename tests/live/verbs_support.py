"""What the tests of the verbs share: a `watch` that has attached, and how it must leave a guest."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from qmp_memlistener.qmp import Monitor, UnixTarget
from tests.support.host import patience
from tests.support.leftovers import enabled_events, left_behind
from tests.support.live import QEMUS, Vm, builds
from tests.support.verbs import Verb, run_in_terminal, started_verb

__all__ = ["check_tables_fit", "in_time", "is_as_before", "one_build", "watched"]

one_build = builds(QEMUS[:1])


def in_time() -> float:
    """Seconds from the cause of the end, or from the start, to the exit code; 2 at rest."""
    return patience(5.0)


@asynccontextmanager
async def watched(vm: Vm, *args: str) -> AsyncIterator[Verb]:
    """`watch` that has attached."""
    async with started_verb("watch", vm.target, *args) as watch:
        await watch.ready()
        yield watch


async def is_as_before(vm: Vm, monitor: Monitor, before: frozenset[str]) -> bool:
    """Trace events as before, no files of ours, and the first monitor free."""
    async with await Monitor.connect(UnixTarget(str(vm.guest.monitors[0]))):
        pass
    return await enabled_events(monitor) == before and left_behind(vm.guest.pid) == []


async def check_tables_fit(*args: str | Path) -> None:
    """On a terminal of 80 columns no table is wider; sentences may wrap."""
    lines = await run_in_terminal(*args)
    assert [line for line in lines if "  " in line.strip() and len(line) > 80] == []
