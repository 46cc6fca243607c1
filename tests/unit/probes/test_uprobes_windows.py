"""Hits to windows: what is told is true and complete, and only true when hits are missing."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.probes import StallKind
from qmp_memlistener.probes.uprobes.calls import Window
from qmp_memlistener.probes.uprobes.decode import Hit
from qmp_memlistener.probes.uprobes.functions import ROLES, Func, Point
from qmp_memlistener.probes.uprobes.windows import SLOT_IOCTLS, Windows

MAIN, OTHER = 10, 11
BQL, MUTEX = 0x5000, 0x6000
FILE = 0x7000
TOP = 0x7FFF_0000_0000
NO_ARGS = (0, 0, 0, 0, 0)
Shape = tuple[StallKind, int, int, int]
"""StallKind, tid, start, end."""


def point(role: Func, is_return: bool = False) -> Point:
    return Point(role, ROLES[role].group, 0, is_return)


@dataclass
class Thread:
    """Plays a thread that calls functions: makes the hits, and knows the windows."""

    tid: int
    t_ns: int = 1000
    sp: int = TOP
    hits: list[Hit] = field(default_factory=list)
    truth: list[Shape] = field(default_factory=list)
    held_since: int | None = None

    def hit(
        self,
        role: Func,
        *args: int,
        is_return: bool = False,
        result: int = 0,
        stack: bytes = b"",
    ) -> int:
        self.t_ns += 10
        five = (*args, *NO_ARGS)[:5]
        assert len(five) == 5
        sp = self.sp + (8 if is_return else 0)
        self.hits.append(Hit(self.t_ns, self.tid, point(role, is_return), five, sp, result, stack))
        return self.t_ns

    def call(
        self,
        role: Func,
        *args: int,
        inside: Callable[[], None] = lambda: None,
        result: int = 0,
        stack: bytes = b"",
    ) -> tuple[int, int]:
        self.sp -= 64
        start = self.hit(role, *args, stack=stack)
        inside()
        end = self.hit(role, is_return=True, result=result)
        self.sp += 64
        return start, end

    def tell(self, kind: StallKind, start: int, end: int) -> None:
        self.truth.append((kind, self.tid, start, end))

    def commit(self, inside: Callable[[], None]) -> None:
        self.tell(StallKind.COMMIT, *self.call(Func.COMMIT, inside=inside))

    def slot(self, ret: int = 0) -> None:
        stack = bytes(32) + struct.pack("<IIQQQ", 1 << 16 | 7, 1, 0x100000, 0x2000, 0xABC)
        args = (0, SLOT_IOCTLS[0], self.sp - 64 + 32)
        result = ret & 0xFFFFFFFF
        span = self.call(Func.SLOT_IOCTL, *args, stack=stack, result=result)
        self.tell(StallKind.SLOT_UPDATE, *span)

    def other_ioctl(self) -> None:
        self.call(Func.SLOT_IOCTL, 0, 0xAE61, self.sp, stack=bytes(64))

    def inhibit(self, inside: Callable[[], None]) -> None:
        start, _ = self.call(Func.INHIBIT_BEGIN)
        inside()
        self.tell(StallKind.VCPU_INHIBIT, start, self.hit(Func.INHIBIT_END))

    def lock(self) -> None:
        start, end = self.call(Func.BQL_LOCK, FILE, 5)
        self.tell(StallKind.BQL_WAIT, start, end)
        self.held_since = end

    def _release(self, now: int) -> None:
        assert self.held_since is not None
        self.tell(StallKind.BQL_HOLD, self.held_since, now)
        self.held_since = None

    def unlock(self) -> None:
        self._release(self.hit(Func.BQL_UNLOCK))

    def wait(self, mutex: int, timed: bool) -> None:
        role = Func.COND_TIMEDWAIT if timed else Func.COND_WAIT
        args = (1, mutex, 100, FILE, 9) if timed else (1, mutex, FILE, 9)
        start, end = self.call(role, *args)
        if mutex == BQL and self.held_since is not None:
            self._release(start)
            self.held_since = end


STEPS = st.recursive(
    st.sampled_from(["slot", "other", "wait bql", "wait other", "timedwait bql"]),
    lambda inner: st.tuples(st.sampled_from(["commit", "inhibit", "hold"]), st.lists(inner)),
    max_leaves=12,
)


def play(thread: Thread, steps: Iterable[object]) -> None:
    """Carry out generated steps; the BQL is not taken twice, nor waited with unless held."""
    for step in steps:
        if isinstance(step, tuple):
            name, inside = step

            def within(inside: Iterable[object] = inside) -> None:
                play(thread, inside)

            if name == "hold" and thread.held_since is None:
                thread.lock()
                within()
                thread.unlock()
            elif name == "inhibit":
                thread.commit(lambda: thread.inhibit(thread.slot))
            else:
                thread.commit(within)
        elif step == "slot":
            thread.slot()
        elif step == "other":
            thread.other_ioctl()
        elif step == "wait other":
            thread.wait(MUTEX, False)
        elif thread.held_since is not None:
            thread.wait(BQL, step == "timedwait bql")


def new(hit_ns: int = 0) -> Windows:
    windows = Windows(MAIN, hit_ns=hit_ns)
    for tid in (MAIN, OTHER):
        windows.thread(tid, 0)
    windows.bql = BQL
    windows.bql_on(0)
    windows.guest_runs(True)
    return windows


def fold(windows: Windows, hits: Iterable[Hit]) -> list[Window]:
    for hit in hits:
        windows.feed(hit)
    return windows.take()[0]


def shapes(windows: Iterable[Window]) -> list[Shape]:
    return sorted((w.kind, w.tid, w.start_ns, w.end_ns) for w in windows)


PROGRAMS = st.lists(STEPS, max_size=8)


@given(PROGRAMS, PROGRAMS)
def test_everything_is_told_and_nothing_else(one: list[object], two: list[object]) -> None:
    main, other = Thread(MAIN), Thread(OTHER, t_ns=1003)
    play(main, one)
    play(other, two)
    hits = sorted(main.hits + other.hits, key=lambda h: h.t_ns)
    assert shapes(fold(new(), hits)) == sorted(main.truth + other.truth)


@given(PROGRAMS, st.data())
def test_missing_hits_make_no_false_window(program: list[object], data: st.DataObject) -> None:
    thread = Thread(MAIN)
    play(thread, program)
    hits = list(thread.hits)
    for _ in range(data.draw(st.integers(1, 3))):
        first = data.draw(st.integers(0, len(hits)))
        last = data.draw(st.integers(first, len(hits)))
        after = hits[last].t_ns if last < len(hits) else thread.t_ns
        hits[first:last] = [Hit(after, MAIN, None, NO_ARGS, 0, 0, b"")]
    found = shapes(fold(new(), hits))
    assert set(found) <= set(thread.truth)
    assert len(set(found)) == len(found)


@given(PROGRAMS, st.integers(0, 200))
def test_probes_that_come_later_make_no_false_window(program: list[object], late: int) -> None:
    """Hits from before all probes of the thread, or all those of the lock, were there are void."""
    thread = Thread(MAIN)
    play(thread, program)
    windows = new()
    windows.thread(MAIN, 1000 + late)
    windows.bql_on(1000 + 2 * late)
    assert set(shapes(fold(windows, thread.hits))) <= set(thread.truth)


@given(PROGRAMS)
def test_without_the_address_of_the_lock_no_hold_spans_a_wait(program: list[object]) -> None:
    thread = Thread(MAIN)
    play(thread, program)
    windows = new()
    windows.bql = None
    assert set(shapes(fold(windows, thread.hits))) <= set(thread.truth)


def test_the_cost_of_our_own_hits_is_taken_off() -> None:
    """Four hits: entry and return of the commit, and of an ioctl in it; 3 ns each."""
    thread = Thread(MAIN)
    thread.commit(thread.other_ioctl)
    (window,) = fold(new(hit_ns=3), thread.hits)
    assert (window.end_ns - window.start_ns, window.at_least_ns) == (30, 30 - 4 * 3)
    (window,) = fold(new(hit_ns=1000), thread.hits)
    assert window.at_least_ns == 0


def test_an_inner_commit_and_the_slot_updates_in_it() -> None:
    thread = Thread(MAIN)
    thread.commit(lambda: thread.commit(lambda: thread.slot(ret=-22)))
    update, inner, outer = fold(new(), thread.hits)
    assert (inner.inner, inner.updates, outer.inner, outer.updates) == (True, 1, False, 1)
    seen = update.update
    assert seen is not None
    assert (seen.as_id, seen.slot, seen.flags, seen.gpa) == (1, 7, 1, 0x100000)
    assert (seen.size, seen.hva, seen.ret) == (0x2000, 0xABC, -22)


def test_a_structure_that_is_elsewhere_is_counted() -> None:
    thread = Thread(MAIN)
    thread.call(Func.SLOT_IOCTL, 0, SLOT_IOCTLS[1], TOP + 4096, stack=bytes(512))
    windows = new()
    assert fold(windows, thread.hits) == []
    assert windows.undecoded == 1


def test_an_inhibition_is_sure_from_the_return_of_its_begin() -> None:
    thread = Thread(MAIN)
    thread.inhibit(thread.slot)
    window = next(w for w in fold(new(), thread.hits) if w.kind is StallKind.VCPU_INHIBIT)
    assert (window.end_ns - window.start_ns, window.at_least_ns) == (40, 30)


def test_the_place_is_that_of_the_lock_and_after_a_wait_that_of_the_wait() -> None:
    thread = Thread(OTHER)
    thread.lock()
    thread.wait(BQL, timed=False)
    thread.wait(BQL, timed=True)
    thread.unlock()
    holds = [w for w in fold(new(), thread.hits) if w.kind is StallKind.BQL_HOLD]
    assert [(w.site.file, w.site.line) for w in holds if w.site] == [
        (FILE, 5),
        (FILE, 9),
        (FILE, 9),
    ]


def test_a_lock_taken_twice_shows_that_a_release_was_missed() -> None:
    thread = Thread(OTHER)
    thread.lock()
    thread.lock()
    thread.unlock()
    windows = new()
    holds = [w for w in fold(windows, thread.hits) if w.kind is StallKind.BQL_HOLD]
    assert shapes(holds) == thread.truth[-1:]
    assert windows.contradictions == 1


def learn(*roles_and_args: tuple[Func, int, int]) -> int | None:
    """Feed entries (role, first argument, how far below the top) to one who knows no address."""
    windows = Windows(MAIN)
    windows.thread(MAIN, 0)
    for t, (role, arg, down) in enumerate(roles_and_args):
        windows.feed(Hit(t, MAIN, point(role), (arg, 0, 0, 0, 0), TOP - down, 0, b""))
    return windows.bql


def test_the_address_is_that_of_the_first_mutex_inside_the_lock_function() -> None:
    lock, mutex = Func.LEARN_LOCK, Func.MUTEX_LOCK
    assert learn((mutex, MUTEX, 0), (lock, FILE, 0), (mutex, BQL, 48), (mutex, MUTEX, 48)) == BQL
    assert learn((lock, FILE, 0), (mutex, BQL, 0)) == BQL, "a jump at the function's end"
    assert learn((mutex, MUTEX, 0)) is None
    assert learn((lock, FILE, 64), (mutex, MUTEX, 0)) is None, "not below the lock function"


class Pauses:
    """The main thread pausing and resuming, and others meanwhile."""

    def __init__(self, running: bool = True) -> None:
        self.windows = new()
        self.main = Thread(MAIN)
        self.other = Thread(OTHER)
        if not running:
            self.windows = Windows(MAIN)
            self.windows.thread(MAIN, 0)
            self.windows.guest_runs(False)

    def pause(self, inside: Callable[[], None] = lambda: None) -> tuple[int, int]:
        def both() -> None:
            self.main.hit(Func.CLOCK, 1, 0)
            inside()

        return self.main.call(Func.PAUSE, inside=both)

    def resume(self, real: bool = True) -> tuple[int, int]:
        def clock() -> None:
            if real:
                self.main.hit(Func.CLOCK, 1, 1)

        return self.main.call(Func.RESUME, inside=clock)

    def found(self) -> list[Window]:
        hits = sorted(self.main.hits + self.other.hits, key=lambda h: h.t_ns)
        return [w for w in fold(self.windows, hits) if w.kind is StallKind.VCPU_PAUSE]


def test_a_pause_is_sure_between_the_two_calls() -> None:
    p = Pauses()
    start, paused = p.pause()
    resume, end = p.resume()
    (window,) = p.found()
    assert (window.start_ns, window.end_ns) == (start, end)
    assert (window.at_least_ns, window.handoffs) == (resume - paused, 0)


def test_others_that_take_the_lock_while_pausing_are_counted() -> None:
    p = Pauses()

    def others() -> None:
        p.other.t_ns = p.main.t_ns
        for _ in range(3):
            p.other.lock()
            p.other.unlock()
        p.other.lock()
        p.other.wait(BQL, timed=False)
        p.main.t_ns = p.other.t_ns

    p.pause(others)
    p.other.t_ns = p.main.t_ns
    p.other.unlock()
    p.other.lock()
    p.main.t_ns = p.other.t_ns
    p.resume()
    (window,) = p.found()
    assert window.handoffs == 5


def test_a_resume_that_finds_the_guest_stopped_does_not_end_the_pause() -> None:
    """system_reset of a stopped guest: pauses again, and resume_all_vcpus returns at once."""
    p = Pauses()
    start, paused = p.pause()
    p.pause()
    p.resume(real=False)
    resume, end = p.resume()
    (window,) = p.found()
    assert (window.start_ns, window.end_ns, window.at_least_ns) == (start, end, resume - paused)


def test_of_a_guest_found_stopped_only_later_pauses_are_told() -> None:
    p = Pauses(running=False)
    p.pause()
    p.resume(real=False)
    p.resume()
    start, _ = p.pause()
    _, end = p.resume()
    assert [(w.start_ns, w.end_ns, w.handoffs) for w in p.found()] == [(start, end, None)]


def test_a_pause_that_has_not_ended_is_told_at_the_end() -> None:
    p = Pauses()
    start, paused = p.pause()
    assert p.found() == []
    p.windows.finish(5000)
    (window,) = p.windows.take()[0]
    assert (window.start_ns, window.end_ns, window.at_least_ns) == (start, 5000, 5000 - paused)


@pytest.mark.parametrize("spoil", ["new thread", "switched off", "missing hits"])
def test_handoffs_are_unknown_unless_all_was_seen(spoil: str) -> None:
    p = Pauses()
    p.pause()
    fold(p.windows, p.main.hits[:2])
    if spoil == "new thread":
        p.windows.thread(12, 0)
    elif spoil == "switched off":
        p.windows.bql_off()
    else:
        p.windows.feed(Hit(1015, OTHER, None, NO_ARGS, 0, 0, b""))
    fold(p.windows, p.main.hits[2:])
    p.main.hits.clear()
    p.resume()
    (window,) = p.found()
    assert window.handoffs is None


COROUTINE, NESTED, MONITOR, QMP_COMMAND = 0x100, 0x200, 0x300, 0x400


def commands(*steps: tuple[Func, int, int]) -> list[tuple[int, int, int]]:
    windows = new()
    for t, (role, first, second) in enumerate(steps):
        windows.feed(Hit(t, MAIN, point(role), (first, second, 0, 0, 0), TOP, 0, b""))
    return [(c.info, c.start_ns, c.end_ns) for c in windows.take()[1]]


def test_a_command_is_what_has_a_monitor() -> None:
    begin = (Func.COMMAND, QMP_COMMAND, 0)
    enter, leave = (Func.CURRENT_MONITOR, COROUTINE, MONITOR), (Func.CURRENT_MONITOR, COROUTINE, 0)
    assert commands(begin, enter, leave) == [(QMP_COMMAND, 1, 2)]
    assert commands(enter, leave) == [(0, 0, 1)], "of an HMP monitor"
    assert commands(leave) == [], "its beginning was not seen"


def test_an_hmp_command_inside_a_qmp_one_is_none_of_its_own() -> None:
    begin = (Func.COMMAND, QMP_COMMAND, 0)
    enter, leave = (Func.CURRENT_MONITOR, COROUTINE, MONITOR), (Func.CURRENT_MONITOR, COROUTINE, 0)
    set_, restore = (Func.CURRENT_MONITOR, COROUTINE, 0x999), enter
    assert commands(begin, enter, set_, restore, leave) == [(QMP_COMMAND, 1, 4)]
    own = (Func.CURRENT_MONITOR, NESTED, 0x999), (Func.CURRENT_MONITOR, NESTED, 0)
    assert commands(begin, enter, *own, leave) == [(QMP_COMMAND, 1, 4)]
