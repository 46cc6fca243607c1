"""What is concluded from a dead guest's registers and the changes of its map before."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest
from msgspec.structs import replace

from qmp_memlistener.agent.failures import FailureWatch
from qmp_memlistener.agent.postmortem import (
    MapChange,
    StoppedVcpu,
    VcpuRegisters,
    explain_reset,
    explain_stop,
    parse_dumps,
    parse_registers,
)
from qmp_memlistener.memslots import OpKind
from qmp_memlistener.qmp import Monitor, MonitorEvent
from qmp_memlistener.records import GuestFailure, GuestReset, Record, SlotOp
from qmp_memlistener.topology import MemoryMap
from tests.support.records import transition

LONG = """\
RAX=00001c22fab53127 RBX=00001c22fab4ce6f RCX=00001c22fab53127 RDX=00001c2200000000
RSI=0000000000100000 RDI=0000000000038000 RBP=0000000000038000 RSP=000000000003c000
R8 =0000000000000001 R9 =0000000000038000 R10=0000000000001106 R11=0000000000000000
R12=0000000000000000 R13=0000000000000000 R14=0000000280000001 R15=0000000000000001
RIP=000000000021035c RFL=00000006 [-----P-] CPL=0 II=0 A20=1 SMM=0 HLT=0
ES =0010 0000000000000000 ffffffff 00c09300 DPL=0 DS   [-WA]
CS =0018 0000000000000000 ffffffff 00a09b00 DPL=0 CS64 [-RA]
LDT=0000 0000000000000000 0000ffff 00008200 DPL=0 LDT
CR0=80000011 CR2=0000000000000000 CR3=0000000000070000 CR4=00000020
DR6=00000000ffff0ff0 DR7=0000000000000400
EFER=0000000000000500
"""
SHORT = """\
EAX=00000000 EBX=00000000 ECX=00000000 EDX=00060fb1
ESI=00000000 EDI=00000000 EBP=00000000 ESP=00000000
EIP=0000fff0 EFL=00000002 [-------] CPL=0 II=0 A20=1 SMM=1 HLT=1
ES =0000 00000000 0000ffff 00009300
CS =f000 ffff0000 0000ffff 00009b00
CR0=60000010 CR2=00000000 CR3=00000000 CR4=00000000
"""
BOTH = f"\nCPU#0\n{LONG}\nCPU#1\n{SHORT}\n".replace("\n", "\r\n")
DIED = 1_000_000_000_000
MIB = 1 << 20


def op(what: str, slot: int, gpa: int, size: int, *, as_id: int = 0, seen: bool = True) -> SlotOp:
    return SlotOp(
        t_ns=DIED,
        as_id=as_id,
        slot=slot,
        op=OpKind(what),
        gpa=gpa,
        size=size,
        flags=0,
        ret=0,
        predicted=not seen,
        transition=1,
    )


def toggle(seq: int, ms_before: float, *, as_id: int = 0, seen: bool = True) -> MapChange:
    """All RAM above 1 MiB goes and comes back in another slot."""
    ops = (
        op("delete", 4, 0xF0000, 0x10000, as_id=as_id, seen=seen),
        op("delete", 5, MIB, 63 * MIB, as_id=as_id, seen=seen),
        op("add", 3, 0xF0000, 63 * MIB + 0x10000, as_id=as_id, seen=seen),
    )
    return MapChange(seq, DIED - round(ms_before * 1e6), ops)


def stopped(
    index: int,
    gpa: int | None,
    *,
    named: bool = False,
    halted: bool = False,
    in_smm: bool = False,
) -> StoppedVcpu:
    ip = 0xFFFF_8000_0000_1000 + index
    return StoppedVcpu(VcpuRegisters(index, ip, ip, in_smm, halted, f"RAX={index}"), gpa, named)


def judged(
    cpus: list[StoppedVcpu], changes: list[MapChange], *, kept_out: bool = False
) -> GuestFailure:
    return explain_stop(
        DIED, cpus, changes, kept_out=kept_out, block_of=lambda gpa: "pc.ram" if gpa else None
    )


def test_registers_of_all_vcpus_are_read() -> None:
    one, other = parse_registers(BOTH)
    assert (one.index, one.ip, one.linear) == (0, 0x21035C, 0x21035C)
    assert not one.in_smm
    assert not one.halted
    assert (other.index, other.ip, other.linear) == (1, 0xFFF0, 0xFFFF_FFF0)
    assert other.in_smm
    assert other.halted


@pytest.mark.parametrize(
    "text", ["", "CPU#0\r\n", "\r\nCPU#0\r\n PC=00000000 X0=1\r\n", "nonsense"]
)
def test_other_registers_are_left_out(text: str) -> None:
    assert parse_registers(text) == ()


def test_a_dump_on_stderr_names_the_vcpu() -> None:
    printed = (
        f"warning: x\nKVM internal error. Suberror: 1\nextra data[0]: 0x0\n{LONG}Code=00 <48>\n"
    )
    one, other = parse_registers(BOTH)
    dumps = parse_dumps(printed)
    assert one.general in dumps
    assert other.general not in dumps
    assert parse_dumps(LONG) == frozenset()


def test_code_that_had_no_slot_is_proof() -> None:
    failure = judged([stopped(0, 0x10000), stopped(1, 0x21035C)], [toggle(7, 3), toggle(8, 1.5)])
    assert failure.proven
    assert (failure.status, failure.transition, failure.cpu) == ("internal-error", 8, 1)
    assert (failure.ip, failure.gpa) == (0xFFFF_8000_0000_1001, 0x21035C)
    for words in (
        "vCPU 1 was fetching code",
        "gpa 0x21035c in RAM block pc.ram",
        "transition 8, which began 1.5 ms before: slot 5 was deleted, slot 3 added",
        "the same happened in transition 7",
    ):
        assert words in failure.what


def test_what_qemu_printed_decides_between_vcpus() -> None:
    both = [stopped(0, 2 * MIB), stopped(1, 3 * MIB)]
    failure = judged(both, [toggle(1, 1)])
    assert failure.proven
    assert (failure.cpu, failure.ip, failure.gpa) == (None, None, None)
    assert "one of the vCPUs 0, 1" in failure.what

    failure = judged([both[0], stopped(1, 3 * MIB, named=True)], [toggle(1, 1)])
    assert (failure.cpu, failure.gpa) == (1, 3 * MIB)
    assert "QEMU printed" in failure.what

    failure = judged([both[0], stopped(1, 0x8000, named=True)], [toggle(1, 1)])
    assert not failure.proven
    assert "vCPU 1 at" in failure.what
    assert "vCPU 0" not in failure.what


def test_halted_vcpus_fetch_nothing() -> None:
    failure = judged([stopped(0, 2 * MIB, halted=True), stopped(1, 3 * MIB)], [toggle(1, 1)])
    assert failure.cpu == 1


def test_the_change_that_took_the_address_is_named_not_the_last_one() -> None:
    elsewhere = MapChange(9, DIED - 1000, (op("delete", 9, 1 << 32, MIB),))
    failure = judged([stopped(1, 2 * MIB)], [toggle(8, 2), elsewhere])
    assert failure.transition == 8


def test_memory_that_stays_away_is_named() -> None:
    gone = MapChange(3, DIED - 1000, (op("delete", 5, MIB, 63 * MIB),))
    failure = judged([stopped(0, 2 * MIB)], [gone], kept_out=True)
    assert failure.proven
    assert "slot 5 was deleted and did not come back" in failure.what


def test_an_add_before_the_delete_gives_nothing_back() -> None:
    ops = (op("add", 3, 0, 64 * MIB), op("delete", 5, 0, 64 * MIB))
    assert MapChange(1, 0, ops).missing(MIB) == (ops[1], None)
    assert MapChange(1, 0, ops).missing(64 * MIB) is None


def test_what_was_not_seen_or_could_not_harm_is_no_proof() -> None:
    failure = judged([stopped(1, 2 * MIB)], [toggle(1, -3, seen=False)])
    assert not failure.proven
    assert failure.transition == 1
    assert "seen 3.0 ms later" in failure.what
    assert "rules" in failure.what
    failure = judged([stopped(1, 2 * MIB)], [toggle(1, 1)], kept_out=True)
    assert not failure.proven
    assert "keeps vCPUs from running" in failure.what


def test_system_management_mode_has_its_own_slots() -> None:
    in_smm = stopped(0, 2 * MIB, in_smm=True)
    assert not judged([in_smm], [toggle(1, 1)]).proven
    assert judged([in_smm], [toggle(1, 1, as_id=1)]).proven


def test_without_a_match_the_facts_are_told() -> None:
    failure = judged([stopped(0, 2 * MIB)], [])
    assert (failure.proven, failure.transition) == (False, None)
    assert "the map did not change in the 2 s before" in failure.what
    assert "did not change" in judged([stopped(0, 2 * MIB)], [toggle(1, 2001)]).what

    failure = judged([stopped(0, 0x8000), stopped(1, None)], [toggle(4, 12)])
    assert not failure.proven
    for words in ("transition 4, which began 12.0 ms before", "gpa 0x8000", "not mapped"):
        assert words in failure.what

    assert "could not be read" in judged([], [toggle(4, 12)]).what


def test_the_vcpu_that_made_a_change_is_not_its_victim() -> None:
    """It was in QEMU meanwhile, and went on when the memory was back."""
    mine = replace_thread(toggle(1, 1), "CPU 1")
    assert not judged([stopped(1, 2 * MIB)], [mine]).proven
    other = judged([stopped(0, 2 * MIB), stopped(1, 3 * MIB)], [mine])
    assert (other.proven, other.cpu) == (True, 0)
    # memory that stays away is missing for everybody
    gone = MapChange(3, DIED - 1000, (op("delete", 5, MIB, 63 * MIB),), "CPU 1")
    assert judged([stopped(1, 2 * MIB)], [gone]).cpu == 1


def test_an_only_vcpu_is_a_victim_of_what_the_main_thread_did_alone() -> None:
    def alone(thread: str | None) -> GuestFailure:
        change = replace_thread(toggle(1, 1), thread)
        return explain_stop(
            DIED, [stopped(0, 2 * MIB)], [change], kept_out=False, block_of=lambda _: None, vcpus=1
        )

    assert alone("main").proven
    assert not alone(None).proven
    assert "made the change itself" in alone(None).what
    assert alone("CPU 0").transition is None


def replace_thread(change: MapChange, thread: str | None) -> MapChange:
    return MapChange(change.seq, change.t_ns, change.ops, thread)


def suspicion(
    changes: list[MapChange],
    *,
    kept_out: bool = False,
    maps_again: bool = False,
    vcpus: int | None = 2,
) -> tuple[str, int] | None:
    return explain_reset(
        DIED,
        changes,
        kept_out=kept_out,
        vcpus=vcpus,
        maps_again=maps_again,
        block_of=lambda gpa: "pc.ram" if gpa else None,
    )


def test_a_reset_after_missing_ram_is_suspicious_where_another_vcpu_ran() -> None:
    found = suspicion([toggle(1, 9), toggle(2, 4)])
    assert found is not None
    text, transition = found
    assert transition == 2
    for words in (
        "1 of 2 vCPUs could run",
        "0x100000-0x3ffffff of pc.ram had no slot, 4.0 ms before",
        "in transition 2",
    ):
        assert words in text
    unknown = suspicion([toggle(2, 4)], vcpus=None)
    assert unknown is not None
    assert unknown[0].startswith("other vCPUs could run")


def test_an_only_vcpu_that_reboots_is_not_suspected() -> None:
    assert suspicion([toggle(2, 4)], vcpus=1) is None
    assert suspicion([replace_thread(toggle(2, 4), "CPU 0")], vcpus=1) is None
    by_main = suspicion([replace_thread(toggle(2, 4), "main")], vcpus=1)
    assert by_main is not None
    assert "1 of 1 vCPUs" in by_main[0]


def test_a_change_that_the_reset_itself_makes_is_not_held_against_it() -> None:
    assert suspicion([toggle(1, 1)], maps_again=True) is None
    found = suspicion([toggle(1, 9), toggle(2, 1)], maps_again=True)
    assert found is not None
    assert found[1] == 1


def test_most_resets_are_not_suspected() -> None:
    unmapped = MapChange(2, DIED - 1000, (op("delete", 7, 0xFD00_0000, MIB),))
    assert suspicion([]) is None
    assert suspicion([unmapped]) is None
    assert suspicion([toggle(1, 101)]) is None
    assert suspicion([toggle(1, 4)], kept_out=True) is None
    assert suspicion([toggle(1, 4, seen=False)]) is None


class _Monitor:
    """Of a guest with so many vCPUs."""

    version = SimpleNamespace(release=(7, 2))

    def __init__(self, vcpus: int) -> None:
        self._vcpus = vcpus

    async def execute(self, command: str, *_: object, **__: object) -> object:
        assert command == "query-cpus-fast"
        return [{"cpu-index": i, "thread-id": 100 + i} for i in range(self._vcpus)]


def watch_of(found: list[Record], vcpus: int) -> FailureWatch:
    return FailureWatch(
        cast("Monitor", _Monitor(vcpus)),
        found.extend,
        settle=lambda: asyncio.sleep(0),
        view=lambda: cast(
            "MemoryMap", SimpleNamespace(view=SimpleNamespace(lookup=lambda _: None))
        ),
        machine="pc-i440fx-7.2",
        pid=None,
    )


@pytest.mark.asyncio
@pytest.mark.parametrize(("apart_s", "told"), [(0.2, 1), (5.0, 1), (11.0, 2)])
async def test_a_reset_soon_after_another_is_the_firmwares(apart_s: float, told: int) -> None:
    """A SeaBIOS that ran before opens PAM and resets again; on a slow host that takes time."""
    found: list[Record] = []
    watch = watch_of(found, 2)
    try:
        for i in range(2):
            at = DIED + int(i * apart_s * 1e9)
            change = toggle(i + 1, 0.4)
            watch.record(transition(i + 1, at - 400_000))
            for each in change.ops:
                watch.record(replace(each, transition=i + 1))
            watch.event(MonitorEvent("RESET", {"reason": "guest-reset", "guest": True}, at, None))
            for _ in range(10):
                await asyncio.sleep(0)
    finally:
        await watch.close()
    assert [type(r) for r in found] == [GuestReset] * 2
    assert [r.possible is not None for r in found if isinstance(r, GuestReset)].count(True) == told


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("name", "reason", "guest", "vcpus", "possible"),
    [
        ("RESET", "guest-reset", True, 2, True),
        ("RESET", "guest-reset", True, 1, False),
        ("SHUTDOWN", "guest-reset", True, 2, True),
        ("RESET", "host-qmp-system-reset", False, 2, False),
        ("SHUTDOWN", "host-qmp-quit", False, 2, None),
    ],
)
async def test_a_reset_is_a_reset_and_a_suspicion_only_below(
    name: str, reason: str, guest: bool, vcpus: int, possible: bool | None
) -> None:
    found: list[Record] = []
    watch = watch_of(found, vcpus)
    try:
        watch.record(transition(1, DIED - 400_000))
        for each in toggle(1, 0.4).ops:
            watch.record(each)
        watch.event(MonitorEvent(name, {"reason": reason, "guest": guest}, DIED, None))
        for _ in range(10):
            await asyncio.sleep(0)
    finally:
        await watch.close()
    if possible is None:
        assert found == []
        return
    (reset,) = found
    assert isinstance(reset, GuestReset)
    assert (reset.reason, reset.guest, reset.shutdown) == (reason, guest, name == "SHUTDOWN")
    assert (reset.possible is not None) == possible == (reset.transition == 1)
