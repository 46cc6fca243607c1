"""The pulse guest's layout on both sides, and reading its memory when it is full or torn.

The memory here is written by the test, because a running guest does not overwrite its rings on
request; everything else about the guest is tested on QEMU (tests/live/test_pulse*.py).
"""

from __future__ import annotations

import asyncio
import itertools
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmp_memlistener.errors import DeadlineExceeded, InputError, OperationFailed
from qmp_memlistener.guests import Gap, High, PciAddress, Pulse, TscClock, layout
from qmp_memlistener.guests.pulse_memory import MAGIC

SOURCE = Path(__file__).resolve().parents[2] / "vm-images" / "pulse" / "layout.inc"
BLOCK0 = layout.BLOCKS


def numbers_of_the_guest() -> dict[str, int]:
    found = re.findall(r"^\.set (\w+), (\w+)$", SOURCE.read_text(), re.MULTILINE)
    return {name: int(value, 0) for name, value in found}


def numbers_of_the_host() -> dict[str, int]:
    return {k: v for k, v in vars(layout).items() if k.isupper() and isinstance(v, int)}


def test_guest_and_host_name_the_same_numbers() -> None:
    assert numbers_of_the_guest() == numbers_of_the_host()


def test_every_line_of_the_source_is_a_number_or_a_comment() -> None:
    for line in SOURCE.read_text().splitlines():
        assert re.fullmatch(r"(\.set \w+, \w+|#.*|)", line), line


def test_places_do_not_overlap() -> None:
    # Page tables: PML4, PDPT and four PDs.
    places = sorted(
        [
            (0x7C00, 0x200),
            (layout.CODE_BASE, 0x3000),
            (layout.HEADER, 0x1000),
            (layout.BLOCKS, layout.MAX_CPUS * layout.BLOCK_SIZE),
            (layout.TABLES, 6 * 0x1000),
        ]
    )
    ends = [start + size for start, size in places]
    assert all(end <= start for end, (start, _) in zip(ends, places[1:], strict=False))
    assert ends[-1] <= 0x9FC00  # the BIOS keeps the rest below 640 KiB
    assert layout.HIGH_OFFSET >= 0x100000
    assert ends[-1] + layout.HIGH_OFFSET <= layout.RAM_NEEDED


def test_parts_of_a_block_do_not_overlap() -> None:
    def span(prefix: str) -> tuple[int, int]:
        offsets = [v for k, v in numbers_of_the_host().items() if k.startswith(prefix)]
        return min(offsets), max(offsets) + 8

    parts = [
        span("HB_"),
        (layout.GAP_RING, layout.GAP_RING + 32 * layout.GAP_ENTRIES),
        span("MB_"),
        span("TG_"),
        (layout.MAILBOX + 0x1000, layout.STACK_END),
        (layout.TOGGLE_RING, layout.TOGGLE_RING + 16 * layout.TOGGLE_ENTRIES),
    ]
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(parts))
    assert parts[-1][1] == layout.BLOCK_SIZE


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    """RAM of a guest with one CPU that has stopped to do anything."""
    path = tmp_path / "ram"
    image = bytearray(layout.RAM_NEEDED)
    image[layout.HEADER : layout.HEADER + 8] = MAGIC
    numbers = (layout.LAYOUT_VERSION, layout.STATE_READY, 1, 1, 1, layout.BY_ROM)
    struct.pack_into("<6I", image, layout.HEADER + layout.H_VERSION, *numbers)
    state = 1 << 32 | layout.CPU_ALIVE
    struct.pack_into("<Q", image, layout.HEADER + layout.H_CPU, state)
    path.write_bytes(image)
    return path


@pytest.fixture
def pulse(ram: Path) -> Iterator[Pulse]:
    with Pulse(ram) as opened:
        yield opened


def put(ram: Path, offset: int, form: str, *values: int) -> None:
    with open(ram, "r+b") as file:
        file.seek(offset)
        file.write(struct.pack(form, *values))


def put_gap(ram: Path, number: int) -> None:
    at = BLOCK0 + layout.GAP_RING + 32 * (number % layout.GAP_ENTRIES)
    put(ram, at, "<4Q", 1000 + number, number, 7 * number, number + 1)


def test_gaps_come_oldest_first(ram: Path, pulse: Pulse) -> None:
    for number in range(3):
        put_gap(ram, number)
    put(ram, BLOCK0 + layout.HB_GAPS, "<Q", 3)
    log = pulse.gaps()
    assert log.gaps == (Gap(1000, 0, 0), Gap(1001, 1, 7), Gap(1002, 2, 14))
    assert log.lost == 0


def test_a_full_gap_ring_gives_all_but_the_entry_that_may_be_written_now(
    ram: Path, pulse: Pulse
) -> None:
    total = layout.GAP_ENTRIES + 5
    for number in range(total):
        put_gap(ram, number)
    put(ram, BLOCK0 + layout.HB_GAPS, "<Q", total)
    log = pulse.gaps()
    assert [g.ticks for g in log.gaps] == list(range(6, total))
    assert log.lost == 6


