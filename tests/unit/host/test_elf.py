"""Program files that say of themselves what no linker wrote: refused, in little time and memory."""

from __future__ import annotations

import _ctypes
import struct
import tracemalloc
from pathlib import Path

import pytest
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from hypothesis import given, settings
from hypothesis import strategies as st

from qmp_memlistener.errors import MissingPrerequisite
from qmp_memlistener.host.elf import read_elf

LIBRARY = Path(_ctypes.__file__)
NAME = "PyInit__ctypes"
GNU_HASH, PLAIN_HASH = 0x6FFFFEF5, 4


def places() -> tuple[int, int]:
    """Offsets of the dynamic entry that names the hash table, and of the table."""
    with LIBRARY.open("rb") as file:
        elf = ELFFile(file)
        dynamic = next(s for s in elf.iter_segments("PT_DYNAMIC"))
        assert isinstance(dynamic, DynamicSegment)
        _, table = dynamic.get_table_offset("DT_GNU_HASH")
        assert table is not None
        for index, tag in enumerate(dynamic.iter_tags()):
            if tag.entry.d_tag == "DT_GNU_HASH":
                return int(dynamic["p_offset"]) + 16 * index, table
    raise AssertionError("no hash table")


def write(path: Path, *, at: int, what: bytes, tag: int = GNU_HASH) -> str:
    data = bytearray(LIBRARY.read_bytes())
    entry, table = places()
    struct.pack_into("<Q", data, entry, tag)
    data[table + at : table + at + len(what)] = what
    path.write_bytes(data)
    return str(path)


def refused(path: str) -> str:
    tracemalloc.start()
    try:
        with pytest.raises(MissingPrerequisite) as error:
            read_elf(path, [NAME, "no_such_function"])
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
    finally:
        tracemalloc.stop()
    return error.value.message


def test_the_library_itself_is_read() -> None:
    assert NAME in read_elf(str(LIBRARY), [NAME, "no_such_function"]).offsets


@pytest.mark.parametrize("tag", [GNU_HASH, PLAIN_HASH])
def test_tables_of_2_to_the_32_entries(tmp_path: Path, tag: int) -> None:
    path = write(tmp_path / "elf", at=0, what=b"\xff" * 4, tag=tag)
    with open(path, "r+b") as file:
        file.truncate(40 << 30)  # sparse: every entry is there to be read
    assert "larger than any program's" in refused(path)


def test_a_bloom_filter_of_2_to_the_32_words(tmp_path: Path) -> None:
    path = write(tmp_path / "elf", at=8, what=b"\xff" * 4)
    with open(path, "r+b") as file:
        file.truncate(40 << 30)
    assert "larger than any program's" in refused(path)


def test_a_chain_that_leads_back_to_itself(tmp_path: Path) -> None:
    buckets, chain = struct.pack("<II", 1, 2), struct.pack("<II", 0, 1)
    table = buckets + struct.pack("<I", 1) + chain
    assert "larger than any program's" in refused(
        write(tmp_path / "elf", at=0, what=table, tag=PLAIN_HASH)
    )


@settings(max_examples=30)
@given(data=st.data())
def test_whatever_a_file_says_nothing_else_is_raised(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(LIBRARY.read_bytes())
    entry, table = places()
    spots = st.sampled_from([0, 16, 32, 54, entry, entry + 8, table, table + 16])
    for start in data.draw(st.lists(spots, min_size=1, max_size=3)):
        at = start + data.draw(st.integers(0, 15))
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("elf") / "elf"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        read_elf(str(path), [NAME, "no_such_function"])
    except MissingPrerequisite:
        pass
