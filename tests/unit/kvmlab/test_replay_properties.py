"""Random histories of slots, written as QEMU would have logged them, are found again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qmp_memlistener.errors import InputError
from qmp_memlistener.kvmlab.replay.read import ReplayInput, read_replay
from qmp_memlistener.memslots import LOG_DIRTY_PAGES, Op, OpKind
from tests.unit.kvmlab.replay_rendering import (
    ORDERS,
    PLAIN,
    SPLIT,
    STAMPS,
    Step,
    check,
    check_apart,
    check_backing,
    histories,
    lines,
    ops_of,
    planned,
    write,
)

FORMS = pytest.mark.parametrize("form", list(ORDERS))
REPEATED = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FORMS
@REPEATED
@given(data=st.data())
def test_a_log_with_marks_is_found_commit_by_commit(
    tmp_path: Path, form: str, data: st.DataObject
) -> None:
    steps = data.draw(histories(ORDERS[form]))
    assume(steps)
    stamp = data.draw(st.sampled_from(STAMPS))
    found = read_replay(write(tmp_path / "log", lines(steps, form, marked=True), stamp))
    check(found)
    assert len(found.initial) == 0
    if form in (PLAIN, SPLIT):
        assert found.rules.order is ORDERS[form]
        assert [t.ops for t in found.transitions] == [s.ops for s in steps]
        for step, t in zip(steps, found.transitions, strict=True):
            assert (t.before, t.after) == (step.before, step.after)
            assert planned(found, t).ops == step.ops
    assert ops_of(found) == [op for s in steps for op in s.ops]
    truth = [
        (slot, hva)
        for slot, hva in zip(
            (slot for t in found.transitions for slot in t.slots),
            (hva for s in steps for hva in s.hvas),
            strict=True,
        )
    ]
    check_backing(found, truth)
    check_apart(found, truth)


@FORMS
@REPEATED
@given(data=st.data())
def test_without_marks_every_operation_is_there_in_order(
    tmp_path: Path, form: str, data: st.DataObject
) -> None:
    steps = data.draw(histories(ORDERS[form]))
    assume(steps)
    found = read_replay(write(tmp_path / "log", lines(steps, form, marked=False)))
    check(found)
    assert ops_of(found) == [op for s in steps for op in s.ops]
    assert found.transitions[-1].after == steps[-1].after
    assert [t.seq for t in found.transitions] == list(range(1, len(found.transitions) + 1))


@FORMS
@REPEATED
@given(data=st.data())
def test_a_log_that_begins_in_a_guests_life(tmp_path: Path, form: str, data: st.DataObject) -> None:
    """Slots from before are where and what they were, as far as the rest of the log can tell."""
    steps = data.draw(histories(ORDERS[form]))
    assume(steps)
    marked = data.draw(st.booleans())
    text = lines(steps, form, marked=marked)
    count = sum("kvm_set" in part for part in text)
    cut = data.draw(st.integers(0, len(text)))
    left = text[cut:]
    gone = count - sum("kvm_set" in part for part in left)
    path = write(tmp_path / "log", left)
    if gone == count:
        with pytest.raises(InputError):
            read_replay(path)
        return
    found = read_replay(path)
    check(found)
    wanted = [op for s in steps for op in s.ops][gone:]
    assert [_about(op) for op in ops_of(found)] == [_about(op) for op in wanted]
    there = {(s.slot, s.gpa): s for s in _table_at(steps, gone)}
    for slot in found.initial:
        if (slot.slot, slot.gpa) in there:
            continue
        # an add that logs from the beginning looks like a change of flags; so does one that comes
        # with such changes, where the deletes of its commit are not in the log
        first = next(op for op in wanted if op.slot == slot.slot)
        assert first.op is OpKind.ADD
        rest = _rest_of_commit(steps, gone)
        changes = any(op.op is OpKind.FLAGS for op in rest)
        assert first.flags & LOG_DIRTY_PAGES or (changes and first in rest)


@REPEATED
@given(data=st.data())
def test_noise_changes_nothing(tmp_path: Path, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(list(ORDERS)))
    steps = data.draw(histories(ORDERS[form]))
    assume(steps)
    text = lines(steps, form, marked=data.draw(st.booleans()))
    clean = read_replay(write(tmp_path / "clean", text))
    rng = random.Random(data.draw(st.integers(0, 1 << 32)))
    noisy = [part for one in text for part in _noise(rng, one)]
    stamp = data.draw(st.sampled_from(STAMPS))
    end = data.draw(st.sampled_from(("\n", "\r\n")))
    dirty = read_replay(write(tmp_path / "noisy", noisy, stamp, end))
    assert _facts(dirty) == _facts(clean)


def _noise(rng: random.Random, one: str) -> list[str]:
    console = (
        *("SeaBIOS (version 1.16)", "", "\x1b[2J", "ré\0\ufffd", "x" * 70_000),
        *("flatview_destroy 0x1 (root 0x2)", "trace-event kvm_set_user_memory on"),
    )
    out = [rng.choice(console) for _ in range(rng.randrange(3))]
    front = rng.choice(("", "", "Booting from Hard Disk...", "[   0.1] x="))
    return [*out, front + one]


def _facts(found: ReplayInput) -> object:
    return [(t.seq, t.ops, t.rets, t.slots) for t in found.transitions]


def _rest_of_commit(steps: list[Step], gone: int) -> tuple[Op, ...]:
    """What the log has of the commit that it begins in; nothing where it begins with one."""
    for step in steps:
        if gone < len(step.ops):
            return step.ops[gone:] if gone else ()
        gone -= len(step.ops)
    return ()


def _about(op: Op) -> tuple[object, ...]:
    """An operation as far as a cut log tells: sizes of deletes are guessed, flags may be adds."""
    if op.op is OpKind.DELETE:
        return ("delete", op.slot, op.gpa)
    return ("set", op.slot, op.gpa, op.size, op.flags)


def _table_at(steps: list[Step], count: int) -> list[Op]:
    """Live slots after so many operations."""
    live: dict[int, Op] = {}
    for op in [op for s in steps for op in s.ops][:count]:
        if op.op is OpKind.DELETE:
            del live[op.slot]
        else:
            live[op.slot] = op
    return list(live.values())