def test_toggle_writes_from_a_given_number_on(ram: Path, pulse: Pulse) -> None:
    total = layout.TOGGLE_ENTRIES + 10
    for index in range(total):
        at = BLOCK0 + layout.TOGGLE_RING + 16 * (index % layout.TOGGLE_ENTRIES)
        put(ram, at, "<QII", 5000 + index, index, 0x30 * (index & 1))
    put(ram, BLOCK0 + layout.TG_DONE, "<Q", total)
    late = pulse.toggle_writes(total - 2)
    assert [w.index for w in late.writes] == [total - 2, total - 1]
    assert [w.value for w in late.writes] == [0x00, 0x30]
    assert late.lost == 0
    everything = pulse.toggle_writes()
    assert len(everything.writes) + everything.lost == total
    assert everything.writes[0].begin_tsc == 5000 + everything.lost
    assert pulse.toggle_writes(total).writes == ()


def test_data_is_read_where_the_cpu_beats(ram: Path, pulse: Pulse) -> None:
    put(ram, BLOCK0, "<Q", 11)
    put(ram, BLOCK0 + layout.HIGH_OFFSET, "<Q", 22)
    assert pulse.heartbeat().count == 11
    state = 2 << 32 | layout.CPU_ALIVE | layout.PLACE_DATA | layout.PLACE_TABLES
    put(ram, layout.HEADER + layout.H_CPU, "<Q", state)
    beat = pulse.heartbeat()
    assert beat.count == 22
    assert beat.state.high == High.DATA | High.TABLES
    assert beat.state.generation == 2


@pytest.mark.asyncio
async def test_a_silent_guest_is_a_missed_deadline(pulse: Pulse) -> None:
    with pytest.raises(DeadlineExceeded, match="NOP"):
        await pulse.command(layout.CMD_NOP, timeout=0.05)
    with pytest.raises(DeadlineExceeded, match="earlier command"):
        await pulse.command(layout.CMD_NOP, timeout=0.05)
    with pytest.raises(DeadlineExceeded, match="beats of CPU 0"):
        await pulse.wait_beats(timeout=0.05)


@pytest.mark.asyncio
async def test_a_vcpu_that_the_host_does_not_run_for_a_while_can_be_calibrated(
    ram: Path, pulse: Pulse
) -> None:
    calibrating = asyncio.create_task(pulse.calibrate(0.01))
    await asyncio.sleep(0.3)
    beat = 0
    while not calibrating.done():
        beat += 1
        put(ram, BLOCK0 + layout.HB_LAST_TSC, "<Q", 1_000_000 * beat)
        await asyncio.sleep(0)
    assert (await calibrating).ticks_per_second > 0


@pytest.mark.asyncio
async def test_a_refusal_names_command_and_reason(ram: Path, pulse: Pulse) -> None:
    task = asyncio.create_task(pulse.map_bar(PciAddress(0, 5), 2, 0xFE000000))
    await asyncio.sleep(0)
    put(ram, BLOCK0 + layout.MB_STATUS, "<I", layout.STATUS_NO_DEVICE)
    put(ram, BLOCK0 + layout.MB_ACK, "<I", 1)
    with pytest.raises(OperationFailed, match="refused MAP_BAR: there is no such device"):
        await task


@pytest.mark.asyncio
async def test_numbers_that_do_not_fit_are_not_sent(pulse: Pulse) -> None:
    bridge = PciAddress(0, 0)
    with pytest.raises(ValueError, match="number of 1 bytes"):
        await pulse.write_config(bridge, 0x59, 0x100, 1)
    with pytest.raises(ValueError, match="number of 3 bytes"):
        await pulse.port_out(0x80, 0, 3)
    with pytest.raises(ValueError, match="count"):
        await pulse.toggle(bridge, 0x59, (0, 0x30), 0)
    with pytest.raises(ValueError, match="no CPU 8"):
        pulse.cpu_state(layout.MAX_CPUS)


@pytest.mark.asyncio
async def test_another_layout_is_refused(ram: Path, pulse: Pulse) -> None:
    put(ram, layout.HEADER + layout.H_VERSION, "<I", layout.LAYOUT_VERSION + 1)
    with pytest.raises(OperationFailed, match="another layout"):
        await pulse.wait_ready(timeout=1)


@pytest.mark.asyncio
async def test_missing_cpus_are_told(ram: Path, pulse: Pulse) -> None:
    put(ram, layout.HEADER + layout.H_EXPECTED, "<I", 2)
    with pytest.raises(OperationFailed, match="only 1 of 2 CPUs"):
        await pulse.wait_ready(timeout=1)
    assert (await pulse.wait_ready(cpus=1, timeout=1)).live_cpus == 1


def test_ram_without_a_guest_has_no_header(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(layout.RAM_NEEDED))
    with Pulse(path) as pulse:
        assert pulse.header() is None


def test_ram_too_small_for_the_guest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(4096))
    with pytest.raises(InputError, match="4 MiB"):
        Pulse(path)


def test_clock_converts_both_ways() -> None:
    clock = TscClock(tsc=1_000, monotonic_ns=50_000, ticks_per_second=2e9, error_ns=100)
    assert clock.to_ns(3_000) == 51_000
    assert clock.duration_ns(2_000_000) == 1_000_000
    assert clock.ticks(1_000_000) == 2_000_000


def test_config_address_of_a_function() -> None:
    assert PciAddress(1, 3, 2).config_address(0x5A) == 0x80011A58
    assert str(PciAddress(1, 3, 2)) == "01:03.2"
