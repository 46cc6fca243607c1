"""The private directory, and files that tell whether their owner lives."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from qmp_memlistener.errors import MissingPrerequisite
from qmp_memlistener.monitor import private_dir
from qmp_memlistener.monitor.private_dir import HeldFile, private_directory, shm_directory


@pytest.fixture(autouse=True)
def shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(private_dir, "SHM", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return tmp_path


def test_the_directory_is_made_when_it_is_needed() -> None:
    with pytest.raises(MissingPrerequisite):
        private_directory(create=False)
    made = private_directory()
    assert made == shm_directory(os.geteuid()) == private_directory(create=False)
    assert not stat.S_IMODE(os.stat(made).st_mode) & 0o022


def test_another_place_will_do(
    shm: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(shm_directory(os.geteuid())).symlink_to(shm)
    with pytest.raises(MissingPrerequisite) as refused:
        private_directory()
    assert refused.value.remedy
    runtime = tmp_path_factory.mktemp("runtime")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    assert private_directory() == str(runtime / "qmp-memlistener")


def test_one_holds_it_and_the_next_finds_what_it_wrote(shm: Path) -> None:
    path = str(shm / "note")
    assert HeldFile.hold(path, create=False) is None
    assert not os.path.exists(path)
    with pytest.raises(OSError, match="none"):
        HeldFile.hold(str(shm / "none" / "note"))
    first = HeldFile.hold(path)
    assert first is not None
    first.write(b"a long text")
    first.write(b"text")
    assert HeldFile.hold(path) is None
    first.close()
    second = HeldFile.hold(path, create=False)
    assert second is not None
    with second:
        assert second.read() == b"text"
    assert os.path.exists(path)


def test_it_is_removed_once(shm: Path) -> None:
    path = str(shm / "note")
    first = HeldFile.hold(path)
    assert first is not None
    first.remove()
    second = HeldFile.hold(path)
    assert second is not None
    first.remove()
    assert os.path.exists(path)
    os.unlink(path)
    second.remove()
    second.close()


def test_one_that_was_removed_meanwhile_is_not_held(
    shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(shm / "note")
    lock = private_dir.try_lock

    def removed_first(handle: int) -> bool:
        monkeypatch.setattr(private_dir, "try_lock", lock)
        os.unlink(path)
        return lock(handle)

    monkeypatch.setattr(private_dir, "try_lock", removed_first)
    held = HeldFile.hold(path)
    assert held is not None
    assert os.path.exists(path)
    assert HeldFile.hold(path) is None
    held.remove()


def test_a_link_is_not_followed(shm: Path) -> None:
    (shm / "victim").write_text("precious")
    (shm / "note").symlink_to(shm / "victim")
    with pytest.raises(OSError, match="symbolic"):
        HeldFile.hold(str(shm / "note"))
