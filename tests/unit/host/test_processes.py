"""Processes as /proc shows them, also those that make it hard."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qmp_memlistener.host import bounded
from qmp_memlistener.host.processes import (
    Process,
    Sketch,
    is_ending,
    is_key,
    process_of,
    socket_inodes,
)


def test_as_many_arguments_as_the_kernel_takes() -> None:
    arguments = ["x" * 100_000] * 10 + ["y"] * 10_000 + [os.fsdecode(b"\xff")]
    pipe = subprocess.PIPE
    command = ["sh", "-c", "echo; read x", *arguments]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as child:
        assert child.stdout is not None
        assert child.stdout.readline()  # in the middle of execve(2) a process has no arguments
        found = Process.read(child.pid)
        assert found is not None
        assert found.argv[3:] == tuple(arguments)
        child.kill()
        child.wait()
        assert Process.read(child.pid) is None
        assert Sketch.read(child.pid) is None


CLAIMS = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
area = mmap.mmap(-1, 1 << 30)
area[:8] = b"qemu\\0\\0\\0x"
start = ctypes.addressof(ctypes.c_char.from_buffer(area))
fields = {}
with open("/proc/self/stat") as f:
    stat = f.read().rpartition(")")[2].split()
# struct prctl_mm_map, include/uapi/linux/prctl.h; fields of stat as in proc(5)
map_ = (ctypes.c_uint64 * 13)(
    *(int(stat[n - 3]) for n in (26, 27, 45, 46, 47)),
    int(stat[47 - 3]), int(stat[28 - 3]), start, start + (1 << 30), int(stat[50 - 3]),
    int(stat[51 - 3]), 0, 0xFFFFFFFF << 32,
)
done = libc.prctl(35, 14, ctypes.byref(map_), ctypes.sizeof(map_), 0)
print(done, ctypes.get_errno(), flush=True)
input()
"""


@pytest.mark.timeout(30)
def test_arguments_that_a_process_claims_to_have() -> None:
    """A gigabyte of zeros; no privilege is needed for that."""
    with subprocess.Popen(
        [sys.executable, "-c", CLAIMS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        said = child.stdout.readline()
        if said != b"0 0\n":
            child.kill()
            pytest.skip(f"prctl(PR_SET_MM_MAP) is not possible here: {said!r}")
        found = Process.read(child.pid)
        assert found is not None
        assert len(found.argv) <= 1 << 16
        child.kill()


def test_a_sketch_needs_nothing_of_the_process() -> None:
    found = Sketch.read(os.getpid())
    process = Process.read(os.getpid())
    assert found is not None
    assert process is not None
    assert (found.start_ticks, found.uid) == (process.start_ticks, process.uid)
    assert found.name == Path("/proc/self/comm").read_text().strip()
    assert Sketch.read(1 << 30) is None


def test_a_key_names_one_process() -> None:
    process = Process.read(os.getpid())
    assert process is not None
    assert process_of(process.key) == process
    assert process_of(f"{process.pid}-{process.start_ticks + 1}") is None
    for text in (
        "",
        "1",
        "1-",
        "-1",
        "\u00b2-1",
        "1-2-3",
        "1" * 5000 + "-1",
        "1-1\n",
        f"{1 << 62}-1",
    ):
        assert not is_key(text) or process_of(text) is None


def test_a_process_with_thousands_of_descriptors() -> None:
    script = "import os; [os.dup(0) for _ in range(900)]; print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        process = Process.read(child.pid)
        assert process is not None
        assert len(process.file_descriptors() or ()) > 900
        assert socket_inodes(child.pid) == {}
        child.kill()


def test_each_costs_the_others_nothing() -> None:
    one, other = os.pipe()

    def look(item: int) -> int:
        if item % 10 == 3:
            os.read(one, 1)
        return 10 // item

    got = list(bounded.each(look, range(40), soft=0.01, hard=0.2))
    os.close(other)
    assert [item for item, _ in got] == list(range(40))
    for item, result in got:
        if item % 10 == 3:
            assert isinstance(result, TimeoutError)
        elif item == 0:
            assert isinstance(result, ZeroDivisionError)
        else:
            assert result == 10 // item


def test_one_that_is_only_slow_is_waited_for() -> None:
    one, other = os.pipe()
    os.set_blocking(other, True)

    def look(item: int) -> bytes:
        if item == 0:
            return os.read(one, 1)
        if item == 2:
            os.write(other, b"x")
        return b""

    got = dict(bounded.each(look, range(3), soft=0.01, hard=20))
    assert got == {0: b"x", 1: b"", 2: b""}
    os.close(one)
    os.close(other)


def test_who_was_killed_is_ending_before_it_has_ended() -> None:
    assert not is_ending(os.getpid())
    with subprocess.Popen(["sleep", "100"]) as child:
        assert not is_ending(child.pid)
        child.kill()
        assert is_ending(child.pid), "from the signal on, to the zombie that nobody has waited for"
        child.wait()
        assert not is_ending(child.pid), "there is none"
