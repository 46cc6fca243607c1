"""How often QEMU's threads are looked at.  Pure; `burst` may be called from another thread."""

from __future__ import annotations

__all__ = ["Rhythm"]


class Rhythm:
    """`WATCH_NS` as a rule, `BURST_NS` around operations, `BUSY_NS` while the main loop is busy.

    A stall is bracketed by the look before it and the one after it.  So a long one is looked at
    less often: each end may be off by a fortieth of it.  One longer than `must_see_ns` must not be
    missed, so two looks fall into it.
    """

    WATCH_NS = 2_500_000
    BURST_NS = 1_000_000
    BUSY_NS = 500_000
    LONGEST_NS = 20_000_000

    def __init__(self, must_see_ns: int | None = None) -> None:
        self._watch_ns = self.WATCH_NS
        if must_see_ns is not None:
            self._watch_ns = max(self.BUSY_NS, min(self.WATCH_NS, must_see_ns // 3))
        self._bursts = 0

    def burst(self, on: bool) -> None:
        """An operation begins or ends; they may overlap."""
        self._bursts = max(0, self._bursts + (1 if on else -1))

    @property
    def in_burst(self) -> bool:
        """An operation is under way."""
        return self._bursts > 0

    def next_ns(self, busy_for_ns: int | None) -> int:
        """From one look to the next; the main loop has been busy for so long, None: it is not."""
        if busy_for_ns is not None:
            return min(self.LONGEST_NS, max(self.BUSY_NS, busy_for_ns // 40))
        return min(self.BURST_NS, self._watch_ns) if self._bursts else self._watch_ns
