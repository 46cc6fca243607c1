"""`info mtree` output as people have it: read as the bare text is, or refused by name."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmp_memlistener.errors import InputError, MtreeError
from qmp_memlistener.inputs import read_dump
from qmp_memlistener.inputs.maps import texts_in
from qmp_memlistener.topology import Dump, parse, read_map

TREE = (
    "address-space: memory\r\n"
    "  0000000000000000-ffffffffffffffff (prio 0, i/o): system\r\n"
    "    0000000000000000-0000000003ffffff (prio 0, ram): alias low @pc.ram "
    "0000000000000000-0000000003ffffff\r\n"
    "    0000000000100000-0000000000100fff (prio 1, i/o): dev owner:{dev id=d0}\r\n"
    "\r\n"
    "address-space: I/O\r\n"
    "  0000000000000000-000000000000ffff (prio 0, i/o): io\r\n"
    "\r\n"
    "memory-region: pc.ram\r\n"
    "  0000000000000000-0000000003ffffff (prio 0, ram): pc.ram\r\n"
    "\r\n"
)
FLAT = (
    "FlatView #0\r\n"
    ' AS "memory", root: system\r\n'
    " Root memory region: system\r\n"
    "  0000000000000000-00000000000fffff (prio 0, ram): pc.ram KVM\r\n"
    "  0000000000100000-0000000000100fff (prio 1, i/o): dev\r\n"
    "  0000000000101000-0000000003ffffff (prio 0, ram): pc.ram @0000000000101000 KVM\r\n"
    "\r\n"
)
WANTED = [(0, 0x100000, "pc.ram"), (0x100000, 0x1000, "dev"), (0x101000, 0x3EFF000, "pc.ram")]
BANNER = "QEMU 7.2.0 monitor - type 'help' for more information\r\n"
GREETING = json.dumps({"QMP": {"version": {"qemu": {"major": 10}}, "capabilities": ["oob"]}})
EVENT = json.dumps({"timestamp": {"seconds": 1}, "event": "RTC_CHANGE", "data": {"offset": 0}})
# what readline sends to a socket while `info mtree` is typed
TYPED = "(qemu) i\x1b[K\x1b[Din\x1b[K\x1b[D\x1b[Dinf\x1b[K\x1b[D\x1b[D\x1b[Dinfo mtree\x1b[K\r\n"


def reply(text: str = TREE, **more: object) -> dict[str, object]:
    return {"return": text, **more}


def quoted(text: str, mark: str) -> str:
    return "".join(f"{mark}{line}".rstrip() + "\n" for line in text.replace("\r", "").split("\n"))


FORMS = {
    "bare": TREE,
    "lf": TREE.replace("\r", ""),
    "no end": TREE.rstrip(),
    "no blank lines": TREE.replace("\r\n\r\n", "\r\n"),
    "monitor": f"{BANNER}(qemu) info mtree\r\n{TREE}(qemu) ",
    "monitor without echo": f"{BANNER}(qemu) {TREE}(qemu) (qemu) ",
    "readline": f"{BANNER}{TYPED}{TREE}(qemu) quit\r\n",
    "several commands": (
        f"{BANNER}(qemu) info version\r\n10.0.2\r\n(qemu) info mtree\r\n{TREE}"
        "(qemu) info mem\r\n0000000000000000-0000000000200000 0000000000200000 -rw\r\n"
        "(qemu) info block\r\nfloppy0: [not inserted]\r\n    Attached to: /machine/x\r\n(qemu) "
    ),
    "tree and flat view": f"(qemu) info mtree\r\n{TREE}(qemu) info mtree -f\r\n{FLAT}(qemu) ",
    "twice": f"(qemu) info mtree\r\n{TREE}(qemu) info mtree\r\n{TREE}(qemu) ",
    "twice, no prompts": TREE + TREE,
    "shell": (
        "root@kvm1:~# virsh qemu-monitor-command vm1 --hmp 'info mtree'\n"
        f"{TREE}\nroot@kvm1:~# exit\nlogout\n"
    ),
    "warning inside": TREE.replace(
        "address-space: I/O", "qemu-system-x86_64: warning: guest is slow\r\naddress-space: I/O"
    ),
    "reply": json.dumps(reply(id="x-1")),
    "pretty reply": json.dumps(reply(id="libvirt-23"), indent=2),
    "QMP session": "\r\n".join(
        [GREETING, '{"execute": "qmp_capabilities"}', '{"return": {}}', EVENT,
         json.dumps(reply()), EVENT, json.dumps({"return": [{"name": "query-status"}]})]
    ),
    "qmp-shell": f"Welcome to the QMP low-level shell!\n(QEMU) {json.dumps(reply())}\n(QEMU) ",
    "qmp-shell of old": f"(QEMU) {reply()!r}\n(QEMU) ",
    "libvirt's log": f"2026-01-01 debug: mon=0x7f reply={json.dumps(reply())}\n",
    "return value": json.dumps(TREE),
    "nested": json.dumps({"jsonrpc": "2.0", "result": {"data": TREE}}),
    "quoted": quoted(TREE, "> "),
    "indented": quoted(TREE, "    "),
    "fenced": f"Here is the map:\n```\n{TREE}```\nthanks\n",
}  # fmt: skip


def shown(dump: Dump) -> list[tuple[int, int, str]]:
    return [(r.start, r.size, r.name) for r in read_map(dump).view]


def write(tmp_path: Path, data: bytes) -> str:
    (tmp_path / "map").write_bytes(data)
    return str(tmp_path / "map")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_bare_text(tmp_path: Path, form: str) -> None:
    dump = read_dump(write(tmp_path, FORMS[form].encode()))
    assert shown(dump) == WANTED
    assert dump.address_spaces.keys() == {"memory", "I/O"}


@pytest.mark.parametrize("form", ["bare", "monitor", "reply"])
@pytest.mark.parametrize(
    "pack",
    [
        lambda t: b"\xef\xbb\xbf" + t.encode(),
        lambda t: t.encode("utf-16"),
        lambda t: b"\xfe\xff" + t.encode("utf-16-be"),
        lambda t: t.encode("utf-16-le"),
        lambda t: gzip.compress(t.encode()),
        lambda t: bz2.compress(t.encode()),
        lambda t: lzma.compress(t.encode()),
        lambda t: gzip.compress(t.encode("utf-16")),
    ],
    ids=["bom", "utf-16", "utf-16-be", "unmarked", "gzip", "bzip2", "xz", "gzip of utf-16"],
)  # fmt: skip
def test_packed_or_in_another_encoding(tmp_path: Path, form: str, pack: object) -> None:
    assert callable(pack)
    assert shown(read_dump(write(tmp_path, pack(FORMS[form])))) == WANTED


def test_a_tree_without_its_address_spaces(tmp_path: Path) -> None:
    """`system` is the root of `memory`."""
    sections = TREE.split("\r\n\r\n")
    text = sections[0].replace("address-space: memory", "memory-region: system")
    dump = read_dump(write(tmp_path, f"{text}\r\n\r\n{sections[2]}\r\n\r\n".encode()))
    assert shown(dump) == WANTED
    with pytest.raises(MtreeError, match="no region `system`"):
        read_dump(write(tmp_path, sections[2].encode()))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("hello\nworld\n", "line 1"),
        (BANNER + "(qemu) info qtree\r\nbus: main\r\n(qemu) ", "a monitor session with info qtree"),
        (json.dumps({"error": {"class": "GenericError", "desc": "no such command"}}),
         "an error reply of QMP: no such command"),
        ("error: Requested operation is not valid: domain is not running\n",
         "an error message: Requested operation"),
        (GREETING + '\n{"return": {}}\n', "a QMP session without"),
        (json.dumps(reply())[:-20], "a string of JSON that is cut off"),
        ('{"type":"header","schema":1}\n', "is a recording"),
        ("9@1.000000:kvm_set_user_memory Slot#0 flags=0x0 gpa=0x0 size=0x0 ua=0x0 ret=0\n",
         "a trace log of QEMU"),
        ('{"schema": 1, "address_space": "memory", "ranges": []}', "JSON output of one of our own"),
        (TREE.replace("(prio 0, ram)", "(prio 0, RW)"), "a QEMU of 2016 or before"),
        (TREE.replace("address-space: memory\r\n", ""), "a region below no heading"),
        (TREE.replace("    0000000000100000", "0000000000100000"), "line 4"),
        (TREE.replace("0000000000100fff", "00000000001"), "line 4"),
        (TREE + TREE.replace("0000000003ffffff", "0000000001ffffff"), "2 maps that differ"),
        (TREE[:-80], "line 9"),
        (TREE[: TREE.index("memory-region") + 7], "the text is cut off"),
    ],
)  # fmt: skip
def test_what_is_no_map_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_dump(write(tmp_path, text.encode()))
    assert words in caught.value.message
    assert str(tmp_path / "map") in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff" * 8 + bytes.fromhex("a429b40acb77b2f2"), "simpletrace.py"),
        (b"\x17\x08\x44tracing6\0", "trace-cmd report"),
        (b"PERFILE2\0\0", "perf script"),
        (b"\x28\xb5\x2f\xfd\0\0", "zstd -d"),
        (b"PK\x03\x04\0", "unpack"),
        (gzip.compress(TREE.encode() * 9)[:-30], "the whole file"),
        (b"abc\0\1\2" * 9, "the text"),
    ],
)
def test_binary_formats_are_named(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_dump(write(tmp_path, data))
    assert words in (caught.value.remedy or "")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "fifo")
    for path, words in ((str(tmp_path / "fifo"), "is empty"), ("/dev/zero", "a device"),
                        (str(tmp_path), "cannot be read")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            read_dump(path)


NOISE = st.sampled_from(
    ["", "$ ls", "(qemu) ", "(qemu) info status", "VM status: running", "```", GREETING, EVENT,
     "qemu: warning: x", "\x1b[2J", "(qemu) info mem", "00-11 rw", '{"return": {}}'],
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(NOISE, max_size=6), st.lists(NOISE, max_size=6), st.sampled_from(["\n", "\r\n"]))
def test_what_is_around_does_not_matter(before: list[str], behind: list[str], end: str) -> None:
    text = end.join([*before, "(qemu) info mtree", TREE.replace("\r\n", end), *behind])
    (found,) = texts_in(text)
    assert shown(parse("\n".join(found.lines))) == WANTED


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab\"\\'{}[]()\n\x1b>: n-", max_size=300), st.integers(0, len(TREE)))
def test_hostile_text_is_read_or_refused(noise: str, at: int) -> None:
    for text in (noise, TREE[:at] + noise + TREE[at:], json.dumps(TREE)[:at] + noise):
        try:
            for found in texts_in(text):
                parse("\n".join(found.lines), first_line=found.first_line)
        except MtreeError as caught:
            error = caught
            assert 1 <= error.line_no <= text.count("\n") + TREE.count("\n") + 1
