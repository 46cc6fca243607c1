"""Initramfs archives: what is put in comes out when they are read as the kernel reads them."""

from __future__ import annotations

from tests.support.cpio import unpacked
from tools.cpio import Entry, cpio, directories


def test_everything_comes_out_again() -> None:
    entries = [
        Entry("bin", 0o40755),
        Entry("dev/console", 0o20600, device=(5, 1)),
        Entry("a", 0o100644, b"hello"),
        Entry("lib64", 0o120777, b"/lib"),
        Entry("empty", 0o100600),
    ]
    assert unpacked(cpio(entries)) == entries
    assert len(cpio(entries)) % 4 == 0


def test_a_directory_comes_before_what_is_in_it() -> None:
    made = list(directories(["init", "usr/lib/python/os.pyc", "usr/bin/python", "lib/libc.so"]))
    assert [e.name for e in made] == ["lib", "usr", "usr/bin", "usr/lib", "usr/lib/python"]
    assert {e.mode for e in made} == {0o40755}
