"""A process that cannot be looked into is listed with what is known, and the others as ever."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmp_memlistener.qmp import discovery
from qmp_memlistener.qmp.discovery import Guest, find_guest, find_guests
from qmp_memlistener.reports.guests import guest_document
from qmp_memlistener.text import json_bytes


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[int]:
    """A process that the kernel calls qemu-system-x86."""
    path = tmp_path / "qemu-system-x86_64"
    shutil.copy("/bin/sleep", path)
    with subprocess.Popen([path, "60"]) as process:
        yield process.pid
        process.kill()


@pytest.mark.parametrize("hangs", [False, True])
def test_it_is_listed_and_costs_the_others_nothing(
    odd: int, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    never = threading.Event()
    looked = []

    def look(pid: int, *_: object, **__: object) -> Guest | None:
        if pid == odd:
            if hangs:
                never.wait()
            raise ValueError("a name with \udcff")
        looked.append(pid)
        return None

    monkeypatch.setattr(discovery, "_find", look)
    monkeypatch.setattr(discovery, "_HARD_S", 0.3)
    monkeypatch.setattr(discovery, "_ASKED_FOR_S", 0.3)
    (guest,) = [g for g in find_guests() if g.pid == odd]
    assert any(pid > odd for pid in looked) or any(pid < odd for pid in looked)
    (note,) = guest.notes
    assert ("in time" if hangs else "ValueError") in note
    assert not guest.monitors
    assert b"could not be examined" in json_bytes(guest_document(guest))
    again = find_guest(odd)
    assert again is not None
    assert again.notes == guest.notes
    never.set()
