"""Recorded lives of real guests, followed by mirrors under every strategy.

`tests/conformance/slots/README.md` tells how the maps were recorded.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qmp_memlistener.memslots import Rules
from qmp_memlistener.mirror.backend import ModelBackend
from qmp_memlistener.mirror.mirror import Mirror
from qmp_memlistener.topology import FlatView, diff, read_map
from qmp_memlistener.updates.model import Strategy
from qmp_memlistener.updates.pause import Pause

SAMPLES = sorted((Path(__file__).parent / "slots").rglob("*.json.gz"))
ABOVE = 1 << 20


def load(path: Path) -> dict[str, Any]:
    with gzip.open(path) as file:
        sample: dict[str, Any] = json.load(file)
    return sample


@asynccontextmanager
async def nobody_runs(pause: Pause) -> AsyncIterator[Pause]:
    yield pause


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: f"{p.parent.name}/{p.name.split('.')[0]}")
def test_mirrors_show_each_map_of_a_guests_life(path: Path) -> None:
    """And under `hole` the slot of the RAM above 1 MiB keeps its id and is never deleted."""
    sample = load(path)
    rules = Rules.parse(sample["version"], sample["page_size"])
    maps = [read_map(step["mtree_after"]).view for step in sample["steps"]]

    async def follow(strategy: Strategy) -> None:
        backend = ModelBackend(sample["page_size"])
        mirror = Mirror(backend, strategy, pause=nobody_runs, rules=rules)
        before = FlatView(())
        main: set[tuple[int, int]] = set()
        for view in maps:
            mirror.begin()
            await mirror.commit(diff(before, view))
            assert await mirror.check(view) == (), strategy
            before = view
            if backend.backing(ABOVE) is not None:
                main |= {(s.slot, s.gpa) for s in backend.slots() if s.gpa <= ABOVE < s.end}
        report = mirror.report()
        assert (report.in_step, report.rebuilt, report.notes) == (True, 0, [])
        assert report.transitions == len(maps)
        if strategy is Strategy.HOLE:
            assert len(main) <= 1
        if strategy is not Strategy.DIRECT:
            assert report.exposed == 0

    for strategy in Strategy:
        asyncio.run(follow(strategy))
