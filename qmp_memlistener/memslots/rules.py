"""QEMU's own rules: which ranges of a FlatView have a memslot, where and with which flags.

Holds what `accel/kvm/kvm-all.c` does for one section, read in 7.2.22 and 10.0.2.  In which order
the slots of a transition change is in `commit`.

Not covered: s390x, which cuts sections into slots of at most 4 TiB
(`kvm_set_max_memslot_size`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from ..errors import InputError
from ..text import quoted
from ..topology.model import FlatRange, FlatView, Kind
from .dirty_log import DirtyLog
from .slots import GUEST_MEMFD, LOG_DIRTY_PAGES, READONLY, Slot, SlotTable

__all__ = [
    "ADDRESS_SPACES",
    "Order",
    "Rules",
    "Sections",
    "name_backing",
    "slot_table",
    "views_by_as",
    "with_id",
]

ADDRESS_SPACES = {"memory": 0, "KVM-SMRAM": 1}
"""The address spaces that have slots, in the order in which QEMU updates them: kvm-memory is
registered first, kvm-smram when a machine with SMM is complete (target/i386/kvm/kvm.c,
`register_smram_listener`)."""


class Order(StrEnum):
    """When the ioctls go out.

    `V7_2`: from inside the listener passes, so all deletes, then adds and flag changes mixed in
    address order, one address space after the other.  `V8_0` (8.0, commit f39b7d2b96 "kvm:
    Atomic memslot updates"): flag changes at once, deletes and adds are queued until `commit`.
    """

    V7_2 = "7.2"
    V8_0 = "8.0"


@dataclass(frozen=True, slots=True)
class Rules:
    """How one QEMU on one host turns sections into slots.

    `page_size` is the host's; `readonly_mem` is KVM_CAP_READONLY_MEM (x86 and arm have it);
    `slots` is KVM_CAP_NR_MEMSLOTS, how many an address space may have (x86 since 5.12).
    """

    order: Order = Order.V8_0
    page_size: int = 4096
    readonly_mem: bool = True
    slots: int = 32764

    @classmethod
    def parse(cls, text: str, page_size: int = 4096) -> Rules:
        """The rules of `7.2` or `8.0`, or of a QEMU version like `10.0.2`.

        Versions say what upstream did; a distributor may have backported the new order.
        Raises InputError.
        """
        try:
            major = int(text.split(".", 1)[0])
        except ValueError:
            raise InputError(
                f"{quoted(text)} names no rules", remedy="use 7.2, 8.0 or the version of a QEMU"
            ) from None
        return cls(Order.V8_0 if major >= 8 else Order.V7_2, page_size)

    @property
    def queued(self) -> bool:
        """Deletes and adds wait for `commit` (>= 8.0)."""
        return self.order is Order.V8_0


def views_by_as(
    views: FlatView | Iterable[FlatView] | Mapping[int, FlatView],
) -> dict[int, FlatView]:
    """Views keyed by KVM's address-space id; those of other address spaces are left out.

    A single FlatView stands for address space 0, whatever its name.
    """
    if isinstance(views, FlatView):
        return {0: views}
    if isinstance(views, Mapping):
        return dict(views)
    return {ADDRESS_SPACES[v.address_space]: v for v in views if v.address_space in ADDRESS_SPACES}


class Sections:
    """Which ranges get a slot, where, and with which flags."""

    __slots__ = ("_log", "_memfd", "_page_size", "_readonly_mem", "_written")

    def __init__(
        self, rules: Rules, views: Iterable[FlatView], table: SlotTable, log: DirtyLog
    ) -> None:
        self._page_size = rules.page_size
        self._readonly_mem = rules.readonly_mem
        self._log = log
        # Regions that some range shows as plain RAM: a range that shows them as ROM without
        # saying what the region is (`info mtree -f` alone) does so through a read-only alias.
        self._written = {r.region for view in views for r in view if r.kind is Kind.RAM}
        self._memfd = {(s.block, s.owner) for s in table if s.flags & GUEST_MEMFD}

    def place(self, r: FlatRange) -> tuple[int, int] | None:
        """Start and size of the slot: start rounded up, end down, to host pages; None if empty.

        `kvm_align_section`.  So a one-byte MMIO region costs its page as RAM.
        """
        mask = self._page_size - 1
        start = (r.start + mask) & ~mask
        size = (r.start + r.size - start) & ~mask
        return (start, size) if size > 0 else None

    def fixed_flags(self, r: FlatRange) -> int | None:
        """The flags that follow from what the region is, or None when it has no slot.

        RAM and device RAM have one.  READONLY follows the region, not the range: read-only RAM
        and ROM devices have it, RAM that shows through a read-only alias (PAM) has not, and the
        guest can write it (`kvm_mem_flags`).  A ROM device has a slot only in romd mode; out of
        it, it prints as i/o (`kvm_set_phys_mem`).
        """
        if r.kind is Kind.IO:
            return None
        kind = r.region_kind or r.kind
        if kind is Kind.IO:
            return None
        flags = GUEST_MEMFD if r.region in self._memfd else 0
        if kind is Kind.ROM and r.region_kind is None and r.region in self._written:
            return flags
        if kind is Kind.ROM or kind is Kind.ROMD:
            if self._readonly_mem:
                return flags | READONLY
            return None if kind is Kind.ROMD else flags
        return flags

    def slot(self, r: FlatRange, as_id: int, logged: bool) -> Slot | None:
        """The slot of a range, with id -1 still to be given; None when it has none."""
        fixed = self.fixed_flags(r)
        if fixed is None:
            return None
        place = self.place(r)
        if place is None:
            return None
        start, size = place
        flags = fixed | LOG_DIRTY_PAGES if logged else fixed
        return Slot(as_id, -1, start, size, flags, r.name, r.owner, r.offset + start - r.start)

    def before(self, r: FlatRange, as_id: int) -> Slot | None:
        """The slot of a range as it is before the transition."""
        return self.slot(r, as_id, self._log.before(r))

    def after(self, r: FlatRange, as_id: int) -> Slot | None:
        """The slot of a range as it is after the transition."""
        return self.slot(r, as_id, self._log.after(r))


def slot_table(
    views: FlatView | Iterable[FlatView] | Mapping[int, FlatView], rules: Rules | None = None
) -> SlotTable:
    """The table QEMU builds when it starts from none: slots in address order, ids from 0.

    `listener_add_address_space` (memory.c).  A guest that has run for a while has other ids.
    """
    by_as = views_by_as(views)
    sections = Sections(rules or Rules(), by_as.values(), SlotTable(), DirtyLog(SlotTable()))
    slots: list[Slot] = []
    for as_id in sorted(by_as):
        next_id = 0
        for r in by_as[as_id]:
            slot = sections.before(r, as_id)
            if slot is not None:
                slots.append(with_id(slot, next_id))
                next_id += 1
    return SlotTable(slots)


def name_backing(table: SlotTable, views: Mapping[int, FlatView], rules: Rules) -> SlotTable:
    """`table` with block, owner and offset of each slot that a range of `views` fits exactly.

    Slots that know what backs them stay as they are, and so do those that no range fits.
    Returns `table` itself when there is nothing to name.
    """
    if all(s.block is not None for s in table):
        return table
    sections = Sections(rules, (), SlotTable(), DirtyLog(SlotTable()))
    named: dict[tuple[int, int], Slot] = {}
    for as_id, view in views.items():
        for r in view:
            if r.kind is Kind.IO:
                continue
            place = sections.place(r)
            slot = table.exact(as_id, *place) if place else None
            if slot is not None and slot.block is None:
                named[as_id, slot.slot] = msgspec.structs.replace(
                    slot, block=r.name, owner=r.owner, offset=r.offset + slot.gpa - r.start
                )
    if not named:
        return table
    return SlotTable(
        (named.get((s.as_id, s.slot), s) for s in table),
        retired=table.retired,
        elsewhere=table.elsewhere,
        qemu=table.qemu,
    )


def with_id(slot: Slot, slot_id: int) -> Slot:
    """The same slot under another id."""
    return msgspec.structs.replace(slot, slot=slot_id)
