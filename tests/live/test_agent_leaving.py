"""Leaving a guest that goes on: whatever happened until then is reported, snapshot or not."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.records import SlotOp
from tests.support.live import Seen, attach_bare, booted, cases, skip_without_kvm

pytestmark = pytest.mark.qemu

TOGGLES = 10


@cases()
@pytest.mark.asyncio
async def test_changes_just_before_leaving_are_reported(
    build: QemuBuild, accel: str, seen: Seen
) -> None:
    skip_without_kvm(build, accel)
    async with booted(build, accel, "pc") as vm:
        async with attach_bare(vm.target, on_record=seen):
            for _ in range(TOGGLES):
                await vm.open_pam()
                await vm.close_pam()
        transitions = seen.transitions
        assert sum(t.merged for t in transitions) >= 2 * TOGGLES
        if accel == "kvm":
            assert len(transitions) == 2 * TOGGLES
            operations = [op for op in seen.of(SlotOp) if not op.predicted]
            assert sum(t.slot_ops for t in transitions) == len(operations) >= 8 * TOGGLES


@cases()
@pytest.mark.asyncio
async def test_what_is_in_the_log_and_not_read_yet_is_reported(
    build: QemuBuild, accel: str, seen: Seen
) -> None:
    skip_without_kvm(build, accel)
    async with booted(build, accel, "pc") as vm:
        async with attach_bare(vm.target, on_record=seen):
            # meanwhile this thread, which would read the log, does nothing
            with ThreadPoolExecutor(1) as pool:
                pool.submit(asyncio.run, vm.open_pam()).result()
        assert sum(t.merged for t in seen.transitions) == 1
        if accel == "kvm":
            assert [t.slot_ops for t in seen.transitions] == [4]
