"""Files of our state: odd ones never make us wait, and are never more than no note."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from qmp_memlistener.host import directory as directory_module
from qmp_memlistener.host.directory import (
    LONGEST,
    HeldFile,
    StateDirectory,
    set_lock,
    try_lock,
)
from tests.support.strangers import STRANGER, acting_as, needs_root

pytestmark = pytest.mark.usefixtures("shm")


def test_a_note_is_replaced_whole(place: StateDirectory) -> None:
    assert place.read("note") is None
    place.write("note", b"a long text")
    place.write("note", b"text")
    assert place.read("note") == b"text"
    assert place.names() == ["note"]
    assert stat.S_IMODE(os.stat(f"{place.path}/note").st_mode) == 0o600
    assert place.has("note")
    place.remove("note")
    place.remove("note")
    assert not place.has("note")


def odd_fifo(path: Path) -> None:
    os.mkfifo(path)


def odd_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def odd_link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "victim")


def odd_directory(path: Path) -> None:
    (path / "in").mkdir(parents=True)


def odd_huge(path: Path) -> None:
    with path.open("wb") as f:
        f.truncate(40 << 30)


ODD = [odd_fifo, odd_socket, odd_link, odd_directory, odd_huge]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.timeout(20)
def test_what_is_no_note_is_none_and_makes_room(
    place: StateDirectory, shm: Path, odd: Callable[[Path], None]
) -> None:
    victim = shm / "victim"
    victim.write_text("precious")
    for name in ("note", "note.new", "held", "live", "sub"):
        odd(Path(place.path, name))
    assert place.read("note") is None
    assert place.hold("none", create=False) is None
    assert not place.is_attended("live")
    place.write("note", b"text")
    assert place.read("note") == b"text"
    with place.hold("held") or pytest.fail("somebody holds it") as held:
        assert held.read() == b""
        held.write(b"ours")
        assert held.read() == b"ours"
        assert place.hold("held") is None
    handle = place.attend("live")
    assert place.is_attended("live")
    os.close(handle)
    sub = place.subdirectory("sub")
    assert sub is not None
    sub.write("note", b"text")
    assert victim.read_text() == "precious"
    assert sorted(os.listdir(shm)) == [os.path.basename(place.path), "victim"]


@needs_root
def test_a_strangers_file_in_our_directory_is_no_note(place: StateDirectory) -> None:
    """As if we could be made to link one there."""
    Path(place.path, "note").write_bytes(b"forged")
    os.chown(f"{place.path}/note", STRANGER, STRANGER)
    assert place.read("note") is None


def test_what_others_do_to_the_path_does_not_matter(place: StateDirectory, shm: Path) -> None:
    os.rename(place.path, shm / "elsewhere")
    (shm / "victim").mkdir()
    os.symlink(shm / "victim", place.path)
    place.write("note", b"text")
    held = place.hold("held")
    assert held is not None
    assert os.listdir(shm / "victim") == []
    assert sorted(os.listdir(shm / "elsewhere")) == ["held", "note"]
    held.remove()
    assert os.listdir(shm / "elsewhere") == ["note"]


def test_one_holds_it_and_the_next_finds_what_it_wrote(place: StateDirectory) -> None:
    assert place.hold("note", create=False) is None
    assert place.names() == []
    first = place.hold("note")
    assert first is not None
    first.write(b"a long text")
    first.write(b"text")
    assert place.hold("note") is None
    first.close()
    second = place.hold("note", create=False)
    assert second is not None
    with second:
        assert second.read() == b"text"
        second.write(b"x" * (LONGEST + 1))
        assert second.read() == b""
    assert place.has("note")


def test_it_is_removed_once(place: StateDirectory) -> None:
    first = place.hold("note")
    assert first is not None
    first.remove()
    second = place.hold("note")
    assert second is not None
    first.remove()
    assert place.has("note")
    place.remove("note")
    second.remove()
    second.close()


def test_one_that_was_removed_meanwhile_is_not_held(
    place: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = directory_module.try_lock

    def removed_first(handle: int, *, shared: bool = False) -> bool:
        monkeypatch.setattr(directory_module, "try_lock", lock)
        place.remove("note")
        return lock(handle, shared=shared)

    monkeypatch.setattr(directory_module, "try_lock", removed_first)
    held = place.hold("note")
    assert isinstance(held, HeldFile)
    assert place.has("note")
    assert place.hold("note") is None
    held.remove()


def test_several_attend_and_a_reader_cannot_pretend_to(place: StateDirectory) -> None:
    assert not place.is_attended("live")
    one, two = place.attend("live"), place.attend("live")
    os.close(one)
    assert place.is_attended("live")
    os.close(two)
    assert not place.is_attended("live")
    if os.geteuid() != 0:
        return
    with acting_as(STRANGER):
        handle = os.open(f"{place.path}/live", os.O_RDONLY)
    set_lock(handle, fcntl.F_RDLCK, 0)
    try_lock(handle)
    assert not place.is_attended("live")
    os.close(place.attend("live"))
    os.close(handle)


@pytest.mark.timeout(60)
def test_random_bytes_and_entries_are_never_more_than_no_note(place: StateDirectory) -> None:
    """A bounded fuzz: whatever lies there, every access returns, and a note can be written."""
    dice = random.Random(1)
    for _ in range(150):
        path = Path(place.path, "note")
        what = dice.randrange(7)
        if what < len(ODD):
            ODD[what](path)
        else:
            path.write_bytes(dice.randbytes(dice.choice((0, 1, 100, LONGEST, LONGEST + 1))))
            path.chmod(dice.choice((0o600, 0o644, 0o200 if os.geteuid() == 0 else 0o600)))
        content = place.read("note")
        assert content is None or len(content) <= LONGEST
        held = place.hold("note", create=bool(dice.randrange(2)))
        if held is not None:
            held.read()
            held.close()
        place.write("note", b"text")
        assert place.read("note") == b"text"
        place.remove("note")
    assert place.names() == []
