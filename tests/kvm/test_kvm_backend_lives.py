"""A mirror's backend on a real KVM after any sequence of maps, and after failures anywhere."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmp_memlistener.errors import OperationFailed
from qmp_memlistener.kvmlab import LabVm
from qmp_memlistener.kvmlab.backend import KvmBackend
from qmp_memlistener.mirror.backend import ModelBackend
from qmp_memlistener.mirror.mirror import Mirror
from qmp_memlistener.topology import FlatView
from qmp_memlistener.updates.model import Strategy
from tests.kvm.backend_support import WORD, wait_until
from tests.unit.memslots.memslots_model import PAGE, PAGES, Content, content_of, views
from tests.unit.mirror.mirror_model import Pausing, Told

pytestmark = pytest.mark.kvm

LIVES = st.lists(views(), min_size=1, max_size=6)
slow = settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def content(lab: KvmBackend) -> dict[int, Content]:
    """What a guest of the lab finds in each page, by page number."""
    found: dict[int, Content] = {}
    for slot in lab.slots():
        for start, end in slot.mapped:
            for gpa in range(start, end, PAGE):
                lab.memory.stamp((slot.block, slot.owner), (slot.offset or 0) + gpa - slot.gpa)
    for page in range(PAGES):
        word = lab.read(page * PAGE)
        behind = lab.memory.stamped(word) if word is not None else None
        assert (behind is None) == (word is None), "memory that nobody stamped"
        if behind is not None:
            assert behind.block is not None
            found[page] = (behind.block, behind.offset)
    return found


def emptied(lab: KvmBackend) -> KvmBackend:
    """For the next example: making a VM anew for each would take longer than the example."""
    for slot in lab.slots():
        assert lab.delete_slot(slot) is None
    assert lab.kvm_slots() == []
    return lab


@pytest.mark.parametrize("strategy", list(Strategy))
def test_a_guest_finds_each_map_that_was_told(running: KvmBackend, strategy: Strategy) -> None:
    """Page by page, and as the model has it."""
    lab = running

    @slow
    @given(LIVES, st.sampled_from([None, 0, 1, 64]))
    def lives(maps: list[FlatView], max_holes: int | None) -> None:
        async def run() -> None:
            model = ModelBackend()
            told = [
                Told(Mirror(backend, strategy, pause=Pausing(), max_holes=max_holes))
                for backend in (emptied(lab), model)
            ]
            for view in maps:
                for tell in told:
                    await tell(view)
                assert lab.slots() == model.slots()
                assert content(lab) == content_of(view)
                assert await told[0].mirror.check(view) == ()
            assert lab.verify().good

        asyncio.run(run())

    lives()


def test_dirty_pages_after_any_sequence_of_maps(lab: KvmBackend) -> None:
    """Under `hole`: none that the model has is lost, and none is told that nobody wrote."""

    @slow
    @given(LIVES, st.randoms(use_true_random=False))
    def lives(maps: list[FlatView], random: object) -> None:
        async def run() -> None:
            choose = random.random  # type: ignore[attr-defined]  # a Random
            model = ModelBackend()
            told = [
                Told(Mirror(backend, Strategy.HOLE, max_holes=None))
                for backend in (emptied(lab), model)
            ]
            written: set[int] = set()
            for view in maps:
                for tell in told:
                    await tell(view)
                    for r in view:
                        await tell.mirror.log_start(r)
                for gpa in range(0, PAGES * PAGE, PAGE):
                    if choose() < 0.5 and model.write(gpa):
                        assert lab.write(gpa, WORD)
                        written.add(gpa)
            dirty = {p for s in model.slots() for p in model.dirty(s.slot) if s.logged}
            mapped = {p * PAGE for p in content_of(maps[-1])}
            assert dirty <= lab.dirty_pages() <= written & mapped

        asyncio.run(run())

    lives()


class Failing:
    """Makes KVM's nth slot ioctl from now on fail, as it does when memory is short."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        real = LabVm.region

        def region(vm: LabVm, *args: int) -> int:
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    return -errno.ENOMEM
            return real(vm, *args)

        monkeypatch.setattr(LabVm, "region", region)

    @contextmanager
    def after(self, calls: int) -> Iterator[None]:
        self.left = calls
        try:
            yield
        finally:
            self.left = None


@pytest.mark.parametrize("strategy", list(Strategy))
def test_after_a_failure_anywhere_a_resync_puts_it_right(
    running: KvmBackend, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = running
    failing = Failing(monkeypatch)
    failed: list[str] = []

    @slow
    @given(LIVES, st.integers(0, 12), st.sampled_from([None, 1]))
    def lives(maps: list[FlatView], calls: int, max_holes: int | None) -> None:
        async def run() -> None:
            mirror = Mirror(emptied(lab), strategy, pause=Pausing(), max_holes=max_holes)
            told = Told(mirror)
            with failing.after(calls):
                for view in maps:
                    try:
                        await told(view)
                    except OperationFailed as exc:
                        failed.append(exc.message)
                        assert not mirror.in_step
            if not mirror.in_step:
                assert lab.verify().good, "what is held is what is shown, also in between"
                await mirror.resync()
            assert content(lab) == content_of(maps[-1])
            assert lab.verify().good
            beats = lab.beats()
            wait_until(lambda: all(b > a for a, b in zip(beats, lab.beats(), strict=True)))

        asyncio.run(run())

    lives()
    assert failed
    assert all("Cannot allocate memory" in text for text in failed)
