"""The Linux guest's image: finding it, and the parts of the build that need no packages."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest

from qmp_memlistener.errors import InputError, MissingPrerequisite
from qmp_memlistener.guests.linux import LinuxImage

SCRIPT = Path(__file__).resolve().parents[2] / "vm-images" / "linux" / "build.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """build.py as a module."""
    spec = importlib.util.spec_from_file_location("linux_build", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["linux_build"] = module
    spec.loader.exec_module(module)
    return module


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
    with pytest.raises(InputError, match="does not describe a Linux guest"):
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


def test_a_module_comes_after_what_it_needs(script: ModuleType) -> None:
    order = cast("Callable[[Iterable[str], Mapping[str, bytes]], list[str]]", script.in_order)
    code = {
        "virtio_net": b"\0license=GPL\0depends=net_failover,virtio-ring\0name=virtio_net\0",
        "net_failover": b"\0depends=failover\0",
        "failover": b"\0depends=\0",
        "virtio_ring": b"\0depends=\0",
    }
    assert order(["virtio_ring", "virtio_net"], code) == [
        "virtio_ring",
        "failover",
        "net_failover",
        "virtio_net",
    ]
    with pytest.raises(script.Broken, match="does not tell"):
        order(["x"], {"x": b""})


def test_cpio_is_what_the_kernel_reads(script: ModuleType) -> None:
    entry = script.Entry
    archive = cast(
        "bytes",
        script.cpio(
            [
                entry("bin", 0o40755),
                entry("dev/console", 0o20600, device=(5, 1)),
                entry("a", 0o100644, b"hello"),
            ]
        ),
    )
    found = []
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, device, length = fields[1], fields[6], (fields[9], fields[10]), fields[11]
        name = archive[at + 110 : at + 110 + length]
        assert name.endswith(b"\0")
        data_at = (at + 110 + length + 3) & ~3
        found.append((name[:-1], mode, device, archive[data_at : data_at + size]))
        at = (data_at + size + 3) & ~3
        if name == b"TRAILER!!!\0":
            break
    assert at == len(archive)
    assert found[:-1] == [
        (b"bin", 0o40755, (0, 0), b""),
        (b"dev/console", 0o20600, (5, 1), b""),
        (b"a", 0o100644, (0, 0), b"hello"),
    ]
