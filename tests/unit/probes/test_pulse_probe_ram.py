"""Finding the guest's RAM, and reading gaps out of it, where the test plays the guest."""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmp_memlistener.errors import InputError
from qmp_memlistener.guests import Gap, PulseMemory, layout
from qmp_memlistener.guests.pulse_memory import MAGIC
from qmp_memlistener.probes.pulse_clock import Anchor, Bounds
from qmp_memlistener.probes.pulse_guest import GuestFollower
from qmp_memlistener.probes.pulse_ram import named_file, parse_maps

MAPS = """\
55d0c0000000-55d0c0400000 r--p 00000000 fe:01 1234    /usr/bin/qemu-system-x86_64
7f0000000000-7f0000200000 rw-s 00000000 00:1a 77      /dev/shm/guest ram (1)
7f0000200000-7f0004000000 rw-s 00200000 00:1a 77      /dev/shm/guest ram (1)
7f0004000000-7f0008000000 rw-s 10000000 00:1a 77      /dev/shm/guest ram (1)
7f0010000000-7f0010100000 rw-s 00000000 00:01 78      /dev/shm/too-small
7f0020000000-7f0024000000 rw-s 00000000 00:01 79      /memfd:memory-backend-memfd (deleted)
7f0030000000-7f0034000000 r--s 00000000 00:01 80
7f0040000000-7f0044000000 rw-p 00000000 00:00 0
not a mapping
"""


def test_shared_mappings_are_found_whatever_they_are_called() -> None:
    found = [(m.start, m.end, m.offset, m.inode, m.path) for m in parse_maps(MAPS)]
    shm = "/dev/shm/guest ram (1)"
    assert found == [
        (0x7F0000000000, 0x7F0004000000, 0, 77, shm),
        (0x7F0004000000, 0x7F0008000000, 0x10000000, 77, shm),
        (0x7F0020000000, 0x7F0024000000, 0, 79, "/memfd:memory-backend-memfd (deleted)"),
        (0x7F0030000000, 0x7F0034000000, 0, 80, ""),
    ]
    # the name is that of the first piece: the kernel knows no other
    assert parse_maps(MAPS)[0].entry == "7f0000000000-7f0000200000"


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("memory-backend-file,id=m,share=on,mem-path=/x/a,,b,size=64M", "/x/a,b"),
        ("memory-backend-file,id=m,share=off,mem-path=/x,size=64M", None),
        ("memory-backend-file,id=m,mem-path=/x,size=64M", None),
        ("memory-backend-ram,id=m,share=on,size=64M", None),
        ('{"qom-type":"memory-backend-file","id":"m","mem-path":"/x","share":true}', "/x"),
        ('{"qom-type":"memory-backend-file","id":"m","mem-path":"/x"}', None),
        ('{"qom-type":', None),
    ],
)
def test_the_command_line_names_shared_files(value: str, path: str | None) -> None:
    assert named_file(value) == path


