"""The Linux guest's image: finding it, and the parts of the build that need no packages."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qmp_memlistener.errors import InputError, MissingPrerequisite
from qmp_memlistener.guests.linux import LinuxImage
from tools.kernel_modules import Modules, in_order
from tools.releases import Broken

SCRIPT = Path(__file__).resolve().parents[2] / "vm-images" / "linux" / "build.py"


def described(home: Path, **changes: object) -> None:
    """An image as build.py leaves it."""
    home.mkdir(parents=True)
    for name in ("vmlinuz", "initramfs"):
        (home / name).touch()
    known: dict[str, object] = {
        "label": "6.1",
        "release": "6.1.0-50-cloud-amd64",
        "version": "6.1.176-1",
        "kernel": str(home / "vmlinuz"),
        "initramfs": str(home / "initramfs"),
        "modules": ["virtio", "virtio_mem"],
        "builtin": [],
        "pulse": True,
        "why_no_pulse": None,
        "recipe": "00",
    }
    (home / "linux.json").write_text(json.dumps({**known, **changes}))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QMP_MEMLISTENER_LINUX", str(tmp_path / "linux"))
    return tmp_path / "linux"


def test_an_image_is_found(cache: Path) -> None:
    described(cache / "6.1")
    image = LinuxImage.find()
    assert (image.label, image.version, image.modules) == (
        "6.1",
        "6.1.176-1",
        ("virtio", "virtio_mem"),
    )
    assert image.kernel == cache / "6.1" / "vmlinuz"
    assert image.has_pulse


def test_an_image_without_pulse_says_why(cache: Path) -> None:
    described(cache / "6.1", pulse=False, why_no_pulse="no C compiler")
    image = LinuxImage.find("6.1")
    assert (image.has_pulse, image.why_no_pulse) == (False, "no C compiler")


def test_no_image(cache: Path) -> None:
    with pytest.raises(MissingPrerequisite, match=r"6\.12 is not in") as caught:
        LinuxImage.find("6.12")
    assert "build.py 6.12" in (caught.value.remedy or "")
    described(cache / "6.1")
    (cache / "6.1" / "initramfs").unlink()
    with pytest.raises(MissingPrerequisite, match="initramfs is missing"):
        LinuxImage.find()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"label": 1}'])
def test_a_description_that_is_none(cache: Path, text: str) -> None:
    described(cache / "6.1")
    (cache / "6.1" / "linux.json").write_text(text)
    with pytest.raises(InputError, match="does not describe the Linux guest"):
        LinuxImage.find()


def test_a_machine_without_apt_is_told_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dir", str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (4, "")
    assert "apt-get is missing" in done.stdout


def test_usage() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "2.4"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "unknown kernel 2.4, known: 6.1, 6.12" in done.stderr


def test_a_module_comes_after_what_it_needs() -> None:
    code = {
        "virtio_net": b"\0license=GPL\0depends=net_failover,virtio-ring\0name=virtio_net\0",
        "net_failover": b"\0depends=failover\0",
        "failover": b"\0depends=\0",
        "virtio_ring": b"\0depends=\0",
    }
    assert in_order(["virtio_ring", "virtio_net"], code) == [
        "virtio_ring",
        "failover",
        "net_failover",
        "virtio_net",
    ]
    with pytest.raises(Broken, match="does not tell"):
        in_order(["x"], {"x": b""})


def test_modules_have_the_kernels_names_and_are_unpacked(tmp_path: Path) -> None:
    (tmp_path / "drivers").mkdir()
    (tmp_path / "drivers" / "virtio-rng.ko.xz").write_bytes(lzma.compress(b"\0depends=\0"))
    (tmp_path / "virtio.ko").write_bytes(b"plain")
    modules = Modules(tmp_path)
    assert (modules["virtio_rng"], modules["virtio"]) == (b"\0depends=\0", b"plain")
    assert "virtio_mem" not in modules
    with pytest.raises(Broken, match="no module virtio_mem"):
        in_order(["virtio_mem"], modules)
