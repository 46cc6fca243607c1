"""An event loop that is a GLib program's main loop: nothing is missed, nothing spins."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from qmp_memlistener import glib_loop
from qmp_memlistener.errors import MissingPrerequisite
from qmp_memlistener.glib_loop import Integration
from tests.support.host import patience

WHY = (
    "PyGObject is not installed in this Python (extra glib, Debian package libgirepository1.0-dev)"
)
Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=list(Integration))
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine in a loop of GLib's."""
    if request.param not in glib_loop.integrations():
        pytest.skip(f"{request.param}: {WHY}")

    def in_loop(main: Coroutine[Any, Any, None]) -> None:
        def make() -> asyncio.AbstractEventLoop:
            return glib_loop.new_event_loop(integration=request.param)

        with asyncio.Runner(loop_factory=make) as runner:
            runner.run(asyncio.wait_for(main, patience(10.0)))

    return in_loop


def glib_calls(after_ms: int, what: Callable[[], object]) -> None:
    """GLib, not asyncio, calls `what` once."""
    from gi.repository import GLib

    def call() -> bool:
        what()
        return False

    GLib.timeout_add(after_ms, call)


def test_a_subprocess_ends_and_is_not_waited_for_in_a_busy_loop(run: Run) -> None:
    async def main() -> None:
        busy = time.process_time()
        process = await asyncio.create_subprocess_exec(
            *("sh", "-c", "echo out; exec >&-; sleep 0.5"), stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        assert (out, process.returncode) == (b"out\n", 0)
        assert time.process_time() - busy < 0.25

    run(main())


def test_a_descriptor_that_only_hung_up_is_reported(run: Run) -> None:
    async def main() -> None:
        reading, writing = os.pipe()
        told = asyncio.Event()
        asyncio.get_running_loop().add_reader(reading, told.set)
        glib_calls(10, lambda: os.close(writing))
        await told.wait()
        asyncio.get_running_loop().remove_reader(reading)
        assert os.read(reading, 1) == b""
        os.close(reading)

    run(main())


def test_what_a_callback_of_glib_schedules_is_done_at_once(run: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        soon: asyncio.Future[float] = loop.create_future()
        later: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(patience(3.0), lambda: None)

        def called() -> None:
            soon.set_result(loop.time())
            loop.call_later(0.02, later.set_result, None)

        glib_calls(10, called)
        at = await soon
        assert loop.time() < timer.when()
        await later
        assert at + 0.01 < loop.time() < timer.when()
        timer.cancel()

    run(main())


def test_each_signal_is_told(run: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        told = asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, told.set)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR1)
            await told.wait()
            told.clear()
        assert loop.remove_signal_handler(signal.SIGUSR1)
        assert not loop.remove_signal_handler(signal.SIGUSR1)

    run(main())
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_ctrl_c_ends_it(run: Run) -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_later(0.02, os.kill, os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    with pytest.raises(KeyboardInterrupt):
        run(main())


def test_threads_sockets_timers_and_deadlines_work(run: Run) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        echo, back = await asyncio.open_connection(sock=theirs)
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(time.sleep, 0.02))
            for n in range(100):
                writer.write(b"%d\n" % n)
                back.write(await echo.readline())
                assert await reader.readline() == b"%d\n" % n
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await reader.readline()
        back.close()
        assert await reader.read() == b""
        writer.close()

    run(main())


def test_a_loop_without_anything_to_do_takes_no_cpu(run: Run) -> None:
    async def main() -> None:
        busy = time.process_time()
        glib_calls(250, lambda: None)
        await asyncio.sleep(0.5)
        assert time.process_time() - busy < 0.1

    run(main())


def test_without_the_libraries_the_extra_and_the_package_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("gi.events", "asyncio_glib"):
        monkeypatch.setitem(sys.modules, module, None)
    assert glib_loop.integrations() == ()
    for asked in (None, *Integration):
        with pytest.raises(MissingPrerequisite) as raised:
            glib_loop.new_event_loop(integration=asked)
        assert "qmp-memlistener[glib]" in (raised.value.remedy or "")
        assert "python3-gi" in (raised.value.remedy or "")
