"""QEMU's dirty tracking of VGA while slots of the screen come and go.

QEMU reads the dirty log of a slot before it deletes it; under a strategy the slot is there for some
time more, and what is written then must be seen as well.  The control is an interposer that forgets
it: the screen must be wrong then, or this shows nothing.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
from pathlib import Path

import pytest

from qmp_memlistener.guests import GuestSpec, launch
from qmp_memlistener.qmp import Monitor
from qmp_memlistener.steer import OBJECT, Mode
from tests.support.host import patience
from tests.support.live import qmp, skip_without_kvm
from tests.support.steer import NEEDS, STEERED, Faults, build_bios, build_shared, preloaded

pytestmark = [
    *NEEDS,
    pytest.mark.asyncio,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]
_MANUAL_PROTECT = 168  # with it KVM has all pages of a new slot dirty
_FLIPS, _DONE, _WANTED, _STAND, _STANDS, _PIXELS = 0x9000, 0x9004, 0x9008, 0x900C, 0x9010, 0x9100
_PAGES = 16
_WIDTH = 256
_ROUNDS = 12


class _Guest:
    """What it does is in steer_screen.S."""

    def __init__(self, ram: int, monitor: Monitor, image: Path) -> None:
        self._ram = ram
        self._monitor = monitor
        self._image = image

    async def wrong_pages(self, turn: int) -> int:
        """A pass over the screen while SMRAM is flipped; how many pages are not as shown."""
        self._put(_WANTED, turn)
        await self._until(_DONE, turn)
        self._put(_STAND, 1)
        await self._until(_STANDS, 1)
        pixels = os.pread(self._ram, _PAGES, _PIXELS)
        shown = await self._shown()
        self._put(_STAND, 0)
        await self._until(_STANDS, 0)
        return sum(a != b for a, b in zip(pixels, shown, strict=True))

    async def _shown(self) -> bytes:
        await self._monitor.execute("screendump", {"filename": str(self._image)})
        header, _, rest = self._image.read_bytes().partition(b"\n255\n")
        assert header == b"P6\n256 256", header
        return bytes(rest[page * 16 * _WIDTH * 3] >> 2 for page in range(_PAGES))

    async def _until(self, at: int, value: int) -> None:
        async with asyncio.timeout(patience(20)):
            while self.get(at) != value:  # noqa: ASYNC110 (no event)
                await asyncio.sleep(0.001)

    def get(self, at: int) -> int:
        (value,) = struct.unpack("<I", os.pread(self._ram, 4, at))
        return int(value)

    def _put(self, at: int, value: int) -> None:
        os.pwrite(self._ram, struct.pack("<I", value), at)


async def _wrong_pages(mode: Mode, interposer: Path, directory: Path, rounds: int) -> int:
    skip_without_kvm(STEERED[-1], "kvm")
    faults = Faults(directory, without=_MANUAL_PROTECT)
    env = preloaded(mode, faults.object, interposer=interposer) | faults.env
    bios = build_bios("steer_screen", directory)
    args = ("-bios", str(bios), "-nodefaults", "-device", "VGA,romfile=")
    spec = GuestSpec(machine="pc", accel="kvm", memory=64 << 20, smp=2, args=args, env=env)
    async with launch(spec.on(STEERED[-1])) as machine, qmp(machine.monitors[0]) as monitor:
        assert machine.ram is not None
        ram = os.open(machine.ram, os.O_RDWR)
        try:
            guest = _Guest(ram, monitor, directory / "screen.ppm")
            wrong = 0
            for turn in range(1, rounds + 1):
                wrong += await guest.wrong_pages(turn)
                if wrong and interposer is not OBJECT:
                    break  # that was to be shown
            assert guest.get(_FLIPS) >= turn
            return wrong
        finally:
            os.close(ram)


@pytest.mark.parametrize(
    "mode",
    [Mode.INHIBIT, *(pytest.param(m, marks=pytest.mark.full) for m in (Mode.PAUSE, Mode.HOLE))],
)
async def test_the_screen_shows_what_was_written(mode: Mode, tmp_path: Path) -> None:
    assert await _wrong_pages(mode, OBJECT, tmp_path, _ROUNDS) == 0


async def test_it_would_not_if_dirty_bits_were_lost(tmp_path: Path) -> None:
    source = OBJECT.with_name("interposer.c").read_text()
    saves = "if (!set_dirty || "
    assert source.count(saves) == 1
    forgetful = tmp_path / "forgetful.c"
    forgetful.write_text(source.replace(saves, "if (1 || "))
    options = (f"-I{OBJECT.parent}", "-fvisibility=hidden")
    interposer = build_shared(forgetful, tmp_path, *options)
    assert await _wrong_pages(Mode.INHIBIT, interposer, tmp_path, 10 * _ROUNDS) > 0
