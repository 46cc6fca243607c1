"""Listeners on a real guest: QEMU's callback order, and nobody harmed by one that fails."""

from __future__ import annotations

import asyncio
import time

import pytest

from qmp_memlistener import MemoryListener
from qmp_memlistener.guests import (
    QemuBuild,
)
from qmp_memlistener.records import SlotOp
from qmp_memlistener.topology import FlatRange, Hole, Transition
from tests.support.host import patience
from tests.support.live import (
    QEMUS,
    Commits,
    Seen,
    attach_bare,
    best_accel,
    booted,
    builds,
    cases,
    qmp,
)

pytestmark = pytest.mark.qemu


class Diary(MemoryListener):
    """Writes down every callback."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def begin(self) -> None:
        self.calls.append(("begin", None))

    def region_del(self, section: FlatRange) -> None:
        self.calls.append(("region_del", section))

    def region_add(self, section: FlatRange) -> None:
        self.calls.append(("region_add", section))

    def region_nop(self, section: FlatRange) -> None:
        self.calls.append(("region_nop", section))

    def log_start(self, section: FlatRange) -> None:
        self.calls.append(("log_start", section))

    def log_stop(self, section: FlatRange) -> None:
        self.calls.append(("log_stop", section))

    def hole_punched(self, hole: Hole) -> None:
        self.calls.append(("hole_punched", hole))

    def hole_filled(self, hole: Hole) -> None:
        self.calls.append(("hole_filled", hole))

    def slot_changed(self, op: SlotOp) -> None:
        self.calls.append(("slot_changed", op))

    def commit(self, transition: Transition) -> None:
        self.calls.append(("commit", transition))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def of(self, name: str) -> list[object]:
        return [what for called, what in self.calls if called == name]


class AsyncDiary(MemoryListener):
    """The same with coroutines that let others run."""

    def __init__(self) -> None:
        self.sections: list[tuple[str, FlatRange]] = []
        self.commits: list[Transition] = []

    async def region_del(self, section: FlatRange) -> None:
        await asyncio.sleep(0)
        self.sections.append(("region_del", section))

    async def region_add(self, section: FlatRange) -> None:
        await asyncio.sleep(0)
        self.sections.append(("region_add", section))

    async def commit(self, transition: Transition) -> None:
        await asyncio.sleep(0)
        self.commits.append(transition)


class Raising(MemoryListener):
    """Fails in one callback, works in the others."""

    def __init__(self) -> None:
        self.commits = 0

    def region_del(self, section: FlatRange) -> None:
        raise KeyError(section.name)

    async def commit(self, transition: Transition) -> None:  # noqa: ARG002
        self.commits += 1
        await asyncio.sleep(0)
        raise ValueError("commit of a test")


class Hanging(MemoryListener):
    """Never returns from its first callback until it is let go."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.hung = asyncio.Event()
        self.commits = 0

    async def begin(self) -> None:
        self.hung.set()
        await self.release.wait()

    def commit(self, transition: Transition) -> None:  # noqa: ARG002
        self.commits += 1


@cases()
@pytest.mark.asyncio
async def test_a_listener_is_told_in_qemus_order(build: QemuBuild, accel: str, seen: Seen) -> None:
    diary, other = Diary(), AsyncDiary()
    async with booted(build, accel) as vm, attach_bare(vm.target, on_record=seen) as agent:
        agent.register(diary)
        agent.register(other)
        with pytest.raises(ValueError, match="registered already"):
            agent.register(diary)
        await agent.settle()
        # First the present map, as QEMU tells a new listener.
        present = agent.map.view
        assert diary.names == ["begin", *["region_add"] * len(present), "commit"]
        assert diary.of("region_add") == list(present)
        diary.calls.clear()
        other.sections.clear()

        await vm.open_pam()
        await agent.settle()
        (transition,) = diary.of("commit")
        assert isinstance(transition, Transition)
        assert (transition.before, transition.after) == (present, agent.map.view)
        # begin, the del pass, the add pass with what stays in between, both ascending; commit.
        dels, adds = len(transition.removed), len(transition.after)
        assert diary.names[: 1 + dels] == ["begin", *["region_del"] * dels]
        passed = diary.names[1 + dels : 1 + dels + adds]
        assert set(passed) == {"region_add", "region_nop"}
        assert diary.names[-1] == "commit"
        assert diary.names.count("begin") == diary.names.count("commit") == 1
        assert diary.of("region_del") == list(transition.removed)
        second_pass = [what for _, what in diary.calls[1 + dels : 1 + dels + adds]]
        assert second_pass == list(transition.after)
        assert diary.of("region_add") == list(transition.added)
        assert diary.of("region_nop") == list(transition.kept)
        assert diary.of("slot_changed") == seen.ops(1) != []
        assert diary.of("hole_filled") == list(transition.holes_filled) != []
        assert diary.of("hole_punched") == []
        assert other.sections == [
            *(("region_del", s) for s in transition.removed),
            *(("region_add", s) for s in transition.added),
        ]
        assert other.commits[-1] is transition

        await agent.unregister(diary)
        diary.calls.clear()
        await vm.close_pam()
        await agent.settle()
        assert diary.calls == []
        assert len(other.commits) == 3
        with pytest.raises(ValueError, match="not registered"):
            await agent.unregister(diary)


