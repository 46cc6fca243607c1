"""A guest that is migrated while we pause it: source and destination end as without us."""

from __future__ import annotations

import asyncio
import re

import pytest

from qmp_memlistener.agent import attach
from qmp_memlistener.errors import GuestMigrating
from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.qmp import Command, Monitor, UnixTarget
from qmp_memlistener.updates.model import Plug, Role
from qmp_memlistener.updates.options import parse_addition
from qmp_memlistener.updates.pause import paused_guest, run_paused
from qmp_memlistener.updates.pause.guard import ResumeGuard
from tests.support.live import QEMUS, builds
from tools.soak_migration import Pair, migrated_pair, one_round, status_of, wrong_of

pytestmark = [pytest.mark.qemu, pytest.mark.asyncio]

ENDS = QEMUS[:1] + QEMUS[-1:] if len(QEMUS) > 1 else QEMUS
DEADLINE_S = 10.0


async def migrate(pair: Pair) -> None:
    await pair.at_source.execute("migrate", {"uri": pair.uri})


@builds(ENDS)
async def test_a_migration_ends_a_held_pause_before_it_completes(build: QemuBuild) -> None:
    async with migrated_pair(build, "tcg") as pair:
        paths = [UnixTarget(str(path)) for path in pair.source.monitors[:2]]
        async with (
            await Monitor.connect(paths[0]) as monitor,
            await ResumeGuard.start([paths[1]]) as guard,
        ):
            resumed = asyncio.Event()
            monitor.subscribe(lambda e: resumed.set() if e.name == "RESUME" else None)
            async with paused_guest(monitor, guard, deadline=DEADLINE_S) as pause:
                await migrate(pair)
                await asyncio.wait_for(resumed.wait(), DEADLINE_S)
                assert pause.is_over
            assert "a migration began" in str(pause.note)
            assert await wrong_of(pair) == ""
            # and it is left alone where it was
            for pipelined in (True, False):
                with pytest.raises(GuestMigrating, match="postmigrate"):
                    await run_paused(monitor, guard, (), deadline=1, pipelined=pipelined)
            assert await status_of(pair.at_source) == "postmigrate"


@builds(ENDS)
async def test_one_that_waits_for_a_guest_is_not_paused(build: QemuBuild) -> None:
    async with migrated_pair(build, "tcg") as pair:
        at_destination = [UnixTarget(str(path)) for path in pair.destination.monitors]
        async with await ResumeGuard.start(at_destination[1:]) as guard:
            with pytest.raises(GuestMigrating, match=r"inmigrate|under way"):
                await run_paused(pair.at_destination, guard, (), deadline=1)
            await migrate(pair)
            assert await wrong_of(pair) == "", "it was not told to start paused"


@builds(ENDS[:1])
async def test_a_migration_that_begins_while_backends_are_prepared(build: QemuBuild) -> None:
    slow = parse_addition(Role.OBJECT, "memory-backend-ram,id=m0,size=256M,prealloc=on")
    device = parse_addition(Role.DEVICE, "pc-dimm,id=d0,memdev=m0")
    async with (
        migrated_pair(build, "tcg") as pair,
        attach(pair.target, probes=(), guarded=True) as agent,
    ):
        update = asyncio.create_task(agent.update(Plug(device, (slow,)), "pause"))
        migration = asyncio.create_task(migrate(pair))
        outcome = await update
        await migration
        assert outcome.outcome in ("failed", "refused")
        assert re.search("migration is under way|migrated away", str(outcome.reason))
        assert await wrong_of(pair) == ""
        (answer,) = await pair.at_source.pipeline([Command("object-del", {"id": "m0"})])
        assert "not found" in str(answer), "what was prepared is gone again"


@builds(ENDS[-1:])
@pytest.mark.parametrize("kind", ["held", "mirror", "resize"])
async def test_at_random_moments(build: QemuBuild, kind: str) -> None:
    rounds = [await one_round(build, "tcg", kind) for _ in range(2)]
    assert [r for r in rounds if r.wrong] == []
