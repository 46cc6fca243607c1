"""`show --from`: the JSON contract, every form of `info mtree`, bad input."""

from __future__ import annotations

import io
import json
import sys
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any

import pytest

from qmp_memlistener.topology import read_map
from tests.unit.cli.cli_support import RamMap, check_types, process, run, sample_outputs, tree

RANGE = {
    "start": int,
    "size": int,
    "kind": str,
    "name": str,
    "offset": int,
    "owner": (str, NoneType),
    "memslot": bool,
}
BLOCK = {"name": str, "owner": (str, NoneType), "mapped": list, "holes": list}
MAPPED = {"start": int, "size": int, "offset": int}
HOLE = {
    "block": str,
    "start": int,
    "size": int,
    "offset": int,
    "covered_by": (str, NoneType),
    "owner": (str, NoneType),
}
DOCUMENT = {
    "schema": int,
    "address_space": str,
    "ranges": list,
    "ram_blocks": list,
    # beyond the bare contract
    "rendered": bool,
    "ambiguous": list,
    "unresolved": list,
}
KINDS = {"ram", "rom", "romd", "ramd", "i/o"}
MACHINES = [
    "7.2/pc-plain-tcg-seabios",
    "10.0/q35-root-ports-32-kvm-seabios",
    "10.0/q35-nvdimm-kvm-seabios",
    "11.1/virt-plain-tcg-reset",
    "11.1/microvm-plain-kvm-firmware",
]
SPACE = 1 << 64


