"""What a real QEMU will not do on request: refuse `stop` or `cont`, stand for another reason in
the middle of a pause, or not answer.  The guard's process is the real one."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from qmp_memlistener.errors import (
    CommandFailed,
    DeadlineExceeded,
    GuestMigrating,
    OperationFailed,
    ProtocolViolation,
    TargetLost,
)
from qmp_memlistener.host.directory import HeldFile
from qmp_memlistener.qmp import Command, Reply, UnixTarget
from qmp_memlistener.updates.pause import guard as guard_module
from qmp_memlistener.updates.pause import paused, paused_guest, run_paused
from qmp_memlistener.updates.pause.guard import ResumeGuard, Settled
from qmp_memlistener.updates.pause.guard_notes import NoteForm
from tests.unit.updates.guard_fakes import Fresh, Stalling, faked

UPDATE = (Command("object-add"), Command("device_add"))


@pytest.fixture(autouse=True)
def note_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where guards leave their notes in these tests."""
    path = tmp_path / "note"

    def held(_: object) -> NoteForm:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        return NoteForm(HeldFile(str(path), handle, path.unlink), {"schema": 1})

    monkeypatch.setattr(guard_module, "new_note", held)
    monkeypatch.setattr(guard_module, "_CONNECT_S", 30.0)  # this host may be busy
    return path


def read_note(path: Path) -> dict[str, object] | None:
    if not path.exists():
        return None
    note = json.loads(path.read_bytes())
    assert isinstance(note, dict)
    return note


@pytest.mark.asyncio
async def test_everything_is_sent_in_one_go_and_in_order(tmp_path: Path) -> None:
    async with faked(tmp_path, Fresh) as (fake, monitor, guard):
        result = await run_paused(monitor, guard, UPDATE, deadline=5)
        look = ["query-migrate", "query-status"]
        assert fake.ran[:2] == look, "the guard asks before anything is stopped"
        assert fake.ran[2:] == [*look, "stop", "object-add", "device_add", "cont", *look]
        assert (result.resumed, result.note) == (True, None)


@pytest.mark.parametrize("pipelined", [True, False])
@pytest.mark.parametrize("failing", ["object-add", "device_add"])
@pytest.mark.asyncio
async def test_each_command_may_fail(tmp_path: Path, failing: str, pipelined: bool) -> None:
    async with faked(tmp_path) as (fake, monitor, guard):
        fake.refuse[failing] = -1
        result = await run_paused(monitor, guard, UPDATE, deadline=5, pipelined=pipelined)
        kinds = [CommandFailed if c.name == failing else Reply for c in UPDATE]
        assert [type(r) for r in result.replies] == kinds
        assert (result.resumed, fake.status) == (True, "running")


@pytest.mark.asyncio
async def test_a_refused_stop_is_told(tmp_path: Path) -> None:
    async with faked(tmp_path) as (fake, monitor, guard):
        fake.refuse["stop"] = 2
        result = await run_paused(monitor, guard, UPDATE, deadline=5)
        assert result.resumed
        assert "it ran all the time" in str(result.note)
        with pytest.raises(CommandFailed, match="stop"):
            await run_paused(monitor, guard, UPDATE, deadline=5, pipelined=False)
        assert fake.ran.count("object-add") == 1, "one after the other there is no need to go on"
        assert fake.status == "running"


@pytest.mark.parametrize("pipelined", [True, False])
@pytest.mark.asyncio
async def test_a_refused_cont_is_tried_again_by_the_guard(
    tmp_path: Path, pipelined: bool, note_path: Path
) -> None:
    async with faked(tmp_path) as (fake, monitor, guard):
        fake.refuse["cont"] = 3
        result = await run_paused(monitor, guard, UPDATE, deadline=5, pipelined=pipelined)
        assert (result.resumed, fake.status) == (True, "running")
        assert guard.acted
        assert result.note == "QEMU refused cont (no cont now); the resume guard resumed the guest"
    assert read_note(note_path) is None


@pytest.mark.parametrize("pipelined", [True, False])
@pytest.mark.parametrize(
    ("status", "migration"),
    [("running", "setup"), ("running", "cancelling"), ("paused", "active")]
    + [(status, "completed") for status in ("postmigrate", "finish-migrate", "inmigrate")],
)
@pytest.mark.asyncio
async def test_a_guest_that_migrates_is_not_paused(
    tmp_path: Path, status: str, migration: str, pipelined: bool
) -> None:
    async with faked(tmp_path) as (fake, monitor, guard):
        fake.status, fake.migration = status, migration
        sent: list[str] = []
        with pytest.raises(GuestMigrating) as caught:
            await run_paused(
                monitor,
                guard,
                UPDATE,
                deadline=5,
                pipelined=pipelined,
                sending=lambda: sent.append("now"),
            )
        assert caught.value.remedy
        assert sent == []
        assert set(fake.ran) == {"query-status", "query-migrate"}


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("pipelined", [True, False])
@pytest.mark.asyncio
async def test_a_status_that_is_not_told_loses_no_answer(
    tmp_path: Path, pipelined: bool, times: int
) -> None:
    async with faked(tmp_path, Fresh) as (fake, monitor, guard):

        async def armed(*, held: bool = True) -> str:
            status = await type(guard).arm(guard, held=held)
            fake.refuse["query-status"] = times
            return status

        guard.arm = armed  # type: ignore[method-assign]
        result = await run_paused(monitor, guard, UPDATE, deadline=5, pipelined=pipelined)
        assert [type(r) for r in result.replies] == [Reply] * len(UPDATE)
        assert result.status_before == "running"
        assert (result.resumed, fake.status) == (True, "running")
        fake.refuse.clear()
        assert await type(guard).arm(guard) == "running", "the guard was released"


