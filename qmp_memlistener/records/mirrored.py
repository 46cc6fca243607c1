"""What a mirror beside a watch did, and whether it showed the guest's map at the end.

The last line but the summary of `watch --mirror --json`.
"""

from __future__ import annotations

import msgspec

from .records import Record

__all__ = ["LabMirror", "MemoryShown", "MirrorDifference", "MirrorRecord", "MirrorTimes"]


class MirrorTimes(msgspec.Struct, frozen=True):
    """How often something was done, and how long it took in all and at most: None for what was
    never done (0 in recordings of former versions)."""

    count: int = 0
    total_ns: int = 0
    longest_ns: int | None = None

    def plus(self, ns: int) -> MirrorTimes:
        return MirrorTimes(self.count + 1, self.total_ns + ns, max(self.longest_ns or 0, ns))


class MemoryShown(msgspec.Struct, frozen=True):
    """Memory: RAM block, its owner, the offset of the first byte, whether stores are refused.

    `block` and `offset` are None when it is not known which memory that is; `readonly` is when
    no store was tried.
    """

    block: str | None
    owner: str | None
    offset: int | None
    readonly: bool | None

    def __str__(self) -> str:
        at = "unknown memory" if self.offset is None else f"{self.block} @{self.offset:#x}"
        return f"{at} (read-only)" if self.readonly else at


class MirrorDifference(msgspec.Struct, frozen=True):
    """In `[start, end)` the mirror has `found`, the guest's map `wanted`; None: no memory."""

    start: int
    end: int
    wanted: MemoryShown | None
    found: MemoryShown | None

    def __str__(self) -> str:
        found, wanted = self.found or "no memory", self.wanted or "no memory"
        return f"{self.start:#x}-{self.end - 1:#x} has {found} instead of {wanted}"


class LabMirror(msgspec.Struct, frozen=True, kw_only=True):
    """What a mirror on /dev/kvm did, and what KVM and a guest of the lab showed at the end.

    `vcpus` ran meanwhile.  `slots` are KVM's at the end, the lab's own left out, `slot_ioctls` the
    KVM_SET_USER_MEMORY_REGION calls for them, `mappings` changes of the host's mapping behind live
    ones.  `placed` slots came by such a change alone; `grown` slots were recreated, larger, for one
    that did not fit; `moved`: the lab's own slot had to give way.  `holds` are of its vCPUs, kick
    and entry included.  `reads` words were read by a guest; `differences` are those that were
    not what the mirror's slots say, `wrong_logs` KVM's dirty logs that should not be, or are not.
    """

    vcpus: int
    slots: int
    slot_ioctls: int
    mappings: int
    placed: int
    grown: int
    moved: int
    holds: MirrorTimes
    reads: int
    differences: list[MirrorDifference]
    wrong_logs: list[str]


class MirrorRecord(Record, frozen=True, kw_only=True, tag="mirror"):
    """What a mirror has done so far, and whether it is in step.

    backend           `kvm` or `model`, empty for another; `lab` is that of `kvm`
    in_step           the backend shows the last map received; `why_not` is why it does not
    compared          it was compared with a map; `differences` are those found last
    transitions       maps received, the one at the beginning included
    operations        calls that changed the backend
    slots_added, slots_deleted, flags_changed, holes_marked, holes_unmarked    the same by kind
    slots_touched     slots that a transition changed, summed over the transitions
    exposed           updates between whose operations memory was missing that is there before and
                      after: users of the backend could see that
    bitmaps_dropped   bytes of dirty bitmaps that went with slots and holes
    updates           from the first call to the last, pause included
    pauses            of the guest by the mirror, from STOP to RESUME
    already_paused    updates under `pause` of a guest that was paused already
    unpaused          updates under `pause` in which the guest ran, wholly or in part
    lag               from QEMU's first operation for a transition to the end of the mirror's
    rebuilt           times the backend was emptied and filled again
    dropped           changes that were dropped because the mirror was too slow
    checks            comparisons with a map
    notes             the last hundred remarks
    """

    t_ns: int
    backend: str
    strategy: str
    in_step: bool
    why_not: str | None
    compared: bool
    differences: list[MirrorDifference]
    transitions: int
    operations: int
    slots_added: int
    slots_deleted: int
    flags_changed: int
    holes_marked: int
    holes_unmarked: int
    slots_touched: int
    exposed: int
    bitmaps_dropped: int
    updates: MirrorTimes
    pauses: MirrorTimes
    already_paused: int
    unpaused: int
    lag: MirrorTimes
    rebuilt: int
    dropped: int
    checks: int
    notes: list[str]
    lab: LabMirror | None = None

    @property
    def faults(self) -> int:
        """In how many places it is not as it should be."""
        found = len(self.differences)
        if self.lab is not None:
            found += len(self.lab.differences) + len(self.lab.wrong_logs)
        return found
