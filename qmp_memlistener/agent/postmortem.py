"""Why a guest died: a vCPU found stopped at memory that a transition had taken away.  Pure.

To change its map QEMU deletes memslots and adds others.  Before 8.0 vCPUs run meanwhile, and one
that fetches code from a deleted slot ends with KVM_EXIT_INTERNAL_ERROR (QMP status
`internal-error`), one whose page tables were there with a triple fault (a reset).  The first leaves
its registers to look at, so the address can be compared with the slot operations; the second leaves
nothing but the times, and looks like any reboot: that is a suspicion, and never called a failure.

Here registers are read from text and the judgement is made; noticing failures and asking the guest
is the business of `failures`.

Sources: kvm_cpu_exec and kvm_handle_internal_error (accel/kvm/kvm-all.c), x86_cpu_dump_state
(target/i386/cpu-dump.c), hmp_gva2gpa, qemu_system_reset (softmmu/runstate.c, system/runstate.c),
which resets the devices before it sends RESET; kvm_region_commit of 8.0 and later keeps vCPUs out
(accel_ioctl_inhibit_begin).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..memslots import OpKind
from ..records import GuestFailure, SlotOp

__all__ = [
    "MapChange",
    "StoppedVcpu",
    "VcpuRegisters",
    "explain_reset",
    "explain_stop",
    "parse_dumps",
    "parse_registers",
]

_NEAR_NS = 2_000_000_000  # how long before a failure a change may be its cause
_RESET_NEAR_NS = 100_000_000  # likewise before a reset, which guests also do on their own
_OWN_RESET_NS = 50_000_000  # a change so close to RESET may be QEMU's own

MAIN_THREAD = "main"

_CPU = re.compile(r"^CPU#(\d+)\s*$", re.MULTILINE)
_GENERAL = re.compile(r"^[RE]AX=.*?\b([RE])IP=([0-9a-f]{8,16})\b", re.MULTILINE | re.DOTALL)
_CS_BASE = re.compile(r"^CS =[0-9a-f]{4} ([0-9a-f]{8,16}) ", re.MULTILINE)
_FLAG = re.compile(r"\b(SMM|HLT)=1\b")
_INTERNAL = re.compile(r"^KVM internal error", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class VcpuRegisters:
    """What `info registers` shows of a vCPU.

    `ip` is the offset in its code segment, `linear` the address that paging translates, `general`
    the general registers as text, to tell vCPUs apart.
    """

    index: int
    ip: int
    linear: int
    in_smm: bool
    halted: bool
    general: str


@dataclass(frozen=True, slots=True)
class MapChange:
    """A transition and its slot operations, in order.

    `thread` made it (`CPU 1`, `main`); None when that was not seen.
    """

    seq: int
    t_ns: int
    ops: tuple[SlotOp, ...]
    thread: str | None = None

    def others(self, vcpus: int | None) -> int | None:
        """How many vCPUs could run meanwhile; None when that is not known.

        A change whose maker was not seen is taken for a vCPU's: most are.
        """
        if vcpus is None:
            return None
        return vcpus if self.thread == MAIN_THREAD else max(0, vcpus - 1)

    def was_made_by(self, vcpu: int) -> bool:
        """That vCPU was in QEMU meanwhile."""
        return self.thread == f"CPU {vcpu}"

    def missing(self, gpa: int, as_id: int = 0) -> tuple[SlotOp, SlotOp | None] | None:
        """The delete that took the slot at `gpa` away, and the add that brought it back, if any."""
        deleted: SlotOp | None = None
        for op in self.ops:
            if op.as_id != as_id or not op.gpa <= gpa < op.end or op.ret != 0:
                continue
            if op.op is OpKind.DELETE:
                deleted = op
            elif op.op is OpKind.ADD and deleted is not None:
                return deleted, op
        return (deleted, None) if deleted is not None else None

    @property
    def gone_meanwhile(self) -> tuple[int, int] | None:
        """The largest range `[start, end)` of address space 0 that was deleted and added again."""
        best: tuple[int, int] | None = None
        deleted: list[SlotOp] = []
        for op in self.ops:
            if op.as_id != 0 or op.ret != 0 or op.predicted:
                continue
            if op.op is OpKind.DELETE:
                deleted.append(op)
            for old in deleted if op.op is OpKind.ADD else ():
                start, end = max(old.gpa, op.gpa), min(old.end, op.end)
                if end > start and (best is None or end - start > best[1] - best[0]):
                    best = (start, end)
        return best

    def is_near(self, t_ns: int, within_ns: int) -> bool:
        """It began before `t_ns`, or, where it was not seen, may have."""
        later_ns = within_ns if any(op.predicted for op in self.ops) else 0
        return -later_ns <= t_ns - self.t_ns <= within_ns


@dataclass(frozen=True, slots=True)
class StoppedVcpu:
    """A stopped vCPU and the guest-physical address of its next instruction, None when unmapped.

    `named`: QEMU printed the registers of this vCPU when it failed.
    """

    vcpu: VcpuRegisters
    gpa: int | None
    named: bool = False

    def missing_in(self, change: MapChange) -> tuple[SlotOp, SlotOp | None] | None:
        """As `MapChange.missing` for the next instruction."""
        if self.gpa is None:
            return None
        gone = change.missing(self.gpa, int(self.vcpu.in_smm))
        if gone is not None and gone[1] is not None and change.was_made_by(self.vcpu.index):
            return None  # it went on when the memory was back
        return gone


def parse_registers(text: str) -> tuple[VcpuRegisters, ...]:
    """The vCPUs in what `info registers -a` prints for x86 (7.2 to 11.1); others are left out."""
    parts = _CPU.split(text.replace("\r", ""))
    found = []
    for number, body in zip(parts[1::2], parts[2::2], strict=True):
        vcpu = _vcpu(int(number), body)
        if vcpu is not None:
            found.append(vcpu)
    return tuple(found)


def parse_dumps(text: str) -> frozenset[str]:
    """The general registers of every vCPU that QEMU dumped after a `KVM internal error`."""
    text = text.replace("\r", "")
    first = _INTERNAL.search(text)
    if first is None:
        return frozenset()
    return frozenset(" ".join(m[0].split()) for m in _GENERAL.finditer(text, first.start()))


def _vcpu(index: int, body: str) -> VcpuRegisters | None:
    general, base = _GENERAL.search(body), _CS_BASE.search(body)
    if general is None or base is None:
        return None
    ip = int(general[2], 16)
    flags = set(_FLAG.findall(body))
    # 64-bit code has no segment base; it is the only one for which QEMU prints RIP
    linear = ip if general[1] == "R" else (int(base[1], 16) + ip) & 0xFFFF_FFFF
    words = " ".join(general[0].split())
    return VcpuRegisters(index, ip, linear, "SMM" in flags, "HLT" in flags, words)


def explain_stop(
    t_ns: int,
    cpus: Sequence[StoppedVcpu],
    changes: Sequence[MapChange],
    *,
    kept_out: bool,
    block_of: Callable[[int], str | None],
    vcpus: int | None = None,
) -> GuestFailure:
    """Judge a guest that stopped with an internal error at `t_ns`.

    `changes` are the latest transitions in order.  `kept_out`: this QEMU lets no vCPU run while
    slots are replaced.  `vcpus`: how many there are, where that is known.  `block_of` names the RAM
    block at a guest-physical address.  The latest change that took away the memory of a suspect's
    next instruction is named; suspects are the vCPUs whose registers QEMU printed, or else all
    that were not halted.
    """
    near = [c for c in changes if c.is_near(t_ns, _NEAR_NS)]
    suspects = [c for c in cpus if c.named] or [c for c in cpus if not c.vcpu.halted]
    for change in reversed(near):
        hits = [c for c in suspects if c.missing_in(change) is not None]
        if hits:
            alone = change.others(vcpus) == 0
            return _fetched(t_ns, change, hits, near, block_of, kept_out=kept_out, alone=alone)
    return GuestFailure(
        t_ns=t_ns,
        status="internal-error",
        what=f"KVM could not go on; {_no_match(t_ns, suspects, near)}",
        proven=False,
        transition=None,
    )


def _fetched(
    t_ns: int,
    change: MapChange,
    hits: Sequence[StoppedVcpu],
    near: Sequence[MapChange],
    block_of: Callable[[int], str | None],
    *,
    kept_out: bool,
    alone: bool,
) -> GuestFailure:
    """Each of `hits` may have been fetching code whose slot `change` took away.

    `alone`: there is one vCPU only, and it may have made the change itself.
    """
    cpu = hits[0]
    gone = cpu.missing_in(change)
    assert cpu.gpa is not None
    assert gone is not None
    deleted, added = gone
    one = len(hits) == 1
    who, such = f"vCPU {cpu.vcpu.index}", ""
    if not one:
        numbers = ", ".join(str(c.vcpu.index) for c in hits)
        who, such = f"one of the vCPUs {numbers}", ", such as"
    block = block_of(cpu.gpa)
    what = (
        f"{who} was fetching code{such} at {cpu.vcpu.ip:#x} (gpa {cpu.gpa:#x}"
        + (f" in RAM block {block}" if block is not None else "")
        + f"), which had no slot during transition {change.seq}, {_when(t_ns, change)}: "
        f"slot {deleted.slot} was deleted"
        + (f", slot {added.slot} added" if added is not None else " and did not come back")
    )
    also = [str(c.seq) for c in near if c is not change and cpu.missing_in(c) is not None]
    if also:
        what += f"; the same happened in transition {_list(also)}"
    if one and cpu.named:
        what += "; QEMU printed the registers of this vCPU as it failed"
    reserve = ""
    if deleted.predicted:
        reserve = "; the slot operations are what QEMU's rules give, they were not seen"
    elif kept_out and added is not None:
        reserve = "; but this QEMU keeps vCPUs from running meanwhile"
    elif alone and added is not None:
        reserve = "; but if this only vCPU made the change itself it did not run meanwhile"
    return GuestFailure(
        t_ns=t_ns,
        status="internal-error",
        what=what + reserve,
        proven=not reserve,
        transition=change.seq,
        cpu=cpu.vcpu.index if one else None,
        ip=cpu.vcpu.ip if one else None,
        gpa=cpu.gpa if one else None,
    )


def explain_reset(
    t_ns: int,
    changes: Sequence[MapChange],
    *,
    kept_out: bool,
    vcpus: int | None,
    maps_again: bool,
    block_of: Callable[[int], str | None],
) -> tuple[str, int] | None:
    """The suspicion that a reset which the guest caused at `t_ns` was a vCPU's death, and the
    transition that it is about; None when nothing speaks for it.

    A vCPU is reset by its own triple fault just as by what it asks for, and QEMU does not tell
    which.  What may speak for the former is that RAM had no slot shortly before while a vCPU ran.
    The one that made the change did not: it was in QEMU (kvm_set_phys_mem runs in the thread that
    wrote the register), so there must be another of the `vcpus` (None: not known how many).
    `maps_again`: to reset this machine QEMU itself puts the RAM map back as it was at the start,
    with all vCPUs stopped, before it sends RESET; so the last change is not counted.
    """
    if kept_out:
        return None
    near = [c for c in changes if c.is_near(t_ns, _RESET_NEAR_NS)]
    if maps_again and near and t_ns - near[-1].t_ns <= _OWN_RESET_NS:
        near.pop()
    for change in reversed(near):
        gone = change.gone_meanwhile
        others = change.others(vcpus)
        if gone is None or others == 0:
            continue
        block = block_of(gone[0])
        who = "other vCPUs" if others is None else f"{others} of {vcpus} vCPUs"
        text = (
            f"{who} could run while {gone[0]:#x}-{gone[1] - 1:#x}"
            + (f" of {block}" if block is not None else "")
            + f" had no slot, {(t_ns - change.t_ns) / 1e6:.1f} ms before, in transition "
            f"{change.seq}: one whose page tables are there ends in a triple fault"
        )
        return text, change.seq
    return None


def _list(numbers: Sequence[str]) -> str:
    """The last three, and how many more there are."""
    more = f" and {len(numbers) - 3} before" if len(numbers) > 3 else ""
    return ", ".join(numbers[-3:]) + more


def _when(t_ns: int, change: MapChange) -> str:
    ms = (t_ns - change.t_ns) / 1e6
    return f"which began {ms:.1f} ms before" if ms >= 0 else f"which was seen {-ms:.1f} ms later"


def _no_match(t_ns: int, cpus: Sequence[StoppedVcpu], near: Sequence[MapChange]) -> str:
    if not near:
        return f"the map did not change in the {_NEAR_NS / 1e9:.0f} s before"
    last = near[-1]
    text = f"the last change of the map was transition {last.seq}, {_when(t_ns, last)}, "
    if not cpus:
        return text + "and the vCPUs' registers could not be read"
    at = ", ".join(
        f"vCPU {c.vcpu.index} at {c.vcpu.ip:#x}"
        + (f" (gpa {c.gpa:#x})" if c.gpa is not None else " (not mapped)")
        for c in cpus[:8]
    )
    return text + f"but no change took away the memory of a next instruction: {at}"