@builds(QEMUS[:1])
@pytest.mark.asyncio
async def test_a_listener_that_raises_or_hangs_harms_no_other(build: QemuBuild, seen: Seen) -> None:
    raising, good, hanging = Raising(), Commits(), Hanging()
    async with booted(build, best_accel(build)) as vm:
        async with attach_bare(vm.target, on_record=seen) as agent:
            for listener in (raising, good):
                agent.register(listener)
            for step in (vm.open_pam, vm.close_pam):
                await step()
                await agent.settle()
            assert len(good.transitions) == len(seen.transitions) == 2
            assert raising.commits == 3
            failures = [n for n in seen.notes if "Raising" in n]
            assert any("region_del" in n and "KeyError" in n for n in failures)
            assert sum("commit of a test" in n for n in failures) == 3

            agent.register(hanging)
            await asyncio.wait_for(hanging.hung.wait(), 5)
            await vm.toggle(20)
            await seen.wait_for(lambda: len(seen.transitions) == 22)
            async with asyncio.timeout(patience(5)):
                while len(good.transitions) < 22:  # noqa: ASYNC110 (its queue is its own)
                    await asyncio.sleep(0)
            assert hanging.commits == 0
            start = time.monotonic()
        # Leaving does not wait for it for ever.
        assert time.monotonic() - start < patience(4)
        seen.check_nothing_wrong()


@builds(QEMUS[:1])
@pytest.mark.asyncio
async def test_settling_does_not_wait_for_ever_for_a_listener_that_hangs(
    build: QemuBuild, seen: Seen
) -> None:
    hanging = Hanging()
    async with (
        booted(build, best_accel(build)) as vm,
        attach_bare(vm.target, on_record=seen) as agent,
    ):
        agent.register(hanging)
        await asyncio.wait_for(hanging.hung.wait(), 5)
        try:
            await vm.open_pam()
            async with asyncio.timeout(6):
                await agent.settle()
            assert len(seen.transitions) == 1
        finally:
            hanging.release.set()


@cases(of=QEMUS[:1])
@pytest.mark.asyncio
async def test_a_subscriber_that_raises_harms_nobody(
    build: QemuBuild, accel: str, seen: Seen
) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("subscriber of a test")

    async with booted(build, accel) as vm, attach_bare(vm.target) as agent:
        agent.subscribe(broken)
        unsubscribe = agent.subscribe(seen)
        await vm.toggle(4)
        async with asyncio.timeout(patience(5)):
            await agent.settle()
        assert len(seen.transitions) == 4
        unsubscribe()
        await vm.toggle(2)
        await agent.settle()
        assert len(seen.transitions) == 4
        assert agent.transitions == 6


@cases("kvm")
@pytest.mark.asyncio
async def test_dirty_logging_is_told(build: QemuBuild, accel: str, seen: Seen) -> None:
    """A migration logs every slot: flag changes and no transition."""
    diary = Diary()
    async with (
        booted(build, accel) as vm,
        attach_bare(vm.target, on_record=seen) as agent,
        qmp(vm.guest.monitors[1]) as monitor,
    ):
        agent.register(diary)
        await agent.settle()
        view = agent.map.view
        slots = list(agent.slots)
        await monitor.execute("migrate-set-parameters", {"max-bandwidth": 4096})
        await monitor.execute("migrate", {"uri": "exec:cat >/dev/null"})
        await seen.wait_for(lambda: len(seen.of(SlotOp)) >= len(slots))
        await monitor.execute("migrate_cancel")
        await seen.wait_for(lambda: len(seen.of(SlotOp)) >= 2 * len(slots))
        await agent.settle()
        ops = seen.of(SlotOp)
        assert {op.op for op in ops} == {"flags"}
        assert {op.transition for op in ops} == {None}
        assert [op.flags & 1 for op in ops] == [1] * len(slots) + [0] * len(slots)
        writable = [r for r in view if r.memslot]
        assert diary.of("log_start") == diary.of("log_stop") == writable
        assert agent.map.view == view
    assert seen.transitions == []
    seen.check_nothing_wrong()
