"""What no operation tells of slots that were there before a file began: sizes, flags, ids.

Only starts of slots are certain, so a guess never reaches the start of anything that was there at
the same time: guessed slots cannot overlap.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from operator import itemgetter

from ..errors import InputError
from ..memslots import LOG_DIRTY_PAGES, OpKind
from ..memslots.slots import LAST_SLOT
from .recorded_ops import Remarks
from .replay_history import Commit, History, Life

__all__ = ["complete"]

_DEFAULT_SIZE = 2 << 20
"""Of a slot that is deleted and never seen again: nothing says how large it was."""


def complete(history: History, remarks: Remarks) -> None:
    """Give every slot of `history` a size and an id, in place.

    Raises InputError when there are more slots than ids.
    """
    initial = [life for life in history.lives if life.initial]
    guessed = _guess_sizes(history, initial)
    _give_ids(history, initial, remarks)
    if initial:
        unsure = f", the sizes of {guessed} of them are guessed" if guessed else ""
        remarks.add(f"{_slots(len(initial))} there before the first operation{unsure}")


def _guess_sizes(history: History, initial: Iterable[Life]) -> int:
    """Fill in missing sizes; how many there were.

    A commit that deletes a slot mostly sets the same memory again, cut or joined: what it adds
    with the same distance of host address and gpa tells where the slot ended.  Otherwise the same
    host memory, set anywhere at any time.
    """
    starts: dict[int, list[int]] = {}
    for life in initial:
        starts.setdefault(life.as_id, []).append(life.gpa)
    for gpas in starts.values():
        gpas.sort()
    memory = _Memory(history.lives)
    guessed = 0
    for commit in history.commits:
        for done in commit.done:
            life = done.life
            if not life.initial or done.kind is not OpKind.DELETE:
                continue
            gpas = starts[life.as_id]
            i = bisect_right(gpas, life.gpa)
            bound = min(life.bound, gpas[i]) if i < len(gpas) else life.bound
            if life.size is not None:
                life.size = min(life.size, bound - life.gpa)
                continue
            guessed += 1
            again = _again(commit, life, bound)
            size = max((other.end for other in again), default=life.gpa) - life.gpa
            twin = again[0] if again else memory.at(life.hva)
            if twin is not None:
                life.first_flags = life.flags = twin.first_flags & ~LOG_DIRTY_PAGES
            if again:
                life.first_flags |= again[0].first_flags & LOG_DIRTY_PAGES
            if size <= 0:
                size = memory.size_from(life.hva) or _DEFAULT_SIZE
            life.size = min(size, bound - life.gpa)
    return guessed


def _again(commit: Commit, life: Life, bound: int) -> list[Life]:
    """What the commit sets of the memory that showed through `life`, in address order."""
    if life.hva is None:
        return []
    found = [
        done.life
        for done in commit.done
        if done.kind is OpKind.ADD
        and done.ret == 0
        and done.life.as_id == life.as_id
        and done.life.hva is not None
        and done.life.hva - done.life.gpa == life.hva - life.gpa
        and done.life.gpa < bound
        and done.life.end > life.gpa
    ]
    return sorted(found, key=lambda other: other.gpa)


class _Memory:
    """Host memory that slots of known size show."""

    def __init__(self, lives: Iterable[Life]) -> None:
        self._at: dict[int, Life] = {}
        self._starts: list[int] = []
        self._reach: list[int] = []  # how far the slots up to here reach
        known = [(life.hva, life) for life in lives if life.hva is not None and life.size]
        for hva, life in sorted(known, key=itemgetter(0)):
            largest = self._at.get(hva)
            if largest is None or largest.end - largest.gpa < life.end - life.gpa:
                self._at[hva] = life
            end = hva + life.end - life.gpa
            self._starts.append(hva)
            self._reach.append(max(end, self._reach[-1] if self._reach else 0))

    def at(self, hva: int | None) -> Life | None:
        """The largest slot that began there."""
        return self._at.get(hva) if hva is not None else None

    def size_from(self, hva: int | None) -> int:
        """How far memory was seen from there on; 0 when it was not."""
        if hva is None:
            return 0
        twin = self._at.get(hva)
        if twin is not None:
            return twin.end - twin.gpa
        i = bisect_right(self._starts, hva) - 1
        return max(self._reach[i] - hva, 0) if i >= 0 else 0


def _give_ids(history: History, initial: Iterable[Life], remarks: Remarks) -> None:
    """Ids for the slots of a first map that no operation named: none that an operation names.

    First those that must have been in use, because QEMU gave out a higher one (it takes the lowest
    free id), then others above all.
    """
    unnumbered: dict[int, list[Life]] = {}
    for life in initial:
        if life.slot is None:
            unnumbered.setdefault(life.as_id, []).append(life)
    for as_id, lives in unnumbered.items():
        used, taken = history.used.get(as_id, set()), history.taken.get(as_id, set())
        above = max((*used, *taken), default=-1) + 1
        ids = (*sorted(taken), *range(above, LAST_SLOT + 1), *range(above))
        free = (i for i in dict.fromkeys(ids) if i not in used)
        for life in sorted(lives, key=lambda life: life.gpa):
            life.slot = next(free, None)
            if life.slot is None:
                raise InputError(
                    f"the map has more ranges of RAM than KVM has slots ({LAST_SLOT + 1})",
                    remedy="give a file that `qmp-memlistener record` wrote, unchanged",
                )
    hidden = sum(
        max(len(ids) - len(unnumbered.get(as_id, ())), 0) for as_id, ids in history.taken.items()
    )
    if hidden:
        remarks.add(f"{_slots(hidden)} there all the time, of which nothing tells where")


def _slots(count: int) -> str:
    return "1 slot was" if count == 1 else f"{count} slots were"