class Guest:
    """Writes what a CPU would, into a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.block = layout.BLOCKS
        self.word = layout.CPU_ALIVE | 1 << 32
        self.gaps = 0
        with open(path, "wb") as file:
            file.truncate(layout.RAM_NEEDED)
        self.put64(layout.HEADER + layout.H_CPU, self.word)

    def put64(self, at: int, *values: int) -> None:
        with open(self.path, "r+b") as file:
            file.seek(at)
            file.write(struct.pack(f"<{len(values)}Q", *values))

    def gap(self, end_tsc: int, ticks: int = 100) -> None:
        at = self.block + layout.GAP_RING + 32 * (self.gaps % layout.GAP_ENTRIES)
        self.gaps += 1
        self.put64(at, end_tsc, ticks, 1000 + self.gaps, self.gaps)
        self.put64(self.block + layout.HB_LAST_TSC, end_tsc)
        self.put64(self.block + layout.HB_GAPS, self.gaps)

    def restart(self, tsc: int, high: int = 0) -> None:
        self.gaps = 0
        if high & layout.PLACE_DATA:
            self.block = layout.BLOCKS + layout.HIGH_OFFSET
        self.put64(self.block + layout.HB_GAPS, 0)
        self.put64(self.block + layout.HB_RESET_TSC, tsc)
        self.word = (self.word >> 32) + 1 << 32 | layout.CPU_ALIVE | high
        self.put64(layout.HEADER + layout.H_CPU, self.word)


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path / "ram")


@pytest.fixture
def memory(guest: Guest) -> Iterator[PulseMemory]:
    with PulseMemory(guest.path) as memory:
        yield memory


def test_a_look_gives_what_is_new(guest: Guest, memory: PulseMemory) -> None:
    for n in range(5):
        guest.gap(1000 * (n + 1))
    look = memory.look(0, 3)
    assert look is not None
    assert look.gaps == (Gap(4000, 100, 1004), Gap(5000, 100, 1005))
    assert (look.lost, look.beat.gaps, look.beat.last_tsc) == (0, 5, 5000)
    again = memory.look(0, 5)
    assert again is not None
    assert again.gaps == ()


def test_what_the_ring_holds_no_more_is_counted(guest: Guest, memory: PulseMemory) -> None:
    for n in range(300):
        guest.gap(1000 * (n + 1))
    look = memory.look(0, 100)
    assert look is not None
    assert [g.end_tsc for g in look.gaps] == [1000 * n for n in range(174, 301)]
    assert look.lost == 300 - 100 - 127


@pytest.mark.parametrize("high", [0, layout.PLACE_DATA])
def test_gaps_from_before_a_restart_are_still_found(
    guest: Guest, memory: PulseMemory, high: int
) -> None:
    guest.restart(1)
    for n in range(3):
        guest.gap(1000 * (n + 1))
    look = memory.look(0)
    assert look is not None
    guest.gap(4000)
    guest.gap(5000)
    guest.restart(5500, high)
    assert [g.end_tsc for g in memory.gaps_before_restart(0, look.beat, 5500)] == [4000, 5000]
    guest.gap(6000)
    assert [g.end_tsc for g in memory.gaps_before_restart(0, look.beat, 5500)] == [4000, 5000]
    now = memory.look(0)
    assert now is not None
    assert [g.end_tsc for g in now.gaps] == [6000]


def test_entries_of_other_times_are_not_taken_for_gaps_before_a_restart(
    guest: Guest, memory: PulseMemory
) -> None:
    guest.restart(1)
    guest.gap(1000)
    guest.gap(2000)
    guest.restart(2500)
    look = memory.look(0)
    assert look is not None
    guest.restart(3500)
    # entry 1 is of the time before both restarts
    assert memory.gaps_before_restart(0, look.beat, 3500) == ()
    guest.gap(4000)
    assert memory.gaps_before_restart(0, look.beat, 3500) == ()


def test_gaps_after_a_reset_of_the_tsc_are_not_told_by_the_old_clock(
    guest: Guest, memory: PulseMemory
) -> None:
    """Under TCG a reset sets the TSC to 0: the new boot's TSCs were there before, long ago."""
    guest.put64(layout.HEADER, int.from_bytes(MAGIC, "little"), layout.LAYOUT_VERSION | 2 << 32)
    guest.put64(layout.HEADER + layout.H_EXPECTED, 1 | 1 << 32)
    guest.restart(500)
    guest.gap(900_000)
    follower = GuestFollower(memory, "pulse")
    assert follower.poll().gaps == []
    now = time.monotonic_ns()
    for n in range(4):  # a tick is a ns
        anchor = Anchor(1_000_000 + n * 50_000, Bounds(now + n * 50_000, now + n * 50_000 + 10))
        assert follower._clock.add(anchor) == 0
    guest.gap(1_200_000)
    assert follower.poll().gaps == []  # no beat after it has a time yet
    guest.restart(100)
    guest.gap(950_000)
    (told,) = follower.poll().gaps
    assert abs(told.end_ns - (now + 200_000)) < 10_000
    assert follower.poll().gaps == []


def test_the_tsc_is_read_where_the_cpu_beats(guest: Guest, memory: PulseMemory) -> None:
    guest.gap(1000)
    low = memory.tsc_reader(0)
    assert low() == 1000
    guest.restart(1500, layout.PLACE_DATA)
    guest.gap(2000)
    assert low() == 1000
    assert memory.tsc_reader(0)() == 2000


def test_memory_that_is_only_read_is_never_opened_for_writing_nor_mapped(guest: Guest) -> None:
    guest.path.chmod(0o400)
    with PulseMemory(guest.path) as memory:
        memory.look(0)
        flags = fcntl.fcntl(memory._fd, fcntl.F_GETFL)
        assert flags & os.O_ACCMODE == os.O_RDONLY
        assert str(guest.path) not in Path("/proc/self/maps").read_text()


def test_a_file_that_is_truncated_meanwhile_is_an_error_and_no_signal(
    guest: Guest, memory: PulseMemory
) -> None:
    guest.gap(1000)
    read = memory.tsc_reader(0)
    assert memory.look(0) is not None
    os.truncate(guest.path, layout.HEADER)
    assert read() in (0, 1000)  # nothing that beats
    for ask in (
        memory.header,
        lambda: memory.look(0),
        lambda: memory.heartbeat(0),
        lambda: memory.gaps(0),
        memory.toggle_writes,
        GuestFollower(memory, "pulse").poll,
    ):
        with pytest.raises(InputError, match="truncated"):
            ask()
    os.truncate(guest.path, layout.RAM_NEEDED)
    assert memory.header() is None
    memory.close()
    memory.close()


def test_ram_may_begin_later_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(layout.RAM_NEEDED))
    with open(path, "r+b") as file:
        file.truncate(layout.RAM_NEEDED + 0x10000)
        file.seek(0x10000 + layout.HEADER)
        file.write(b"QMPPULSE")
    with PulseMemory(path) as memory:
        assert memory.header() is None
    with PulseMemory(path, offset=0x10000) as memory:
        assert memory.header() is not None
    with pytest.raises(InputError, match="smaller"):
        PulseMemory(path, offset=0x20000)
