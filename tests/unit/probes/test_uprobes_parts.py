"""The parts of the uprobes probe that need no kernel: records, floors, shares, names, functions."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.errors import MissingPrerequisite
from qmp_memlistener.host.elf import read_elf
from qmp_memlistener.memslots import OpKind
from qmp_memlistener.probes import StallKind
from qmp_memlistener.probes.uprobes.calls import CommandSpan, Site, Window
from qmp_memlistener.probes.uprobes.decode import Decoder, Hit
from qmp_memlistener.probes.uprobes.functions import (
    ROLES,
    SYMBOLS,
    Func,
    Group,
    Point,
    kinds_of,
    missing_kinds,
    points_of,
    resolve_roles,
)
from qmp_memlistener.probes.uprobes.observing import (
    FLOOR_NS,
    QUERY_FLOOR_NS,
    Observer,
    Strings,
    ThreadNames,
)
from qmp_memlistener.probes.uprobes.perf import ARCHITECTURES
from qmp_memlistener.probes.uprobes.probe import Governor
from qmp_memlistener.probes.uprobes.windows import SLOT_IOCTLS, Windows
from qmp_memlistener.qmp.guest import GuestVcpu
from qmp_memlistener.records import SlotOp

ENTRY = Point(Func.SLOT_IOCTL, Group.ALWAYS, 0)
RETURN = Point(Func.SLOT_IOCTL, Group.ALWAYS, 0, True)
POINTS = {1: ENTRY, 2: RETURN}
TID = 77

# -- records -------------------------------------------------------------------------------------


def sample(ident: int, t_ns: int, registers: dict[str, int], stack: bytes | None = None) -> bytes:
    order = ("ax", "cx", "dx", "si", "di", "sp", "r8")
    body = struct.pack("<QIIQQ", ident, TID - 1, TID, t_ns, 2)
    body += struct.pack("<7Q", *(registers.get(name, 0) for name in order))
    if stack is not None:
        body += struct.pack("<Q", 64) + stack.ljust(64, b"\xee") + struct.pack("<Q", len(stack))
    return record(9, body)


def record(kind: int, body: bytes) -> bytes:
    return struct.pack("<IHH", kind, 0, 8 + len(body)) + body


def decoded(data: bytes) -> list[Hit]:
    return Decoder(ARCHITECTURES["x86_64"]).decode(data, TID, POINTS, 9999).hits


def test_registers_become_arguments_result_and_stack() -> None:
    registers = {"di": 1, "si": 2, "dx": 3, "cx": 4, "r8": 5, "ax": 6, "sp": 7}
    entry, back = decoded(sample(1, 100, registers, b"abc") + sample(2, 101, registers))
    assert entry == Hit(100, TID, ENTRY, (1, 2, 3, 4, 5), 7, 6, b"abc")
    assert back == Hit(101, TID, RETURN, (1, 2, 3, 4, 5), 7, 6, b"")


def test_a_gap_stands_before_the_hit_that_follows_it() -> None:
    lost = record(2, struct.pack("<QQ", 1, 42))
    decoder = Decoder(ARCHITECTURES["x86_64"])
    found = decoder.decode(sample(1, 5, {}) + lost + sample(1, 6, {}) + lost, TID, POINTS, 9)
    assert [(h.t_ns, h.point is None) for h in found.hits] == [
        (5, False),
        (6, True),
        (6, False),
        (9, True),
    ]
    assert found.lost == 84


def test_threads_that_come_and_go_and_throttling() -> None:
    clone = record(7, struct.pack("<IIIIQ", 70, 70, 78, 77, 1))
    fork = record(7, struct.pack("<IIIIQ", 90, 70, 90, 77, 1))
    exit_ = record(4, struct.pack("<IIIIQ", 70, 70, 77, 70, 1))
    throttle = record(5, struct.pack("<QQQ", 1, 1, 1))
    found = Decoder(ARCHITECTURES["x86_64"]).decode(clone + fork + exit_ + throttle, TID, {}, 9)
    assert (found.started, found.ended, found.throttled) == ([78], [77], 1)
    assert [h.point for h in found.hits] == [None]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 100), st.booleans())))
def test_every_record_of_ours_is_decoded(records: list[tuple[int, int, bool]]) -> None:
    data = b"".join(
        sample(ident, t, {"sp": t}, b"x" * 8 if stack else None) for ident, t, stack in records
    )
    found = decoded(data)
    assert [(h.t_ns, h.point) for h in found] == [
        (t, POINTS[i]) for i, t, _ in records if i in POINTS
    ]


COMMIT = Point(Func.COMMIT, Group.ALWAYS, 4)
COMMITTED = Point(Func.COMMIT, Group.ALWAYS, 4, True)
ALL_POINTS = {**POINTS, 3: COMMIT, 4: COMMITTED}

_call = st.tuples(st.just("call"), st.integers(1, 2 * FLOOR_NS), st.integers(0, 3))
_slot = st.tuples(st.just("slot"), st.integers(1, 1000), st.integers(0, 3))
_lost = st.tuples(st.just("lost"), st.integers(1, 9), st.integers(0, 3))


def _records(steps: list[tuple[str, int, int]]) -> bytes:
    """Commits `outer` of which enclose what follows, slot updates, and gaps."""
    data, t, sp, ends = b"", 0, 4096, []
    for what, length, outer in steps:
        t += 1
        if what == "lost":
            data += record(2, struct.pack("<QQ", 1, length))
            continue
        ids, registers = (3, 4), {"sp": sp}
        slot = b""
        if what == "slot":
            ids = (1, 2)
            registers |= {"si": SLOT_IOCTLS[0], "dx": sp}
            slot = struct.pack("<IIQQQ", 5, 0, 0, length, 0)
        data += sample(ids[0], t, registers, slot or None)
        if what == "call" and outer == 3:
            ends.append(sp)
            sp -= 64
        else:
            t += length
            data += sample(ids[1], t, {"sp": sp + 8})
            if outer == 2 and ends:
                sp = ends.pop()
                t += length
                data += sample(4, t, {"sp": sp + 8})
    return data


@given(st.lists(st.one_of(_call, _call, _slot, _lost), max_size=60))
def test_short_calls_that_become_one_hit_tell_the_same(steps: list[tuple[str, int, int]]) -> None:
    data = _records(steps)
    told = []
    for floor_ns in (0, FLOOR_NS):
        decoder = Decoder(ARCHITECTURES["x86_64"], floor_ns)
        hits = decoder.decode(data, TID, ALL_POINTS, 1 << 40, decoder.calls_of(3, 4)).hits
        windows = Windows(TID, hit_ns=3)
        windows.thread(TID, 0)
        for hit in hits:
            windows.feed(hit)
        observer = Observer("uprobes", ThreadNames(0), {})
        observer.add_short_commits(*windows.take_short())
        found = observer.observe(windows.take()[0], Strings.__new__(Strings))
        counted = sum(hit.calls * 2 or 1 for hit in hits if hit.point is not None)
        told.append((found, observer.counts(), counted))
    assert told[0] == told[1]


def test_thirty_short_commits_are_one_hit() -> None:
    data = _records([("call", 100, 0)] * 30)
    decoder = Decoder(ARCHITECTURES["x86_64"], FLOOR_NS)
    (hit,) = decoder.decode(data, TID, ALL_POINTS, 9, decoder.calls_of(3, 4)).hits
    assert (hit.calls, hit.result) == (30, 3000)


# -- functions -----------------------------------------------------------------------------------


def test_no_function_that_may_switch_coroutines_has_its_return_probed() -> None:
    assert {role for role, info in ROLES.items() if info.returns} == {
        Func.COMMIT,
        Func.SLOT_IOCTL,
        Func.INHIBIT_BEGIN,
        Func.PAUSE,
        Func.RESUME,
        Func.BQL_LOCK,
        Func.COND_WAIT,
        Func.COND_TIMEDWAIT,
    }


def test_names_of_old_and_new_qemu() -> None:
    old = resolve_roles({"qemu_mutex_lock_iothread_impl": 1, "qemu_mutex_unlock_iothread": 2})
    assert old[Func.BQL_LOCK] == ("qemu_mutex_lock_iothread_impl", 1)
    new = resolve_roles({"qemu_mutex_lock_iothread_impl": 1, "bql_lock_impl": 3})
    assert new[Func.BQL_LOCK] == ("bql_lock_impl", 3)


def test_a_missing_function_costs_its_kinds_only() -> None:
    offsets = {name: i for i, name in enumerate(SYMBOLS)}
    assert missing_kinds(resolve_roles(offsets)) == {}
    del offsets["qemu_cond_wait_impl"], offsets["accel_ioctl_inhibit_end"]
    roles = resolve_roles(offsets)
    assert missing_kinds(roles) == {
        StallKind.BQL_HOLD: "qemu_cond_wait_impl",
        StallKind.VCPU_INHIBIT: "accel_ioctl_inhibit_end",
    }
    assert StallKind.BQL_WAIT in kinds_of(roles)


def test_a_return_is_probed_before_its_entry() -> None:
    roles = resolve_roles({name: i for i, name in enumerate(SYMBOLS)})
    for group in Group:
        seen: set[Func] = set()
        for point in points_of(roles, group):
            assert point.is_return or not ROLES[point.role].returns or point.role in seen
            seen.add(point.role)


# -- the program file ----------------------------------------------------------------------------


def test_exported_functions_are_found(tmp_path: Path) -> None:
    elf = read_elf(f"/proc/{os.getpid()}/exe", ["main", "no_such_function", "_start"])
    assert "no_such_function" not in elf.offsets
    with pytest.raises(MissingPrerequisite, match="cannot be read"):
        read_elf(str(tmp_path / "absent"), [])
    for text in (b"", b"#!/bin/sh\n", b"\x7fELF" + bytes(60), b"\x7fELF\x02\x01\x01" + bytes(9)):
        (tmp_path / "text").write_bytes(text)
        with pytest.raises(MissingPrerequisite):
            read_elf(str(tmp_path / "text"), ["main"])


@given(st.binary(min_size=1, max_size=40), st.integers(16, 400))
def test_a_damaged_program_file_is_an_error_of_ours(noise: bytes, at: int) -> None:
    path = Path(f"/dev/shm/qmp-memlistener-elf-{os.getpid()}")
    with open(sys.executable, "rb") as file:
        head = bytearray(file.read(4096))
    head[at : at + len(noise)] = noise
    path.write_bytes(head)
    try:
        read_elf(str(path), ["main"])
    except MissingPrerequisite:
        pass
    finally:
        path.unlink()


# -- shares --------------------------------------------------------------------------------------


def test_a_peak_is_borne_and_a_second_too_much_is_not() -> None:
    governor = Governor(0.1, hit_ns=1000, start_ns=0)
    step = 250_000_000
    too_many, few = 50_000, 1000  # 20 % and 0.4 %
    assert [governor.add(i * step, too_many) for i in range(1, 5)] == [False] * 4
    assert governor.share == pytest.approx(0.2)
    assert not governor.add(5 * step, few)
    assert [governor.add(i * step, too_many) for i in range(6, 11)] == [False] * 4 + [True]


# -- what is told --------------------------------------------------------------------------------


class FewStrings(Strings):
    """Two commands and a source file, of no process."""

    def __init__(self) -> None:
        self.known = {1: "query-status", 2: "device_add"}

    def command(self, info: int) -> str | None:
        return self.known.get(info)

    def site(self, site: Site) -> str | None:
        return f"a.c:{site.line}"


def window(kind: StallKind, length: int, **rest: object) -> Window:
    fields: dict[str, object] = {"at_least_ns": length, **rest}
    return Window(kind, os.getpid(), 1000, 1000 + length, **fields)  # type: ignore[arg-type]  # mixed


def test_short_windows_are_counted_and_not_told() -> None:
    observer = Observer("uprobes", ThreadNames(os.getpid()), {StallKind.BQL_WAIT: 50})
    update = SlotOp(t_ns=0, as_id=0, slot=1, op=OpKind.DELETE, gpa=0, size=0, flags=0, hva=0)
    found = observer.observe(
        [
            window(StallKind.COMMIT, 10),
            window(StallKind.COMMIT, 20, updates=1),
            window(StallKind.COMMIT, FLOOR_NS),
            window(StallKind.COMMIT, FLOOR_NS, inner=True),
            window(StallKind.SLOT_UPDATE, 1, update=update),
            window(StallKind.BQL_WAIT, 49),
            window(StallKind.BQL_WAIT, 51, site=Site(1, 8)),
            window(StallKind.BQL_HOLD, FLOOR_NS - 1),
            window(StallKind.VCPU_PAUSE, 1, handoffs=3),
        ],
        FewStrings(),
    )
    assert [(o.kind, o.at_most_ns, o.thread, o.site) for o in found] == [
        (StallKind.COMMIT, 20, "main", None),
        (StallKind.COMMIT, FLOOR_NS, "main", None),
        (StallKind.SLOT_UPDATE, 1, "main", None),
        (StallKind.BQL_WAIT, 51, "main", "a.c:8"),
        (StallKind.VCPU_PAUSE, 1, None, None),
    ]
    assert observer.counts() == {
        "short_commit": 1,
        "short_commit_ns": 10,
        "short_bql_wait": 1,
        "short_bql_wait_ns": 49,
        "short_bql_hold": 1,
        "short_bql_hold_ns": FLOOR_NS - 1,
    }


def test_questions_are_told_when_they_took_long() -> None:
    observer = Observer("uprobes", ThreadNames(os.getpid()), {})
    long = QUERY_FLOOR_NS
    commands = [
        CommandSpan(i, 5, 5 + took) for i, took in ((1, 9), (1, long), (2, 9), (3, 9), (0, 9))
    ]
    found = observer.commands(commands, FewStrings())
    assert [(c.name, c.busy_until_ns - c.start_ns) for c in found] == [
        ("query-status", long),
        ("device_add", 9),
        ("hmp", 9),
    ]


def test_threads_are_called_after_their_vcpus() -> None:
    names = ThreadNames(1)
    names.learn_vcpus([GuestVcpu(0, 500), GuestVcpu(2, 501), GuestVcpu(1, 501)])
    assert [names[tid] for tid in (1, 500, 501, 502)] == ["main", "CPU 0", "CPU 1,2", "tid 502"]
