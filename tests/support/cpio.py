"""Reading what `cpio` writes, in the way the kernel does."""

from __future__ import annotations

from tools.cpio import Entry

__all__ = ["unpacked"]


def unpacked(archive: bytes) -> list[Entry]:
    """The entries of an archive, without the trailer; asserts that nothing follows that."""
    found = []
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, device, length = fields[1], fields[6], (fields[9], fields[10]), fields[11]
        name = archive[at + 110 : at + 110 + length]
        assert name.endswith(b"\0")
        data_at = (at + 110 + length + 3) & ~3
        data = archive[data_at : data_at + size]
        at = (data_at + size + 3) & ~3
        if name == b"TRAILER!!!\0":
            break
        found.append(Entry(name[:-1].decode(), mode, data, device))
    assert at == len(archive)
    return found
