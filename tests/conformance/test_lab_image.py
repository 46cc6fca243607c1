"""The committed image of the lab's guests is what its source builds; both sides' numbers agree."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qmp_memlistener.images import find_built_image
from qmp_memlistener.kvmlab import programs

SOURCE = Path(__file__).resolve().parents[2] / "vm-images" / "lab"
IMAGE = SOURCE / "probe.img"
TOOLS = ("make", "as", "objcopy")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (make, binutils)")
def test_the_source_builds_the_committed_image(tmp_path: Path) -> None:
    built = tmp_path / "probe.img"
    done = subprocess.run(
        ["make", "-C", str(SOURCE), f"OUT={built}", f"BUILD={tmp_path / 'build'}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode != 0 and "unrecognized option" in done.stderr:
        pytest.skip(f"this assembler does not know an option: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert built.read_bytes() == IMAGE.read_bytes(), (
        "run `make -C vm-images/lab` and commit the image"
    )


def test_guest_and_host_name_the_same_numbers() -> None:
    found = re.findall(r"^\.set (\w+), (\w+)", (SOURCE / "probe.s").read_text(), re.MULTILINE)
    assert len(found) == 11
    for name, value in found:
        assert getattr(programs, name) == int(value, 0), name


def test_a_checkout_uses_its_own_image() -> None:
    assert find_built_image("lab", "probe.img") == IMAGE
    assert programs.code() == IMAGE.read_bytes()