@pytest.mark.asyncio
async def test_a_migration_that_begins_in_a_block_ends_its_pause(tmp_path: Path) -> None:
    async with faked(tmp_path) as (fake, monitor, guard):
        resumed = asyncio.Event()
        monitor.subscribe(lambda e: resumed.set() if e.name == "RESUME" else None)
        async with paused_guest(monitor, guard, deadline=5) as pause:
            fake.migration = "active"
            await asyncio.wait_for(resumed.wait(), 5)
            assert pause.is_over
            assert fake.status == "running"
        assert pause.note == "the resume guard resumed the guest: a migration began (active)"
        assert fake.ran.count("cont") == 1


@pytest.mark.asyncio
async def test_a_short_block_sends_cont_without_asking_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paused, "LOOK_EVERY_NS", 30 * 10**9)  # this host may be busy
    async with faked(tmp_path, Fresh) as (fake, monitor, guard):
        async with paused_guest(monitor, guard, deadline=5):
            fake.ran.clear()
        assert fake.ran[0] == "cont"


@pytest.mark.parametrize(
    ("status", "migration", "why"),
    [
        ("paused", "active", "a migration began (active)"),
        ("internal-error", "none", "the guest became internal-error"),
    ],
)
@pytest.mark.asyncio
async def test_a_long_block_asks_before_cont_and_says_why_it_is_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, migration: str, why: str
) -> None:
    monkeypatch.setattr(paused, "LOOK_EVERY_NS", 0)
    async with faked(tmp_path) as (fake, monitor, guard):
        async with paused_guest(monitor, guard, deadline=5) as pause:
            fake.status, fake.migration = status, migration
        assert pause.note is not None
        assert pause.note.startswith(f"{why}; ")


@pytest.mark.parametrize("completed", [False, True])
@pytest.mark.asyncio
async def test_a_block_that_ends_before_the_guards_cont_is_answered(
    tmp_path: Path, completed: bool
) -> None:
    """The event comes first, and the block may end then."""
    async with faked(tmp_path) as (fake, monitor, guard):
        resumed = asyncio.Event()
        monitor.subscribe(lambda e: resumed.set() if e.name == "RESUME" else None)
        fake.late = "cont"
        async with paused_guest(monitor, guard, deadline=5) as pause:
            if completed:
                fake.migrates["cont"] = ("postmigrate", "completed")
            fake.migration = "active"
            await asyncio.wait_for(resumed.wait(), 5)
            asyncio.get_running_loop().call_later(0.1, fake.told.set)
        if completed:
            assert fake.status == "paused", "it ran here after its migration"
            assert pause.migrated is not None
            assert not pause.resumed
        else:
            assert pause.note == "the resume guard resumed the guest: a migration began (active)"


@pytest.mark.parametrize("completed", [False, True])
@pytest.mark.asyncio
async def test_a_migration_that_begins_right_before_stop_is_not_held_up(
    tmp_path: Path, completed: bool
) -> None:
    async with faked(tmp_path, Fresh) as (fake, monitor, guard):

        async def armed(*, held: bool = True) -> str:
            await type(guard).arm(guard, held=held)
            fake.migration = "setup"
            return "running"

        guard.arm = armed  # type: ignore[method-assign]
        if completed:
            fake.migrates["cont"] = ("postmigrate", "completed")
        told = "at the destination" if completed else "when the guest was about to be paused"
        with pytest.raises(GuestMigrating, match=told):
            async with paused_guest(monitor, guard, deadline=5):
                raise AssertionError("the block is not entered")
        assert fake.status == ("paused" if completed else "running")


@pytest.mark.parametrize("pipelined", [True, False])
@pytest.mark.asyncio
async def test_a_guest_that_was_migrated_in_the_pause_does_not_run_twice(
    tmp_path: Path, pipelined: bool
) -> None:
    async with faked(tmp_path) as (fake, monitor, guard):
        fake.migrates["cont"] = ("postmigrate", "completed")
        result = await run_paused(monitor, guard, UPDATE, deadline=5, pipelined=pipelined)
        assert (result.resumed, fake.status) == (False, "paused")
        assert result.migrated is not None
        assert "at the destination" in result.migrated.message
        assert "send `cont`" in str(result.migrated.remedy)


