"""The protocol between host and Linux guest, with the guest's side played by the test."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmp_memlistener.errors import DeadlineExceeded, OperationFailed, TargetLost
from tests.support import linux_console
from tests.support.linux_console import COMMAND_MAX, Console, Outcome

pytestmark = pytest.mark.asyncio


class Agent:
    """The guest's end of the serial port."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    def say(self, *lines: str) -> None:
        self.writer.write("".join(f"\n{line}\n" for line in lines).encode())

    async def request(self) -> tuple[int, int, str]:
        """Number, seconds and command of the next request."""
        async with asyncio.timeout(5):
            while not (line := (await self._reader.readline()).split()):
                pass
        assert line[0] == b"run"
        return int(line[1]), int(line[2]), base64.b64decode(line[3]).decode()

    def answer(self, number: int, status: int, output: bytes) -> None:
        self.say(f"done {number} {status} {base64.b64encode(output).decode()}")


@asynccontextmanager
async def connected(tmp_path: Path, *, up: bool = True) -> AsyncIterator[tuple[Console, Agent]]:
    async with Console(tmp_path / "agent") as console:
        agent = Agent(*await asyncio.open_unix_connection(str(console.path)))
        if up:
            agent.say("ready 1234")
            await console.wait_boot(timeout=5)
        try:
            yield console, agent
        finally:
            agent.writer.close()


async def test_command_and_answer(tmp_path: Path) -> None:
    async with connected(tmp_path) as (console, agent):
        running = asyncio.create_task(console.run("echo 'a\nb'", timeout=7))
        number, seconds, command = await agent.request()
        assert (seconds, command) == (7, "echo 'a\nb'")
        agent.answer(number, 3, b"a\nb\n\xff")
        assert await running == Outcome(3, "a\nb\n�")
        quiet = asyncio.create_task(console.run("true"))
        agent.say(f"done {(await agent.request())[0]} 0 ")
        assert await quiet == (0, "")


async def test_what_is_no_line_of_the_agent_is_skipped(tmp_path: Path) -> None:
    async with connected(tmp_path) as (console, agent):
        running = asyncio.create_task(console.run("id"))
        number, _, _ = await agent.request()
        agent.say("done", "done 1", f"done {number} 0 *", f"done {number} x", "\x00\xff noise")
        agent.answer(number + 1, 1, b"another's")
        agent.writer.write(f"\ndone {number} 0 {base64.b64encode(b'ro').decode()}".encode())
        await agent.writer.drain()
        agent.writer.write(b"\n")
        assert await running == (0, "ro")


async def test_commands_go_one_at_a_time(tmp_path: Path) -> None:
    async with connected(tmp_path) as (console, agent):
        both = [asyncio.create_task(console.run(name)) for name in ("one", "two")]
        for name in ("one", "two"):
            number, _, command = await agent.request()
            assert command == name
            agent.answer(number, 0, name.encode())
        assert [(await task).text for task in both] == ["one", "two"]


async def test_a_late_answer_to_an_abandoned_command_is_dropped(tmp_path: Path) -> None:
    async with connected(tmp_path) as (console, agent):
        abandoned = asyncio.create_task(console.run("slow"))
        first, _, _ = await agent.request()
        abandoned.cancel()
        with pytest.raises(asyncio.CancelledError):
            await abandoned
        running = asyncio.create_task(console.run("next"))
        second, _, _ = await agent.request()
        agent.answer(first, 0, b"late")
        agent.answer(second, 0, b"mine")
        assert (await running).text == "mine"


async def test_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux_console, "_GRACE", -0.99)
    async with connected(tmp_path) as (console, _):
        with pytest.raises(DeadlineExceeded, match="no answer to 'sleep 9'"):
            await console.run("sleep  9", timeout=1)


async def test_a_boot_fails_the_command_that_runs(tmp_path: Path) -> None:
    async with connected(tmp_path) as (console, agent):
        running = asyncio.create_task(console.run("reboot"))
        await agent.request()
        agent.say("ready 5678")
        with pytest.raises(OperationFailed, match="booted again"):
            await running
        assert console.boots == 2
        await console.wait_boot(2, timeout=5)


async def test_the_end_of_qemu_fails_everything(tmp_path: Path) -> None:
    async with connected(tmp_path) as (console, agent):
        running = asyncio.create_task(console.run("poweroff"))
        await agent.request()
        waiting = asyncio.create_task(console.wait_boot(2, timeout=5))
        agent.writer.close()
        for task in (running, waiting):
            with pytest.raises(TargetLost, match="has ended"):
                await task
        with pytest.raises(TargetLost):
            await console.run("true")


async def test_a_guest_that_is_not_up(tmp_path: Path) -> None:
    async with connected(tmp_path, up=False) as (console, _):
        with pytest.raises(OperationFailed, match="not up yet"):
            await console.run("true")
        with pytest.raises(DeadlineExceeded, match="not up within"):
            await console.wait_boot(timeout=0.01)


async def test_only_the_first_connection_is_heard(tmp_path: Path) -> None:
    async with connected(tmp_path) as (console, agent):
        _, stranger = await asyncio.open_unix_connection(str(console.path))
        stranger.write(b"\nready 1\n")
        stranger.close()
        await stranger.wait_closed()
        running = asyncio.create_task(console.run("true"))
        agent.answer((await agent.request())[0], 0, b"")
        assert await running == (0, "")
        assert console.boots == 1


async def test_a_command_that_is_too_long_is_not_sent(tmp_path: Path) -> None:
    async with connected(tmp_path) as (console, _):
        with pytest.raises(ValueError, match="at most"):
            await console.run("x" * (COMMAND_MAX + 1))
