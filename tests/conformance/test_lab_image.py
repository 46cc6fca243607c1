"""The committed image of the lab's guests is what its source builds; both sides' numbers agree."""

from __future__ import annotations

import re
from pathlib import Path

from qmp_memlistener.guests.images import find_built_image
from qmp_memlistener.kvmlab import programs
from tests.support.images import check_image

SOURCE = Path(__file__).resolve().parents[2] / "vm-images" / "lab"
IMAGE = SOURCE / "probe.img"


def test_the_source_builds_the_committed_image(tmp_path: Path) -> None:
    check_image(IMAGE, tmp_path)


def test_guest_and_host_name_the_same_numbers() -> None:
    found = re.findall(r"^\.set (\w+), (\w+)", (SOURCE / "probe.s").read_text(), re.MULTILINE)
    assert len(found) == 11
    for name, value in found:
        assert getattr(programs, name) == int(value, 0), name


def test_a_checkout_uses_its_own_image() -> None:
    assert find_built_image("lab", "probe.img") == IMAGE
    assert programs.code() == IMAGE.read_bytes()
