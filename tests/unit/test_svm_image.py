"""The SVM guest's image: finding it, and the parts of the build that need no packages."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qmp_memlistener.errors import InputError, MissingPrerequisite
from tests.support.svm import SvmImage
from tools.private_apt import Unavailable
from tools.releases import Broken

SCRIPT = Path(__file__).resolve().parents[2] / "vm-images" / "svm" / "build.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """build.py as a module."""
    spec = importlib.util.spec_from_file_location("svm_build", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def described(home: Path, **changes: object) -> None:
    """An image as build.py leaves it."""
    home.mkdir(parents=True)
    for name in ("vmlinuz", "initramfs"):
        (home / name).touch()
    known: dict[str, object] = {
        "label": "6.12",
        "release": "6.12.95+deb12-cloud-amd64",
        "version": "6.12.95-1~bpo12+1",
        "kernel": str(home / "vmlinuz"),
        "initramfs": str(home / "initramfs"),
        "modules": ["irqbypass", "kvm", "kvm_amd"],
        "builtin": ["virtio_pci"],
        "magic": "a70d0d0a",
        "recipe": "00",
    }
    (home / "svm.json").write_text(json.dumps({**known, **changes}))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QMP_MEMLISTENER_SVM", str(tmp_path / "svm"))
    return tmp_path / "svm"


def test_an_image_is_found(cache: Path) -> None:
    described(cache / "6.12")
    image = SvmImage.find("6.12")
    assert (image.label, image.release) == ("6.12", "6.12.95+deb12-cloud-amd64")
    assert (image.kernel, image.initramfs) == (
        cache / "6.12" / "vmlinuz",
        cache / "6.12" / "initramfs",
    )
    assert image.magic == b"\xa7\r\r\n"


def test_no_image(cache: Path) -> None:
    with pytest.raises(MissingPrerequisite, match=r"the SVM guest 6\.1 is not in") as caught:
        SvmImage.find("6.1")
    assert "python vm-images/svm/build.py 6.1" in (caught.value.remedy or "")
    described(cache / "6.1")
    (cache / "6.1" / "vmlinuz").unlink()
    with pytest.raises(MissingPrerequisite, match="vmlinuz is missing"):
        SvmImage.find("6.1")


@pytest.mark.parametrize("changes", [{"magic": None}, {"magic": "xyz"}, {"kernel": 1}])
def test_a_description_that_is_none(cache: Path, changes: dict[str, object]) -> None:
    described(cache / "6.12", **changes)
    with pytest.raises(InputError, match="does not describe the SVM guest"):
        SvmImage.find("6.12")


def built(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    """A run of the script that finds programs in `path` alone."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": str(path)},
    )


def test_a_machine_without_apt_is_told_so(tmp_path: Path) -> None:
    done = built("--dir", str(tmp_path / "cache"), "6.1", "6.12", path=tmp_path)
    assert (done.returncode, done.stderr) == (4, "")
    assert done.stdout.count("not available here: apt-get is missing") == 2


def test_usage(tmp_path: Path) -> None:
    done = built("2.4", path=tmp_path)
    assert done.returncode == 2
    assert "unknown kernel 2.4, known: 6.1, 6.12" in done.stderr
    assert built("--list", "--dir", str(tmp_path / "none"), path=tmp_path).returncode == 0
    assert not (tmp_path / "none").exists()


def test_what_is_kept_of_the_standard_library(script: ModuleType, tmp_path: Path) -> None:
    for name in (
        *("os.py", "json/decoder.py", "test/test_os.py", "turtle.py", "LICENSE.txt"),
        *("lib-dynload/mmap.cpython-311-x86_64-linux-gnu.so",),
        *("lib-dynload/_ssl.cpython-311-x86_64-linux-gnu.so", "json/test/x.py"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [str(p) for p in script.kept_of_stdlib(tmp_path)] == [
        "json/decoder.py",
        "json/test/x.py",
        "lib-dynload/mmap.cpython-311-x86_64-linux-gnu.so",
        "os.py",
    ]


def test_a_library_that_no_package_has(script: ModuleType, tmp_path: Path) -> None:
    place = tmp_path / "usr" / script.LIBS
    place.mkdir(parents=True)
    (place / "libffi.so.8").touch()
    assert script.library(tmp_path, "libffi.so.8") == place / "libffi.so.8"
    with pytest.raises(Broken, match=r"hold no libc\.so\.6"):
        script.library(tmp_path, "libc.so.6")


def test_no_package_index(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of pip's many words the reason stays; the exit code is that of a missing archive."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(Unavailable, match=r"pip cannot download msgspec>=0.19 for Python 3\.11"):
        script.unpack_wheel(tmp_path / "wheel", tmp_path / "site")
