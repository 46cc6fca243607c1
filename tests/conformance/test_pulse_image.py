"""The committed pulse image is what its source builds, and both boot ways find what they need."""

from __future__ import annotations

from pathlib import Path

from qmp_memlistener.guests import find_image
from qmp_memlistener.guests.pulse_memory import MAGIC
from tests.support.images import check_image

SOURCE = Path(__file__).resolve().parents[2] / "vm-images" / "pulse"
IMAGE = SOURCE / "pulse.img"


def test_the_source_builds_the_committed_image(tmp_path: Path) -> None:
    check_image(IMAGE, tmp_path)


def test_a_checkout_uses_its_own_image() -> None:
    assert find_image() == IMAGE


def test_the_image_is_a_disk_and_a_rom() -> None:
    image = IMAGE.read_bytes()
    assert len(image) == 1 << 16  # -bios takes multiples of 64 KiB
    assert image[510:512] == b"\x55\xaa"
    assert image[0xFFF0] in (0xE9, 0xEB)  # the reset vector jumps
    assert image.count(MAGIC) == 1