@pytest.mark.asyncio
async def test_a_block_that_ends_after_the_migration_sends_no_cont(tmp_path: Path) -> None:
    async with faked(tmp_path) as (fake, monitor, guard):
        async with paused_guest(monitor, guard, deadline=5) as pause:
            fake.status, fake.migration = "postmigrate", "completed"
            await asyncio.sleep(0.01)
        assert (pause.resumed, fake.status) == (False, "postmigrate")
        assert pause.migrated is not None
        assert "cont" not in fake.ran


@pytest.mark.parametrize("pipelined", [True, False])
@pytest.mark.asyncio
async def test_a_guest_that_fails_in_the_pause_is_left_alone(
    tmp_path: Path, pipelined: bool
) -> None:
    async with faked(tmp_path) as (fake, monitor, guard):
        fake.refuse["cont"] = -1
        fake.becomes["device_add"] = "internal-error"
        result = await run_paused(monitor, guard, UPDATE, deadline=5, pipelined=pipelined)
        assert not result.resumed
        assert "still stopped: the guest is internal-error" in str(result.note)
        assert fake.ran.count("cont") <= 1, "ours, where it was on its way; the guard sends none"


@pytest.mark.asyncio
async def test_what_the_guard_could_not_do_is_noted(tmp_path: Path, note_path: Path) -> None:
    async with faked(tmp_path) as (fake, monitor, guard):
        await guard.arm()
        await monitor.execute("stop")
        fake.status = "io-error"
        await guard.close()
        assert "cont" not in fake.ran
    note = read_note(note_path)
    assert note is not None
    assert (note["resumed"], note["obstacle"]) == (False, "the guest is io-error")
    assert "closed its guard" in str(note["why"])


@pytest.mark.parametrize("pipelined", [True, False])
@pytest.mark.asyncio
async def test_a_connection_that_ends_in_the_pause(tmp_path: Path, pipelined: bool) -> None:
    async with faked(tmp_path) as (fake, monitor, guard):

        class Cutting(dict[str, str]):
            """Cuts our connection when the command is looked up."""

            def __contains__(self, name: object) -> bool:
                if name == "device_add":
                    fake._clients[0].transport.abort()
                return False

        fake.becomes = Cutting()
        with pytest.raises(TargetLost) as caught:
            await run_paused(monitor, guard, UPDATE, deadline=5, pipelined=pipelined)
        assert "while the guest was being paused" in caught.value.message
        await guard.close()
        assert fake.status == "running"


@pytest.mark.asyncio
async def test_a_qemu_that_does_not_answer(tmp_path: Path) -> None:
    async with faked(tmp_path) as (fake, monitor, guard):
        assert await guard.arm() == "running"
        fake.open.clear()
        with pytest.raises(DeadlineExceeded):
            await monitor.execute("stop", deadline=0.1)
        assert await guard.hand_over(deadline=0.2) is Settled.UNKNOWN
        fake.open.set()
        # the `stop` is executed now; nobody but the guard sends `cont`
        await guard.close()
        assert fake.status == "running"


@pytest.mark.asyncio
async def test_replies_that_come_too_late_leave_the_guard_armed(tmp_path: Path) -> None:
    async with faked(tmp_path, Stalling) as (fake, monitor, guard):
        assert isinstance(guard, Stalling)
        guard.fake = fake
        with pytest.raises(DeadlineExceeded):
            await run_paused(monitor, guard, UPDATE, deadline=0.2)
        guard.fake = None
        with pytest.raises(OperationFailed, match="earlier pause"):
            await guard.arm()
        fake.open.set()
        await monitor.execute("query-status")  # all before it has been executed
        assert await guard.arm() == "running"
        assert fake.status == "running"


@pytest.mark.asyncio
async def test_a_stalled_qemu_is_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_module, "_ARM_S", 0.2)
    async with faked(tmp_path) as (fake, monitor, guard):
        fake.open.clear()
        with pytest.raises(OperationFailed, match="did not answer"):
            await run_paused(monitor, guard, UPDATE, deadline=5)
        fake.open.set()
        async with paused_guest(monitor, guard, deadline=5):
            assert fake.status == "paused"
        assert fake.status == "running"
        assert fake.ran.count("stop") == 1


@pytest.mark.asyncio
async def test_no_qmp_is_no_monitor(tmp_path: Path) -> None:
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0\r\n")
        await reader.read()
        writer.close()
        closed.set()

    path = str(tmp_path / "s")
    async with await asyncio.start_unix_server(serve, path):
        with pytest.raises(ProtocolViolation):
            await ResumeGuard.start([UnixTarget(path)])
        await asyncio.wait_for(closed.wait(), 5)
