"""Threads that hang: who waits for them, and that nobody does at the end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from qmp_memlistener.host.bounded import call, in_thread


@pytest.mark.asyncio
async def test_a_thread_gives_its_result_or_its_error() -> None:
    assert await in_thread(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 7, 0)
    names = await in_thread(threading.current_thread)
    assert names.daemon


@pytest.mark.asyncio
async def test_who_is_cancelled_goes_on_at_once() -> None:
    free = threading.Event()
    waiting = asyncio.create_task(in_thread(free.wait))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    free.set()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await in_thread(threading.Event().wait, 1.0)


def test_a_call_has_a_deadline() -> None:
    with pytest.raises(TimeoutError, match=r"0\.05 s"):
        call(threading.Event().wait, 0.05)


HANGS = """
import asyncio, threading
from qmp_memlistener.host.bounded import in_thread

async def main():
    try:
        async with asyncio.timeout(0.05):
            await in_thread(threading.Event().wait)
    except TimeoutError:
        print("on")

asyncio.run(main())
print("end")
"""


def test_a_thread_that_hangs_holds_up_neither_the_loop_nor_the_exit() -> None:
    began = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=30)
    assert ran.stdout.split() == ["on", "end"]
    assert ran.returncode == 0, ran.stderr
    assert time.monotonic() - began < 15
