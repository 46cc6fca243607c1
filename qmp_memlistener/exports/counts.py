"""How many slots and holes a guest has, told record by record."""

from __future__ import annotations

import msgspec

from .fields import Recorded

__all__ = ["MapCounts"]


class _Range(msgspec.Struct, gc=False):
    memslot: bool = False


class _Block(msgspec.Struct, gc=False):
    holes: list[msgspec.Raw] = []


_RANGES = msgspec.json.Decoder(list[_Range])
_BLOCKS = msgspec.json.Decoder(list[_Block])
_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])


class MapCounts:
    """Slots of the main address space and holes in RAM, None as long as no map tells.

    A map gives both: its ranges that have a slot, its holes.  Operations that KVM did not refuse
    and transitions change them.  After a loss they may be off until the next map.
    """

    def __init__(self) -> None:
        self.slots: int | None = None
        self.holes: int | None = None

    def map(self, record: Recorded) -> None:
        if record.address_space == "memory":
            self.slots = sum(r.memslot for r in _RANGES.decode(record.ranges))
            self.holes = sum(len(b.holes) for b in _BLOCKS.decode(record.ram_blocks))

    def slot_op(self, record: Recorded) -> bool:
        """True if it changed the number of slots."""
        if self.slots is None or record.as_id or record.ret not in (0, msgspec.UNSET):
            return False
        step = {"add": 1, "delete": -1}.get(record.op, 0)
        self.slots += step
        return step != 0

    def transition(self, record: Recorded) -> bool:
        """True if it changed the number of holes."""
        if self.holes is None or (record.holes_punched == b"[]" and record.holes_filled == b"[]"):
            return False
        before = self.holes
        self.holes += len(_ITEMS.decode(record.holes_punched))
        self.holes -= len(_ITEMS.decode(record.holes_filled))
        return self.holes != before
