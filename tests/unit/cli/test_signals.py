"""What ends a verb from outside, and what it tells of its waits; in processes of their own."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
import time
from pathlib import Path

import pytest

from qmp_memlistener.waits import waiting, waits
from tests.support.host import patience

_PRELUDE = """
import asyncio, os, signal, sys, time
from qmp_memlistener import waits
waits.TELL_S = 0.2
from qmp_memlistener.cli import signals as s
from qmp_memlistener.cli.common import run_async, say
s.TELL_S = 0.2
s.signals.install()
def ready():
    os.write(1, b"ready\\n")
"""


async def run(
    program: str, *sent: signal.Signals, apart: float = 0.5
) -> tuple[int, str, str, float]:
    """Exit code, output, errors, and the seconds from the first signal to the end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _PRELUDE.replace("\\\\", "\\") + program),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        await process.stdout.readuntil(b"ready")
        start = time.monotonic()
        for i, number in enumerate(sent):
            if i:
                await asyncio.sleep(apart)
            process.send_signal(number)
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode(), time.monotonic() - start


LOOP = """
async def main():
    ready()
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep({clean_up})
        print("put back")
try:
    run_async(main())
except s.Interrupted:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [*map(signal.Signals, (1, 2, 3, 15))])
@pytest.mark.asyncio
async def test_what_runs_in_a_loop_is_cancelled(number: signal.Signals) -> None:
    code, out, _, _ = await run(LOOP.format(clean_up=0), number)
    assert (code, out.split()) == (130, ["put", "back"])


@pytest.mark.asyncio
async def test_signals_that_come_together_are_one() -> None:
    code, out, _, _ = await run(
        LOOP.format(clean_up=0.1), signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, apart=0.02
    )
    assert (code, out.split()) == (130, ["put", "back"])


@pytest.mark.asyncio
async def test_a_later_one_ends_at_once() -> None:
    code, out, err, took = await run(LOOP.format(clean_up=20), signal.SIGINT, signal.SIGINT)
    assert (code, out.split()) == (130, [])
    assert "another signal ends this at once" in err
    assert "ended at once" in err
    assert took < 10


INSIDE = """
async def main():
    loop, came = asyncio.get_running_loop(), asyncio.Event()
    def see_to_it():
        loop.call_soon_threadsafe(came.set)
        return True
    with s.signals.asking(see_to_it):
        ready()
        await came.wait()
    try:
        await asyncio.sleep(20)
    finally:
        print("put back")
try:
    run_async(main())
except s.Interrupted:
    sys.exit(130)
"""


@pytest.mark.asyncio
async def test_a_later_one_ends_at_once_when_a_block_inside_has_seen_to_the_first() -> None:
    code, out, err, took = await run(INSIDE, signal.SIGINT, signal.SIGINT)
    assert (code, out.split()) == (130, [])
    assert "ended at once" in err
    assert took < 10


BUSY = """
async def main():
    ready()
    loop = asyncio.get_running_loop()
    def again():  # never idle, and its wake-up pipe is full
        for _ in range(5000):
            loop.call_soon_threadsafe(int)
        loop.call_soon(again)
    again()
    try:
        await asyncio.sleep(60)
    finally:
        print("put back")
try:
    run_async(main())
except s.Interrupted:
    sys.exit(130)
"""


@pytest.mark.asyncio
async def test_a_loop_whose_wake_up_pipe_is_full_gets_it() -> None:
    code, out, _, _ = await run(BUSY, signal.SIGTERM)
    assert (code, out.split()) == (130, ["put", "back"])


PLAIN = """
try:
    ready()
    time.sleep(60)
except s.Interrupted:
    print("put back")
    sys.exit(130)
"""


@pytest.mark.asyncio
async def test_outside_a_loop_it_is_raised() -> None:
    code, out, _, _ = await run(PLAIN, signal.SIGHUP)
    assert (code, out.split()) == (130, ["put", "back"])


STUCK = """
async def main():
    try:
        for _ in range(100):
            say("x" * 65536)
            await asyncio.sleep(0)
    finally:
        os.write(2, b"put back")
try:
    run_async(main())
except s.Interrupted:
    os._exit(130)
"""


def stuck_in_a_pipe(pid: int) -> bool:
    """Its main thread waits in a write.  A full pipe does not tell: it is full before that one
    writes more."""
    return "pipe_write" in Path(f"/proc/{pid}/wchan").read_text()


@pytest.mark.asyncio
async def test_a_write_that_nobody_reads_does_not_keep_it() -> None:
    unread, out = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _PRELUDE + STUCK), stdout=out, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(patience(30)):
            while not stuck_in_a_pipe(process.pid):  # noqa: ASYNC110 (nothing tells)
                await asyncio.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        async with asyncio.timeout(patience(10)):
            assert await process.stderr.readuntil(b"put back") == b"put back"
            assert await process.wait() == 130
        assert select.select([], [out], [], 0)[1] == [], "nobody has read"
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        os.close(unread)
        os.close(out)


TELLING = """
ready()
with waits.waiting("for the answer"):
    time.sleep(1.5)
with waits.waiting("for nothing"):
    pass
"""


@pytest.mark.asyncio
async def test_what_is_waited_for_long_is_told_once() -> None:
    code, _, err, _ = await run(TELLING)
    assert (code, err) == (0, "waiting for the answer\n")


def test_waits_nest_and_end() -> None:
    def whats() -> list[str]:
        return [wait.what for wait in waits()]

    before = whats()
    with waiting("a"), waiting("b"):
        assert whats() == [*before, "a", "b"]
    assert whats() == before


@pytest.mark.asyncio
async def test_what_comes_at_the_exit_does_not_change_the_exit_code() -> None:
    """Python gives its handlers up on its way out; what is ignored stays so."""
    program = """
s.signals.finish()
ready()
(ignored,) = (line for line in open("/proc/self/status") if line.startswith("SigIgn"))
mask = int(ignored.split()[1], 16)
print(all(mask >> (number - 1) & 1 for number in s.NUMBERS))
time.sleep(0.1)
sys.exit(7)
"""
    code, out, _, _ = await run(program, signal.SIGTERM)
    assert (code, out.split()[-1]) == (7, "True")


_IMPORTING = """
import os, signal, sys
class Interrupting:  # a Ctrl-C while the verbs are imported
    def find_spec(self, name, path, target=None):
        if name == "qmp_memlistener.cli.main":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
from qmp_memlistener.__main__ import run
run()
"""


@pytest.mark.asyncio
async def test_before_the_verbs_have_handlers_it_just_ends() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _IMPORTING),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        assert await process.communicate() == (b"", b"")
    assert process.returncode == -signal.SIGINT