def show(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> dict[str, Any]:
    return run(capsys, "show", "--from", path, "--json", *options).document()


def check_document(document: dict[str, Any]) -> None:
    """Keys, types, order: all that the contract says without knowing the input."""
    check_types(document, DOCUMENT)
    assert document["schema"] == 1
    for r in document["ranges"]:
        check_types(r, RANGE)
        assert r["kind"] in KINDS
        assert 0 <= r["start"] < r["start"] + r["size"] <= SPACE
        assert r["offset"] >= 0
    for a, b in pairwise(document["ranges"]):
        assert a["start"] + a["size"] <= b["start"], "in address order, disjoint"
    for block in document["ram_blocks"]:
        check_types(block, BLOCK)
        assert block["mapped"], "a block that is not mapped is not listed"
        for m in block["mapped"]:
            check_types(m, MAPPED)
        for h in block["holes"]:
            check_types(h, HOLE)
            assert h["block"] == block["name"]
            assert any(
                m["start"] <= h["start"] and h["start"] + h["size"] <= m["start"] + m["size"]
                for m in block["mapped"]
            ), "inside the extent"
        for key in ("mapped", "holes"):
            starts = [x["start"] for x in block[key]]
            assert starts == sorted(starts)


@pytest.mark.parametrize("name", MACHINES)
def test_every_form_of_the_text_gives_the_contract(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    files = sample_outputs(tmp_path, name)
    assert len(files) >= 3
    oracle = show(capsys, files["info mtree -f -o"])
    assert oracle["rendered"] is False
    for command, path in files.items():
        document = show(capsys, path)
        check_document(document)
        assert document["rendered"] is (" -f" not in command)
        keys = ["start", "size", "kind", "name", "offset"]
        keys += ["owner"] if "-o" in command else []
        assert [[r[k] for k in keys] for r in document["ranges"]] == [
            [r[k] for k in keys] for r in oracle["ranges"]
        ], command


def test_the_whole_document_of_a_small_map(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = (
        RamMap(0x100000, owner="/objects/m0")
        .cover(0xA0000, 0x20000, "vga-lowmem", owner="vga0")
        .file(tmp_path / "m.txt")
    )
    ram = {"kind": "ram", "name": "pc.ram", "owner": "/objects/m0", "memslot": True}
    assert show(capsys, path) == {
        "schema": 1,
        "address_space": "memory",
        "rendered": True,
        "ranges": [
            {"start": 0, "size": 0xA0000, "offset": 0, **ram},
            {
                "start": 0xA0000,
                "size": 0x20000,
                "kind": "i/o",
                "name": "vga-lowmem",
                "offset": 0,
                "owner": "vga0",
                "memslot": False,
            },
            {"start": 0xC0000, "size": 0x40000, "offset": 0xC0000, **ram},
        ],
        "ram_blocks": [
            {
                "name": "pc.ram",
                "owner": "/objects/m0",
                "mapped": [{"start": 0, "size": 0x100000, "offset": 0}],
                "holes": [
                    {
                        "block": "pc.ram",
                        "start": 0xA0000,
                        "size": 0x20000,
                        "offset": 0xA0000,
                        "covered_by": "vga-lowmem",
                        "owner": "vga0",
                    }
                ],
            }
        ],
        "ambiguous": [],
        "unresolved": [],
    }


def test_numbers_beyond_a_double_and_a_range_of_the_whole_address_space(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "m.txt"
    path.write_text(
        "address-space: memory\n  0000000000000000-ffffffffffffffff (prio 0, i/o): everything\n"
    )
    (r,) = show(capsys, path)["ranges"]
    assert (r["start"], r["size"]) == (0, SPACE)
    path.write_text(tree("fffffffffffff000-ffffffffffffffff (prio 0, ram): top"))
    (r,) = show(capsys, path)["ranges"]
    assert (r["start"], r["size"]) == (SPACE - 0x1000, 0x1000)


def test_one_line_and_nothing_else_on_stdout(tmp_path: Path) -> None:
    path = RamMap(0x100000).file(tmp_path / "m.txt")
    done = process("show", "--from", path, "--json")
    assert done.err == ""
    assert done.out.count("\n") == 1
    check_document(done.document())


def test_lf_and_crlf_are_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    m = RamMap(0x100000).cover(0xA0000, 0x1000, "x")
    crlf, lf = tmp_path / "crlf", tmp_path / "lf"
    crlf.write_bytes(m.text("\r\n").encode())
    lf.write_bytes(m.text("\n").encode())
    assert show(capsys, crlf) == show(capsys, lf)


def test_a_dash_is_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = RamMap(0x100000).text()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    document = run(capsys, "show", "--from", "-", "--json").document()
    assert [r["name"] for r in document["ranges"]] == ["pc.ram"]


def test_another_address_space(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = sample_outputs(tmp_path, "10.0/q35-plain-kvm-reset")
    for command in ("info mtree -o", "info mtree -f -o"):
        document = show(capsys, files[command], "--address-space", "I/O")
        check_document(document)
        assert document["address_space"] == "I/O"
        assert {r["kind"] for r in document["ranges"]} == {"i/o"}
        assert document["ram_blocks"] == []


def test_what_the_text_leaves_open_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "m.txt"
    path.write_text(
        tree(
            "0000000000001000-0000000000002fff (prio 1, i/o): big",
            "0000000000002000-0000000000003fff (prio 1, i/o): late",
            "0000000000010000-0000000000010fff (prio 1, ram): alias a @gone "
            "0000000000000000-0000000000000fff",
        )
    )
    document = show(capsys, path)
    check_document(document)
    assert [sorted(pair) for pair in document["ambiguous"]] == [["big", "late"]]
    assert document["unresolved"] == ["gone"]
    out = run(capsys, "show", "--from", path).out
    assert "whether late or big is in front" in out
    assert "does not describe gone" in out


# -- for people ----------------------------------------------------------------------------


def test_the_tables(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = RamMap(0x100000).cover(0xA0000, 0x20000, "vga", owner="vga0").file(tmp_path / "m.txt")
    done = run(capsys, "show", "--from", path)
    assert (done.code, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    assert ["0x0000000000-0x000009ffff", "640", "KiB", "ram*", "pc.ram"] in lines
    assert ["0x00000a0000-0x00000bffff", "128", "KiB", "i/o", "vga", "vga0"] in lines
    assert ["pc.ram", "0x0000000000-0x00000fffff", "1", "MiB"] in lines
    assert ["hole", "0x00000a0000-0x00000bffff", "128", "KiB", "vga", "vga0"] in lines


@pytest.mark.parametrize("name", ["[bold]x", "[/foo]", "a[red]b[/red]", "[link=x]", ":smile:"])
def test_names_are_shown_as_they_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    """QEMU's names hold brackets (`/machine/unattached/device[6]`), and ids are the user's."""
    path = tmp_path / "m.txt"
    path.write_text(tree(f"0000000000000000-0000000000000fff (prio 0, ram): {name}"))
    done = run(capsys, "show", "--from", path)
    assert (done.code, done.err) == (0, "")
    assert done.out.count(name) == 2


def test_names_do_not_command_the_terminal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "m.txt"
    path.write_text(tree("0000000000000000-0000000000000fff (prio 0, ram): \x1b[2Jx\x9b1m"))
    done = run(capsys, "show", "--from", path)
    assert done.code == 0
    assert "\x1b" not in done.out
    assert "\x9b" not in done.out


def test_a_row_that_is_piped_is_one_line(tmp_path: Path) -> None:
    """For grep: the longest owner stands on the line of its range."""
    path = sample_outputs(tmp_path, "10.0/q35-plain-kvm-reset")["info mtree -o"]
    owners = {r.owner for r in read_map(path.read_text()).view if r.owner is not None}
    out = process("show", "--from", path).out
    longest = max(owners, key=len)
    assert longest in out


# -- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"hello\n", "line 1"),
        (b"\x7fELF\x02\x01\x01\0\0\xff\xfe", "an ELF file"),
        (b"\0" * 100, "is not text"),
        (json.dumps([1, 2]).encode(), "line 1"),
        (tree("nonsense").encode(), "line 3"),
        (RamMap(0x1000).text().encode()[:200], "line"),
        (tree("0000000000000000-0000000000000fff (prio 0, ram): a", space="I/O").encode(),
         'no address space "memory"'),
        (tree("0000000000000000-0000000000000fff (prio " + "9" * 5000 + ", ram): a").encode(),
         "line 3"),
    ],
    ids=["empty", "prose", "binary", "zeros", "json", "nonsense", "cut", "other-space",
         "huge-number"],
)  # fmt: skip
def test_a_file_that_is_not_info_mtree(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, words: str, as_json: bool
) -> None:
    path = tmp_path / "m.txt"
    path.write_bytes(content)
    argv = ["show", "--from", str(path), *(["--json"] if as_json else [])]
    assert words in run(capsys, *argv).refused()


@pytest.mark.parametrize(
    "path", ["/nonexistent/file", "/", "/proc/self/mem", ""], ids=["gone", "dir", "mem", "empty"]
)
def test_a_file_that_cannot_be_read(capsys: pytest.CaptureFixture[str], path: str) -> None:
    assert "cannot be read" in run(capsys, "show", "--from", path).refused()


def test_the_known_address_spaces_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = RamMap(0x1000).file(tmp_path / "m.txt")
    err = run(capsys, "show", "--from", path, "--address-space", "I/O").refused()
    assert '"I/O"' in err
    assert "it has: memory" in err


def test_a_target_or_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = RamMap(0x1000).file(tmp_path / "m.txt")
    assert "TARGET or --from" in run(capsys, "show").refused()
    assert "TARGET or --from" in run(capsys, "show", "/x", "--from", path).refused()
    assert "TARGET" in run(capsys, "show", "--from", path, "--unsafe-flatview").refused()
