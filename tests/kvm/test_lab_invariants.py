"""What must hold of the strategies on real KVM, and that the detectors see harm where it is."""

from __future__ import annotations

import pytest

from qmp_memlistener.kvmlab import Cap, GuestKind, Kvm, RaceOptions, RaceReport, run_race
from qmp_memlistener.kvmlab.measuring import Totals

pytestmark = [pytest.mark.kvm, pytest.mark.alone, pytest.mark.timeout(600)]

UPDATES = pytest.mark.parametrize("updates", [100, pytest.param(400, marks=pytest.mark.full)])
"""In all but one of ten updates a guest meets missing RAM, where there is any."""
HELD = ("pause", "pause+sync", "inhibit", "batch")
MAPPINGS = ("hole", "hole-munmap", "hole-userfault")
HOLES = (*MAPPINGS, "hole-split")


def ran(report: RaceReport) -> dict[str, Totals]:
    return {r.name: r.totals for r in report.results if r.skipped is None}


@UPDATES
def test_ram_that_stays_is_never_missed_but_where_slots_go(kvm: Kvm, updates: int) -> None:
    del kvm
    names = ("naive", "qemu-7.2", *HELD, *HOLES)
    found = ran(run_race(RaceOptions(strategies=names, updates=updates, slot_size=16 << 20)))
    for name, totals in found.items():
        assert totals.updates == updates, name
        if name in ("naive", "qemu-7.2"):
            # the harm is there, so whoever sees none elsewhere would have seen it
            assert totals.hit > 0, name
            assert totals.spurious >= totals.hit, name
            assert totals.missing.p50_ns > 0, name
        else:
            assert (totals.hit, totals.spurious, totals.internal_errors) == (0, 0, 0), name
            assert totals.missing.max_ns == 0, name
        assert (totals.vcpu_stall.p50_ns > 0) == (name in HELD), name
    assert found["hole-split"].vcpu_stall.max_ns == 0, "it was split before"


def test_slots_split_beforehand(kvm: Kvm) -> None:
    """As small as the hole they expose nothing; larger ones what else is in the hole's slot."""
    del kvm
    names = ("presplit-4k", "presplit-64k")
    found = ran(run_race(RaceOptions(strategies=names, updates=60, slot_size=1 << 20)))
    assert (found["presplit-4k"].hit, found["presplit-4k"].missing.max_ns) == (0, 0)
    assert found["presplit-64k"].hit > 0


@UPDATES
def test_dirty_pages(kvm: Kvm, updates: int) -> None:
    del kvm
    names = ("naive", *HELD, *HOLES)
    report = run_race(
        RaceOptions(strategies=names, updates=updates, guest=GuestKind.WRITER, slot_size=4 << 20)
    )
    found = ran(report)
    for name, totals in found.items():
        assert totals.pages_changed > updates, name
    for name in ("pause+sync", "inhibit", "control", *HOLES):
        assert found[name].pages_lost == 0, name
    for name in ("naive", "pause", "batch"):
        assert found[name].pages_lost > 0, name
    kept = {r.name: r.bitmap_kept for r in report.results}
    assert {name for name, good in kept.items() if good} == {"control", *HOLES}


@UPDATES
@pytest.mark.parametrize("guest", [GuestKind.CODE, GuestKind.PAGETABLE])
def test_code_and_page_tables_in_the_slot(kvm: Kvm, guest: GuestKind, updates: int) -> None:
    """Delete and add again kills the guest; nothing else does."""
    del kvm
    options = RaceOptions(
        strategies=("naive", *HELD, *HOLES), updates=updates, guest=guest, slot_size=16 << 20
    )
    found = ran(run_race(options))
    naive = found.pop("naive")
    assert naive.internal_errors + naive.shutdowns > 0
    for name, totals in found.items():
        assert (totals.hit, totals.internal_errors, totals.shutdowns) == (0, 0, 0), name


def test_ids_of_ram_that_stays(kvm: Kvm) -> None:
    del kvm
    names = ("naive", "pause", "presplit-4k", "presplit-2m", *HOLES)
    found = ran(run_race(RaceOptions(strategies=names, updates=4, slot_size=4 << 20)))
    kept = {name for name, totals in found.items() if not totals.ids_changed}
    assert kept == {"control", "presplit-4k", *HOLES}


def test_a_guest_that_goes_to_the_hole_gets_no_ram_there(kvm: Kvm) -> None:
    """The accesses leave the guest, or stop it until the hole is filled; then it goes on."""
    del kvm
    names = ("naive", "pause", *HOLES)
    found = ran(run_race(RaceOptions(strategies=names, updates=40, touch_hole=True)))
    assert found.pop("control").hole == 0
    for name, totals in found.items():
        assert totals.hole >= 20, name
        assert totals.updates == 40, name
    for name in ("pause", *HOLES):
        assert found[name].hit == 0, name


def test_a_hole_of_one_byte_takes_its_page(kvm: Kvm) -> None:
    del kvm
    report = run_race(
        RaceOptions(strategies=("naive", "hole"), updates=4, hole_size=1, slot_size=1 << 20)
    )
    assert report.ram_lost == 4095
    assert all(r.totals.updates == 4 for r in report.results)


def test_several_vcpus(kvm: Kvm) -> None:
    del kvm
    found = ran(
        run_race(RaceOptions(strategies=("naive", "pause", "inhibit", "hole"), updates=60, vcpus=4))
    )
    assert found["naive"].hit > 0
    for name in ("pause", "inhibit", "hole"):
        assert found[name].hit == 0, name


def test_dirty_rings(kvm: Kvm) -> None:
    """What is drained before a delete, vCPUs standing, is complete; a live slot loses nothing."""
    if not kvm.capability(Cap.DIRTY_LOG_RING):
        pytest.skip("this kernel's KVM has no dirty rings (KVM_CAP_DIRTY_LOG_RING)")
    names = ("naive", "pause", "pause+sync", *HOLES)
    found = ran(
        run_race(
            RaceOptions(
                strategies=names,
                updates=60,
                guest=GuestKind.WRITER,
                slot_size=4 << 20,
                rings=True,
            )
        )
    )
    for name in ("control", "pause+sync", *HOLES):
        assert found[name].pages_changed > 60, name
        assert found[name].pages_lost == 0, name
    for name in ("naive", "pause"):
        assert found[name].pages_lost > 0, name
