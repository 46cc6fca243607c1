"""What the kernel's lines about a thread mean."""

from __future__ import annotations

import pytest

from qmp_memlistener.probes.threads.states import (
    CALLS,
    Activity,
    LoopClassifier,
    Schedule,
    activity_by_wchan,
    is_held_by_host,
    parse_schedstat,
    parse_syscall,
    vcpu_activity,
)

X86, ARM = CALLS[62], CALLS[183]
PPOLL = b"271 0x5646d922df60 0x4 0x7ffdddf97b90 0x0 0x8 0x0 0x7ffdddf97b70 0x7f26985d8366\n"
NESTED = b"271 0x5646d9300000 0x2 0x7ffdddf90000 0x0 0x8 0x0 0x7ffdddf90000 0x7f26985d8366\n"
BQL_IN_LOOP = b"202 0x5646a1cd0000 0x80 0x2 0x0 0x0 0x0 0x7ffdddf97b78 0x7f26985dd829\n"
LOCK_IN_TASK = b"202 0x5646a1cd0000 0x80 0x2 0x0 0x0 0x0 0x7ffdddf976d0 0x7f26985dd829\n"
CONDITION = b"202 0x5646d88cf8bc 0x189 0x0 0x0 0x0 0xffffffff 0x7f2697039520 0x7f2698561f16\n"
EVENT = b"202 0x5646a1cd67a8 0x0 0xffffffff 0x0 0x0 0x0 0x7f26979fe668 0x7f26985dd829\n"
HALTED = b"16 0x9 0xae80 0x0 0x0 0x557f0745e290 0x0 0x7f8700000000 0x7f8703f1d829\n"
WRITE = b"1 0xb 0x7f0000000000 0x1000 0x0 0x0 0x0 0x7f2697039520 0x7f2698561f16\n"


def test_the_main_loop_rests_in_its_own_poll_alone() -> None:
    classify = LoopClassifier(X86)
    found = [
        classify(parse_syscall(line))
        for line in (PPOLL, b"running\n", NESTED, LOCK_IN_TASK, CONDITION, WRITE, PPOLL)
    ]
    rests, blocked = Activity.RESTS, Activity.BLOCKED
    assert found == [rests, Activity.AWAKE, blocked, Activity.LOCK, blocked, blocked, rests]


def test_a_nested_poll_seen_first_is_taken_for_the_loops_until_that_is_seen() -> None:
    classify = LoopClassifier(X86)
    found = [classify(parse_syscall(line)) for line in (NESTED, PPOLL, NESTED)]
    assert found == [Activity.RESTS, Activity.RESTS, Activity.BLOCKED]


def test_the_loop_itself_waits_for_the_lock_less_deep_than_a_task() -> None:
    classify = LoopClassifier(X86)
    classify(parse_syscall(PPOLL))
    assert not classify.deep(parse_syscall(BQL_IN_LOOP))
    assert classify.deep(parse_syscall(LOCK_IN_TASK))
    assert classify.deep(parse_syscall(CONDITION)), "a coroutine has a stack of its own"
    assert not classify.deep(parse_syscall(b"running"))


@pytest.mark.parametrize(
    ("line", "activity"),
    [
        (HALTED, Activity.RESTS),
        (CONDITION, Activity.RESTS),
        (EVENT, Activity.RESTS),
        (LOCK_IN_TASK, Activity.LOCK),
        (WRITE, Activity.BLOCKED),
        (b"running", Activity.AWAKE),
        (b"-1 0x7f2697039520 0x7f2698561f16", Activity.BLOCKED),
    ],
)
def test_what_a_vcpu_is_doing(line: bytes, activity: Activity) -> None:
    assert vcpu_activity(parse_syscall(line), X86) is activity


def test_numbers_are_those_of_the_programs_machine() -> None:
    on_arm = parse_syscall(b"98 0x5646a1cd0000 0x80 0x2 0x0 0x0 0x0 0x7f91000 0x7f29")
    assert vcpu_activity(on_arm, ARM) is Activity.LOCK
    assert vcpu_activity(on_arm, X86) is Activity.BLOCKED
    classify = LoopClassifier(ARM)
    poll = parse_syscall(b"73 0x1 0x4 0x0 0x0 0x8 0x0 0x7f97000 0x7f29")
    assert classify(poll) is Activity.RESTS
    assert poll is not None
    assert poll.name(ARM) == "ppoll"
    assert poll.name(X86) == "system call 73"


@pytest.mark.parametrize("line", [b"", b"1", b"x 0x1 0x2", b"1 2 3 4", b"271 " + b"0x1 " * 20])
def test_other_lines_are_refused(line: bytes) -> None:
    with pytest.raises(ValueError):
        parse_syscall(line)


@pytest.mark.parametrize("line", [b"", b"1 2", b"1 2 3 4", b"a b c"])
def test_other_schedules_are_refused(line: bytes) -> None:
    with pytest.raises(ValueError):
        parse_schedstat(line)


def test_a_schedule() -> None:
    assert parse_schedstat(b"28081423 41767641 57\n") == Schedule(28081423, 41767641, 57)


@pytest.mark.parametrize(
    ("wchan", "main", "vcpu"),
    [
        (b"0", Activity.AWAKE, Activity.AWAKE),
        (b"", Activity.AWAKE, Activity.AWAKE),
        (b"poll_schedule_timeout.constprop.0", Activity.RESTS, Activity.BLOCKED),
        (b"do_sys_poll", Activity.RESTS, Activity.BLOCKED),
        (b"futex_wait_queue", Activity.LOCK, Activity.RESTS),
        (b"futex_do_wait", Activity.LOCK, Activity.RESTS),
        (b"kvm_vcpu_block", Activity.BLOCKED, Activity.RESTS),
        (b"folio_wait_bit_common", Activity.BLOCKED, Activity.BLOCKED),
        (b"do_signal_stop", Activity.HELD, Activity.HELD),
    ],
)
def test_where_a_thread_sleeps(wchan: bytes, main: Activity, vcpu: Activity) -> None:
    assert activity_by_wchan(wchan, vcpu=False) is main
    assert activity_by_wchan(wchan, vcpu=True) is vcpu


def test_a_thread_that_is_stopped_or_frozen_is_held_by_the_host() -> None:
    for wchan in (b"do_signal_stop", b"ptrace_stop.part.0", b"do_freezer_trap", b"__refrigerator"):
        assert is_held_by_host(wchan), wchan
    assert not is_held_by_host(b"poll_schedule_timeout.constprop.0")
