"""Who answers, with a process that is no QEMU at the other end: ourselves."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from qmp_memlistener.errors import WrongGuest
from qmp_memlistener.host.processes import Process
from qmp_memlistener.qmp import Monitor
from qmp_memlistener.qmp.identity import ASKED, GuestIdentity
from tests.unit.qmp.fake_qmp import GREETING, message, replying, request, serving

EMPTY: dict[str, object] = {name: {} for name in ASKED}


def ourselves() -> GuestIdentity:
    process = Process.read(os.getpid())
    assert process is not None
    return GuestIdentity.of(process)


@pytest.mark.asyncio
async def test_a_process_id_that_was_given_again(tmp_path: Path) -> None:
    meant = ourselves()
    async with serving(tmp_path, replying()) as target:
        async with await Monitor.connect(target, meant=replace(meant, is_qemu=False)) as monitor:
            assert monitor.identity.answers == EMPTY
        earlier = replace(meant, start_ticks=meant.start_ticks - 1)
        with pytest.raises(WrongGuest) as error:
            await Monitor.connect(target, meant=earlier)
    assert f"a process that has ended (pid {meant.pid}) is meant" in error.value.message
    assert error.value.exit_code == 3


@pytest.mark.asyncio
async def test_nothing_is_sent_to_another(tmp_path: Path) -> None:
    received: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(message(GREETING))
        try:
            received.set_result(await reader.read(1))
        except ConnectionResetError:  # our greeting was not read
            received.set_result(b"")

    async with serving(tmp_path, serve) as target:
        with pytest.raises(WrongGuest):
            await Monitor.connect(target, meant=GuestIdentity(1, 0, True))
        assert await received == b""


@pytest.mark.asyncio
async def test_who_is_no_qemu_is_asked_and_must_say_the_same_again(tmp_path: Path) -> None:
    uuids = iter(["one", "one", "two"])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(message(GREETING))
        for name in ("qmp_capabilities", *ASKED):
            asked = json.loads(await request(reader))
            assert asked["execute"] == name
            value = {"UUID": next(uuids)} if name == "query-uuid" else {"name": "vm"}
            writer.write(message({"return": value, "id": asked["id"]}))
        await reader.read()

    async with serving(tmp_path, serve) as target, await Monitor.connect(target) as monitor:
        assert monitor.identity.pid == os.getpid()
        assert monitor.identity.remark is not None
        await monitor.reconnect()
        with pytest.raises(WrongGuest, match="the guest two vm, and the guest one vm is meant"):
            await monitor.reconnect()


def test_two_processes_differ_for_certain_only_where_both_are_seen() -> None:
    qemu = GuestIdentity(10, 5, True)
    assert qemu.differs(GuestIdentity(10, 6, True))
    assert not qemu.differs(GuestIdentity(10, 5, True))
    assert not qemu.differs(GuestIdentity())


def test_a_guest_that_is_not_seen_is_known_by_what_only_it_has() -> None:
    nobody = {"query-uuid": {"UUID": "00000000-0000-0000-0000-000000000000"}, "query-name": {}}
    named = nobody | {"query-name": {"name": "web1"}}
    given = nobody | {"query-uuid": {"UUID": "6f1d3e2a-0d3b-4c55-9d0f-0a3f5f1f7a11"}}
    assert not GuestIdentity(answers=nobody).is_named
    assert not GuestIdentity().is_named
    assert GuestIdentity(answers=named).is_named
    assert GuestIdentity(answers=given).is_named
    assert not GuestIdentity(1, 2, is_qemu=True, answers=given).is_named
