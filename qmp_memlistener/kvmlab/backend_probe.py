"""What a mirror's slots really show: words read and written by a guest, and a check of all slots.

The guest is a vCPU of its own, beside those that the machine runs; it executes one access and
halts, in the caller's thread.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import InputError, OperationFailed
from ..memslots import Slot, SlotTable
from ..memslots.intervals import join, subtract
from ..memslots.slots import Backing
from ..records import MemoryShown, MirrorDifference
from . import abi, system, x86
from .abi import ExitReason
from .machine import Machine
from .memory import PAGE, Blocks
from .programs import SIZE

__all__ = ["GuestProbe", "Misread", "Verified", "samples_of", "verify_slots"]

WORD = 8

# x86-64: an access to the word at rsi, then hlt, which leaves KVM_RUN as there is no interrupt
# controller
_READ = bytes.fromhex("488b06 f4")  # mov (%rsi),%rax
_WRITE = bytes.fromhex("488906 f4")  # mov %rax,(%rsi)
_WRITE_AT = SIZE + 16


class GuestProbe:
    """Accesses to guest-physical addresses below `reach`, made by a guest of `machine`'s VM."""

    def __init__(self, machine: Machine, reach: int) -> None:
        """Raises OperationFailed."""
        private = machine.private
        self.reach = reach
        self._code = private.code_gpa
        self._cr3 = private.cr3
        offset = private.code_gpa - private.gpa
        private.memory.write(offset + SIZE, _READ)
        private.memory.write(offset + _WRITE_AT, _WRITE)
        self._vcpu = machine.vm.add_vcpu()

    def read(self, gpa: int) -> bytes | None:
        """The word at `gpa`; None where the guest finds no memory.

        Raises InputError for an address that is no multiple of 8 or out of reach, OperationFailed
        when the guest dies of it.
        """
        if not self._access(SIZE, gpa, 0):
            return None
        registers = x86.Regs()
        self._vcpu.ioctl(x86.GET_REGS, registers)
        value: int = registers.rax
        return value.to_bytes(WORD, "little")

    def write(self, gpa: int, word: bytes) -> bool:
        """Store a word at `gpa`: False when that reaches no memory that can be written.

        Raises as `read`.
        """
        if len(word) != WORD:
            raise InputError(f"{len(word)} bytes are not a word", remedy=f"write {WORD} bytes")
        return self._access(_WRITE_AT, gpa, int.from_bytes(word, "little"))

    def _access(self, program: int, gpa: int, rax: int) -> bool:
        """Run one of the programs to its end; whether the access met memory."""
        if gpa % WORD or not 0 <= gpa < self.reach:
            raise InputError(
                f"the lab's guest cannot get at {gpa:#x}",
                remedy=f"use a multiple of {WORD} below {self.reach:#x}",
            )
        vcpu = self._vcpu
        vcpu.start(self._code + program, self._cr3, {"rsi": gpa, "rax": rax})
        met = True
        while True:
            try:
                system.ioctl(vcpu.fd, abi.RUN)
            except OSError as exc:
                if exc.errno == errno.EFAULT:
                    return False  # a hole in the host's mapping, on hardware KVM
                raise OperationFailed(f"KVM_RUN at {gpa:#x}: {exc.strerror}") from exc
            reason = vcpu.run.exit_reason
            if reason == ExitReason.HLT:
                return met
            if reason != ExitReason.MMIO:
                raise OperationFailed(
                    f"the lab's guest died of an access to {gpa:#x} (KVM exit reason {reason})"
                )
            met = False  # and let it come to its end, so that KVM has nothing left to complete


# -- all slots ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Misread:
    """At `gpa` the guest found something else than the slots held say; None: no memory.

    `word` is what it read.  It is the reason when `found` is None all the same: the word is none
    that was written.
    """

    gpa: int
    wanted: Backing | None
    found: Backing | None
    word: bytes | None

    @property
    def difference(self) -> MirrorDifference:
        """As records have it."""
        unknown = self.found is None and self.word is not None
        found = MemoryShown(None, None, None, None) if unknown else _shown(self.found)
        return MirrorDifference(self.gpa, self.gpa + WORD, _shown(self.wanted), found)

    def __str__(self) -> str:
        if self.word is None:
            found = "no memory"
        else:
            found = str(self.found) if self.found is not None else "unknown memory"
        wanted = str(self.wanted) if self.wanted is not None else "no memory"
        return f"at {self.gpa:#x} the lab's guest finds {found} instead of {wanted}"


@dataclass(frozen=True, slots=True)
class Verified:
    """What KVM was asked, and where its answer is not what the slots held say.

    `reads` words were read by the guest; of `unreached` addresses nothing is known.
    """

    reads: int
    unreached: int
    misread: tuple[Misread, ...]
    wrong_logs: tuple[str, ...]

    @property
    def good(self) -> bool:
        return not self.misread and not self.wrong_logs


def samples_of(table: SlotTable, private: tuple[int, int], most: int) -> list[int]:
    """Pages to look at, at most `most` of them: the ends and the middle of each range that a slot
    shows, and those on either side where there is no memory."""
    pages: set[int] = set()
    around: list[tuple[int, int]] = []
    for slot in table:
        for start, end in slot.mapped:
            last = end - PAGE
            pages |= {start, (start + last) // 2 // PAGE * PAGE, last}
            around += [(max(start - PAGE, 0), start), (end, end + PAGE)]
    free = subtract(join(sorted(around)), sorted((*table.mapped(0), private)))
    pages |= {page for start, end in free for page in range(start, end, PAGE)}
    ordered = sorted(pages)
    step = -(-len(ordered) // most) or 1
    return ordered[::step]


def verify_slots(
    table: SlotTable, blocks: Blocks, probe: GuestProbe, samples: Sequence[int]
) -> Iterator[Misread]:
    """Stamp the pages of `samples`, and have the guest read those that it reaches.

    Stamps come first, so that one page shown at two places is seen at both.  Raises
    OperationFailed, OSError.
    """
    wanted = {gpa: _behind(table.at(0, gpa), gpa) for gpa in samples if gpa < probe.reach}
    for behind in wanted.values():
        if behind is not None:
            blocks.stamp((behind.block, behind.owner), behind.offset)
    for gpa, behind in wanted.items():
        word = probe.read(gpa)
        found = blocks.stamped(word) if word is not None else None
        if found != behind or (found is None) != (word is None):
            yield Misread(gpa, behind, found, word)


def _shown(behind: Backing | None) -> MemoryShown | None:
    if behind is None:
        return None
    return MemoryShown(behind.block, behind.owner, behind.offset, None)


def _behind(slot: Slot | None, gpa: int) -> Backing | None:
    if slot is None:
        return None
    return Backing(slot.block, slot.owner, (slot.offset or 0) + gpa - slot.gpa)
