"""What no operation tells of slots that were there before a file began: sizes, flags, ids.

Only starts of slots are certain, so a guess never reaches the start of anything that was there at
the same time: guessed slots cannot overlap.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from operator import itemgetter

from ..errors import InputError
from ..memslots import OpKind
from ..memslots.intervals import join
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
        unsure = f" (sizes guessed: {guessed})" if guessed else ""
        remarks.add(f"slots that were there before the first operation: {len(initial)}{unsure}")


def _guess_sizes(history: History, initial: Iterable[Life]) -> int:
    """Fill in missing sizes; how many there were."""
    starts: dict[int, list[int]] = {}
    for life in initial:
        starts.setdefault(life.as_id, []).append(life.gpa)
    for gpas in starts.values():
        gpas.sort()
    memory = _Memory(history.lives)
    begun: set[Life] = set()
    guessed = 0
    for commit in history.commits:
        for done in commit.done:
            life = done.life
            if done.kind is OpKind.ADD:
                begun.add(life)
            if not life.initial or done.kind is not OpKind.DELETE:
                continue
            gpas = starts[life.as_id]
            i = bisect_right(gpas, life.gpa)
            bound = min(life.bound, gpas[i]) if i < len(gpas) else life.bound
            if life.size is not None:
                life.size = min(life.size, bound - life.gpa)
                continue
            guessed += 1
            twins = sorted(memory.beginning(life), key=begun.__contains__)
            seen = memory.behind(life)
            life.size = _size(life, commit, bound, twins, seen)
    return guessed


def _size(life: Life, commit: Commit, bound: int, twins: Sequence[Life], seen: int) -> int:
    """How large a slot was that `commit` deletes; sets its flags too.

    What is reachable mostly stays so: a commit sets again, cut or joined, what it deletes.
    So the slot reached as far as the same memory is set again, and as far as anything is set
    without a gap.  One that is set again at its place is shorter or longer now, and a later one
    there may be as it was.  One that is not set again may come back later, here or elsewhere (as
    a BAR does).

    `twins` are other slots that begin with the same memory, the next ones first; `seen` is how much
    of it was ever seen from there on.
    """
    added = [
        done.life
        for done in commit.done
        if done.kind is OpKind.ADD and done.ret == 0 and done.life.as_id == life.as_id
    ]
    again = [
        other
        for other in sorted(added, key=_gpa)
        if _distance(other) is not None
        and _distance(other) == _distance(life)
        and life.gpa < other.end
        and other.gpa < bound
    ]
    model = next(iter((*again, *twins)), None)
    if model is not None:
        life.flags = life.first_flags = model.first_flags
    end = max((other.end for other in again), default=life.gpa)
    for start, stop in join(sorted((other.gpa, other.end) for other in added)):
        if start <= life.gpa < stop:
            end = max(end, stop)
    if end >= bound:
        return bound - life.gpa
    here = [twin for twin in twins if twin.gpa == life.gpa and twin.end <= bound]
    if end > life.gpa:
        if [other.gpa for other in again] == [life.gpa]:
            end = next((twin.end for twin in here if twin.end != again[0].end), end)
        return end - life.gpa
    seen = next((twin.end - twin.gpa for twin in (*here, *twins)), seen)
    return min(seen or _DEFAULT_SIZE, bound - life.gpa)


class _Memory:
    """Host memory that slots of known size show."""

    def __init__(self, lives: Iterable[Life]) -> None:
        self._from: dict[int, list[Life]] = {}
        self._starts: list[int] = []
        self._reach: list[int] = []  # how far the slots up to here reach
        known = [(life.hva, life) for life in lives if life.hva is not None and life.size]
        for hva, life in sorted(known, key=itemgetter(0)):
            self._from.setdefault(hva, []).append(life)
            end = hva + life.end - life.gpa
            self._starts.append(hva)
            self._reach.append(max(end, self._reach[-1] if self._reach else 0))

    def beginning(self, life: Life) -> list[Life]:
        """The slots that begin with the same memory, in the order of the file."""
        return self._from.get(life.hva, []) if life.hva is not None else []

    def behind(self, life: Life) -> int:
        """How far memory was seen from where `life` begins; 0 when it was not."""
        if life.hva is None:
            return 0
        i = bisect_right(self._starts, life.hva) - 1
        return max(self._reach[i] - life.hva, 0) if i >= 0 else 0


def _distance(life: Life) -> int | None:
    """Of host address and gpa: the same for all that shows memory at its place."""
    return life.hva - life.gpa if life.hva is not None else None


def _gpa(life: Life) -> int:
    return life.gpa


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
        named, taken = history.named.get(as_id, set()), history.taken.get(as_id, set())
        above = max((*named, *taken), default=-1) + 1
        ids = (*sorted(taken), *range(above, LAST_SLOT + 1), *range(above))
        free = (i for i in dict.fromkeys(ids) if i not in named)
        for life in sorted(lives, key=_gpa):
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
        remarks.add(f"slots that were there all the time, at places not told: {hidden}")
