"""Slot operations in every form that logs have: the same lines give the same operations."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmp_memlistener.errors import InputError
from qmp_memlistener.inputs import read_trace_line
from qmp_memlistener.qmp.trace_lines import TraceDecoder
from qmp_memlistener.records import SlotOp
from qmp_memlistener.tracking.logs import read_log

Op = tuple[int, int, int, int, int, int, int]  # as_id, slot, flags, gpa, size, ua, ret

UA = 0x7F00_0000_0000
OPS: tuple[Op, ...] = (
    (0, 0, 0, 0, 0xA0000, UA, 0),
    (0, 1, 2, 0xC0000, 0x20000, UA + (1 << 32), 0),
    (1, 0, 4, 0xE0000, 0x100000, UA + 0xE0000, 0),
    (0, 2, 1, 1 << 32, 1 << 30, UA + (1 << 36), -17),
    (0, 1, 0, 0xC0000, 0, UA + (1 << 32), 0),
)


def old(op: Op) -> str:
    as_id, slot, flags, gpa, size, ua, ret = op
    return (
        f"kvm_set_user_memory Slot#{as_id << 16 | slot} flags={flags:#x} gpa={gpa:#x} "
        f"size={size:#x} ua={ua:#x} ret={ret}"
    )


def new(op: Op) -> str:
    as_id, slot, flags, gpa, size, ua, ret = op
    return (
        f"kvm_set_user_memory AddrSpace#{as_id} Slot#{slot} flags={flags:#x} gpa={gpa:#x} "
        f"size={size:#x} ua={ua:#x} guest_memfd=-1 guest_memfd_offset=0x0 ret={ret}"
    )


def downstream(op: Op) -> str:
    return new(op).replace(" guest_memfd=-1 guest_memfd_offset=0x0", "") + (
        " restricted_fd=9 restricted_offset=0x0"
    )


def simpletrace(op: Op) -> str:
    as_id, slot, flags, gpa, size, ua, ret = op
    return (
        f"kvm_set_user_memory 90.500 pid=700 as={as_id:#x} slot={slot:#x} flags={flags:#x} "
        f"guest_phys_addr={gpa:#x} memory_size={size:#x} userspace_addr={ua:#x} fd=0xffffffff "
        f"fd_offset=0x0 ret={ret & 0xFFFFFFFF:#x}"
    )


def simpletrace_old(op: Op) -> str:
    as_id, slot, flags, gpa, size, ua, ret = op
    return (
        f"kvm_set_user_memory 0.000 pid=700 slot={as_id << 16 | slot:#x} flags={flags:#x} "
        f"guest_phys_addr={gpa:#x} memory_size={size:#x} userspace_addr={ua:#x} "
        f"ret={ret & 0xFFFFFFFFFFFFFFFF:#x}"
    )


def lttng(op: Op) -> str:
    as_id, slot, flags, gpa, size, ua, ret = op
    return (
        "[18:17:24.100000000] (+0.000001) host1 qemu:kvm_set_user_memory: { cpu_id = 1 }, "
        f"{{ as = {as_id}, slot = {slot}, flags = {flags}, guest_phys_addr = {gpa}, memory_size = "
        f"{size}, userspace_addr = {ua}, fd = 4294967295, fd_offset = 0, ret = {ret} }}"
    )


def perf(op: Op) -> str:
    as_id, slot, flags, gpa, size, ua, ret = op
    numbers = (as_id, slot, flags, gpa, size, ua, -1, 0, ret)
    told = " ".join(f"arg{i}={n}" for i, n in enumerate(numbers, 1))
    return f" qemu-system-x86 700 [001] 900.1: sdt_qemu:kvm_set_user_memory: (55d0c0de) {told}"


def perf_old(op: Op) -> str:
    as_id, slot, flags, gpa, size, ua, ret = op
    numbers = (as_id << 16 | slot, flags, gpa, size, ua, ret & 0xFFFFFFFFFFFFFFFF)
    told = " ".join(f"arg{i}={n:#x}" for i, n in enumerate(numbers, 1))
    return f" qemu-system-x86 700/700 [001] 900.1: sdt_qemu:kvm_set_user_memory: (55d0) {told}"


BODIES: dict[str, Callable[[Op], str]] = {
    f.__name__: f
    for f in (old, new, downstream, simpletrace, simpletrace_old, lttng, perf, perf_old)
}
WRAPS: dict[str, Callable[[str], str]] = {
    "bare": lambda t: t,
    "stamped": lambda t: f"700@1689000000.100000:{t}",
    "stamped, 10.1": lambda t: f"2026-01-13T18:17:24.123456Z {t}",
    "journald short": lambda t: f"Jan 13 18:17:24 host1 qemu-system-x86_64[71]: {t}",
    "short-iso": lambda t: f"2026-01-13T18:17:24+0100 host1 qemu-system-x86_64[71]: {t}",
    "short-precise": lambda t: f"Jan 13 18:17:24.123456 host1 libvirtd[71]: {t}",
    "short-monotonic": lambda t: f"[  900.123456] host1 qemu[71]: {t}",
    "journald json": lambda t: json.dumps({"_PID": "71", "MESSAGE": t, "PRIORITY": "6"}),
    "json-pretty": lambda t: f'\t"MESSAGE" : {json.dumps(t)},',
    "export": lambda t: f"MESSAGE={t}",
    "rsyslog": lambda t: f"<30>1 2026-01-13T18:17:24.1Z host1 qemu 71 - - {t}",
    "ftrace": lambda t: f" qemu-system-x86-71  [001] ....1  900.1: tracing_mark_write: {t}",
    "trace-cmd": lambda t: f" qemu-system-x86-71    [001]   900.1: print:  tracing_mark_write: {t}",
    "systemtap": lambda t: f"700@1689000000100000000 {t}",
    "docker": lambda t: json.dumps({"log": t + "\n", "stream": "stderr", "time": "2026"}),
    "CRI": lambda t: f"2026-01-13T18:17:24.123456789Z stderr F {t}",
    "console before": lambda t: f"[    0.000000] Linux version {t}",
    "quoted": lambda t: f"> {t}",
}


def text(body: str, wrap: str, end: str = "\n") -> bytes:
    return "".join(WRAPS[wrap](BODIES[body](op)) + end for op in OPS).encode()


def read(tmp_path: Path, data: bytes) -> list[Op]:
    """What the file says; the size of a slot that goes is what the tracker knew, not the line."""
    (tmp_path / "log").write_bytes(data)
    found = read_log(str(tmp_path / "log"))
    assert all("7.2 is assumed" in text for text in found.remarks.texts())
    ops = [op for commit in found.commits for op, _ in commit]
    return [
        (o.as_id, o.slot, o.flags, o.gpa, 0 if o.op == "delete" else o.size, o.hva or 0, o.ret)
        for o in ops
    ]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("body", BODIES)
def test_every_form_gives_the_same_operations(tmp_path: Path, body: str, wrap: str) -> None:
    assert read(tmp_path, text(body, wrap)) == list(OPS)


@pytest.mark.parametrize("body", ["old", "simpletrace", "downstream"])
def test_whatever_the_file_is_packed_in(tmp_path: Path, body: str) -> None:
    plain = text(body, "ftrace", "\r\n")
    for data in (plain, gzip.compress(plain), plain.decode().encode("utf-16"),
                 b"\xef\xbb\xbf" + plain):  # fmt: skip
        assert read(tmp_path, data) == list(OPS)


@pytest.mark.parametrize("body", ["old", "new", "downstream"])
def test_the_decoder_of_live_logs_says_the_same(body: str) -> None:
    records = TraceDecoder().feed(text(body, "stamped"), 1)
    assert all(isinstance(r, SlotOp) for r in records)
    assert [
        (r.as_id, r.slot, r.flags, r.gpa, r.size, r.hva, r.ret)
        for r in records
        if isinstance(r, SlotOp)
    ] == list(OPS)


def test_operations_of_several_processes_are_not_mixed(tmp_path: Path) -> None:
    line = WRAPS["journald short"](old(OPS[0]))
    (tmp_path / "log").write_text(f"{line}\n{line.replace('[71]', '[72]')}\n")
    with pytest.raises(InputError, match=r"2 processes \(71, 72\)"):
        read_log(str(tmp_path / "log"))


def test_a_form_that_is_not_known_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("hello\nqemu:::kvm_set_user_memory slot=1 gpa=0x0\n")
    with pytest.raises(InputError, match=r"line 2 .*kvm_set_user_memory slot=1") as caught:
        read_log(str(tmp_path / "log"))
    assert "simpletrace.py" in (caught.value.remedy or "")


def test_commits_are_marked_in_every_form(tmp_path: Path) -> None:
    for view in ("flatview_new 0x55d0 (root 0x55d1)",
                 "flatview_new 0.1 pid=700 view=0x55d0 root=0x55d1",
                 "sdt_qemu:flatview_new: (55d) arg1=0x55d0 arg2=0x55d1"):  # fmt: skip
        lines = [view, new(OPS[0]), view, new(OPS[1]), new(OPS[2])]
        (tmp_path / "log").write_text("\n".join(lines) + "\n")
        found = read_log(str(tmp_path / "log"))
        assert [len(commit) for commit in found.commits] == [1, 2], view


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=40).filter(lambda b: b"\n" not in b),
    st.sampled_from(sorted(BODIES)),
    st.sampled_from(OPS),
)
def test_any_prefix(prefix: bytes, body: str, op: Op) -> None:
    told = read_trace_line(prefix + BODIES[body](op).encode() + b"\n")
    assert told is not None
    assert (told.as_id, told.slot, told.flags, told.gpa, told.size, told.ua, told.ret) == op


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_hostile_lines_do_not_raise(junk: bytes, cut: bool) -> None:
    for line in (junk, b"kvm_set_user_memory " + junk, new(OPS[0]).encode() + junk):
        told = read_trace_line(line, cut=cut)
        if told is not None and told.usable:
            assert told.slot <= 0xFFFF
            assert 0 <= told.gpa < 1 << 64
