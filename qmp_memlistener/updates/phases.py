"""The phases of an update, from the moments that were seen of it.  Pure.

`Marks` has the moments, `phases_of` makes the intervals and says what happened in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ..records import StallRecord, TransitionRecord
from .model import Phase, PhaseName

__all__ = ["Marks", "phases_of"]

_ENDS = (PhaseName.REALISED, PhaseName.GUEST_ACTS)
"""Phases that end with a transition, which is a part of them."""


@dataclass(slots=True)
class Marks:
    """Moments of an update in ns; None for what did not happen or was not seen.

    `begun` to `prepared`: backends.  `sent` to `accepted`: the update's commands, from the write
    to the last reply.  Up to `own_until` changes of the map are QEMU's own doing, unless only the
    guest does such things: it was paused until then, or times are not known more exactly.
    `unbound` to `bound`: the driver took the device in between.  `settled`: nothing more came.
    `still`: the guest did not run, so that nothing was its doing.
    """

    begun: int
    prepared: int | None = None
    sent: int | None = None
    accepted: int | None = None
    own_until: int | None = None
    unbound: int | None = None
    bound: int | None = None
    settled: int | None = None
    still: bool = False
    _signs: list[tuple[int, bool]] = field(default_factory=list)
    _own: list[int] = field(default_factory=list)

    def sign(self, t_ns: int, *, surely: bool = False) -> None:
        """Something happened at `t_ns` that may be the guest's doing, or is `surely`."""
        self._signs.append((t_ns, surely))

    def own(self, t_ns: int) -> None:
        """Something happened at `t_ns` that only QEMU does, however late we learned of it."""
        self._own.append(t_ns)

    @property
    def touched(self) -> bool:
        """Something was made in the guest, or changed."""
        return self.prepared is not None or self.sent is not None

    @property
    def own_end(self) -> int | None:
        """Until when changes of the map are QEMU's own doing."""
        return None if self.own_until is None else max(self.own_until, *self._own, 0)

    @property
    def first_sign(self) -> int | None:
        """When the guest first did something."""
        return min(self._of_the_guest(), default=None)

    @property
    def last_sign(self) -> int | None:
        """When the guest last did something."""
        return max(self._of_the_guest(), default=None)

    def _of_the_guest(self) -> Iterator[int]:
        if self.sent is None or self.own_until is None or self.still:
            return
        for t_ns, surely in self._signs:
            if t_ns >= (self.sent if surely else self.own_until):
                yield t_ns


def phases_of(
    marks: Marks, transitions: Iterable[TransitionRecord], stalls: Iterable[StallRecord]
) -> list[Phase]:
    """In the order of their starts.  `accepted` and `realised` overlap: QEMU changes its map
    while it carries out the command."""
    seen = sorted((t.t_ns, t.seq) for t in transitions)
    began = sorted((s.start_ns, s.incident) for s in stalls)
    found = []
    for name, start, end in _intervals(marks, [t_ns for t_ns, _ in seen]):
        found.append(
            Phase(
                name,
                start,
                end,
                [
                    seq
                    for t_ns, seq in seen
                    if start <= t_ns < end or (t_ns == end and name in _ENDS)
                ],
                sorted({incident for t_ns, incident in began if start <= t_ns < end}),
            )
        )
    return sorted(found, key=lambda p: (p.start_ns, p.end_ns))


def _intervals(m: Marks, changes: list[int]) -> Iterator[tuple[PhaseName, int, int]]:
    if m.prepared is not None:
        yield PhaseName.PREPARED, m.begun, m.prepared
    if m.sent is None or m.accepted is None:
        return
    yield PhaseName.ACCEPTED, m.sent, m.accepted
    first, last = m.first_sign, m.last_sign
    until = m.accepted if m.own_end is None else m.own_end
    own = [t for t in changes if m.sent <= t <= until and (first is None or t < first)]
    if own:
        yield PhaseName.REALISED, m.sent, own[-1]
    end = m.accepted
    if first is not None and last is not None:
        yield PhaseName.GUEST_TOLD, min(m.accepted, first), first
        yield PhaseName.GUEST_ACTS, first, last
        end = max(m.accepted, last)
    if m.bound is not None and m.unbound is not None:
        yield PhaseName.DRIVER_BOUND, m.unbound, m.bound
        end = max(end, m.bound)
    if m.settled is not None:
        yield PhaseName.SETTLED, end, max(end, m.settled)
