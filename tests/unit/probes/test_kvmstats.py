"""Differences of counters, vCPUs added up."""

from __future__ import annotations

from qmp_memlistener.probes.kvmstats import Counters, changes


def counters(**values: int) -> Counters:
    """Names as `vm_exits` or `cpu0_exits`."""
    split = {name.split("_", 1)[0]: None for name in values}
    assert set(split) <= {"vm", "cpu0", "cpu1"}
    keys = {tuple(name.split("_", 1)): value for name, value in values.items()}
    return Counters({("" if p == "vm" else p, n): v for (p, n), v in keys.items()}, 0, 1)


def test_vcpus_are_added_up_and_what_did_not_change_is_left_out() -> None:
    before = counters(cpu0_exits=10, cpu1_exits=20, cpu0_nmi=3, cpu1_nmi=3, vm_pages_4k=7)
    after = counters(cpu0_exits=15, cpu1_exits=21, cpu0_nmi=3, cpu1_nmi=3, vm_pages_4k=2)
    assert changes(before, after) == {"exits": 6, "pages_4k": -5}


def test_vcpus_that_come_and_go() -> None:
    """Of neither anything is known: one that comes again has the counters it had when it went."""
    before, after = counters(cpu0_exits=10, cpu1_exits=20), counters(cpu0_exits=11)
    assert changes(before, after) == {"exits": 1, "vcpus_left_out": 1}
    assert changes(after, before) == {"exits": -1, "vcpus_left_out": 1}
    assert changes(counters(), after) == {"vcpus_left_out": 1}


def test_nothing_changed() -> None:
    assert changes(counters(cpu0_exits=1), counters(cpu0_exits=1)) == {}
