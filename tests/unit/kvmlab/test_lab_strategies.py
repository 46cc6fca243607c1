"""The lab's strategies by name, and what of a host keeps one from running."""

from __future__ import annotations

import msgspec
import pytest

from qmp_memlistener.errors import InputError
from qmp_memlistener.kvmlab.abi import Cap
from qmp_memlistener.kvmlab.layout import Layout
from qmp_memlistener.kvmlab.measuring import Totals, Update
from qmp_memlistener.kvmlab.race import model_of
from qmp_memlistener.kvmlab.strategies import CONTROL, STRATEGIES, select, why_not


class Host:
    """A KVM with some capabilities."""

    def __init__(self, **values: int) -> None:
        self._values = values

    def capability(self, cap: Cap) -> int:
        return self._values.get(cap.name, 0)


EVERYTHING = {cap.name: 1 for cap in Cap} | {"NR_MEMSLOTS": 509, "VM_TYPES": 3}


def test_the_control_always_runs_first_and_none_twice() -> None:
    names = [s.name for s in select(["pause", "naive", "pause", CONTROL])]
    assert names == [CONTROL, "pause", "naive"]
    assert select(["all"]) == STRATEGIES


def test_families_and_sizes() -> None:
    assert [s.name for s in select(["presplit"])][1:] == [
        "presplit-4k",
        "presplit-64k",
        "presplit-2m",
    ]
    (_, one) = select(["presplit-128k"])
    assert one.chunk == 128 << 10
    assert "128 KiB" in one.fidelity


@pytest.mark.parametrize(
    "name", ["", "fast", "presplit-3k", "presplit-1k", "presplit-12k", "Naive"]
)
def test_no_strategy(name: str) -> None:
    with pytest.raises(InputError, match="no strategy") as caught:
        select([name])
    assert "presplit-SIZE" in str(caught.value.remedy)


def test_every_strategy_says_what_it_stands_for() -> None:
    assert len({s.fidelity for s in STRATEGIES}) == len(STRATEGIES)
    assert all(len(s.fidelity) > 20 for s in STRATEGIES)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.name)
def test_what_is_missing_is_named(strategy: object) -> None:
    from qmp_memlistener.kvmlab.strategies import LabStrategy

    assert isinstance(strategy, LabStrategy)
    for cap in strategy.needs:
        host = Host(**{**EVERYTHING, cap.name: 0})
        assert f"KVM_CAP_{cap.name}" in str(why_not(strategy, host))  # type: ignore[arg-type]
    if strategy.only_model is not None:
        assert why_not(strategy, Host(**EVERYTHING)) == strategy.only_model  # type: ignore[arg-type]


def test_slots_are_counted() -> None:
    (_, strategy) = select(["presplit-4k"])
    host = Host(**EVERYTHING)
    assert why_not(strategy, host, slots=509) is None  # type: ignore[arg-type]
    assert "510 slots" in str(why_not(strategy, host, slots=510))  # type: ignore[arg-type]


def test_protected_vms_are_asked_for_by_their_bit() -> None:
    (_, strategy) = select(["hole-attributes"])
    host = Host(**{**EVERYTHING, "VM_TYPES": 1})
    assert "KVM_X86_SW_PROTECTED_VM" in str(why_not(strategy, host))  # type: ignore[arg-type]
    assert why_not(strategy, Host(**EVERYTHING)) is None  # type: ignore[arg-type]


def test_models_say_what_no_kernel_runs() -> None:
    ground = Layout(size=16 << 20, logged=True)
    found = {s.name: model_of(s, ground) for s in STRATEGIES}
    assert (found["naive"].operations, found["naive"].atomic) == (3, False)
    assert found["naive"].exposed_bytes == (16 << 20) - 4096
    assert found["batch-ioctl"].atomic
    assert not found["batch-ioctl"].slot_ids_kept
    assert found["batch-ioctl"].bitmap_dropped_bytes == 512
    assert (found["hole-flag"].operations, found["hole-flag"].slot_ids_kept) == (1, True)
    assert found["hole-flag"].bitmap_dropped_bytes == 1  # that of the hole's page
    assert found["presplit-4k"].exposed_bytes == 0
    assert 0 < found["presplit-2m"].exposed_bytes < 2 << 20


def update(**changes: int) -> Update:
    base = Update(gap_ns=5, took_ns=4, calls_ns=3, missing_ns=2, stall_ns=1)
    return msgspec.structs.replace(base, **changes)


def test_totals_count_updates_and_harm() -> None:
    found = Totals.of(
        [update(), update(spurious=3, gap_ns=9), update(shutdowns=1, pages_lost=2), update(hole=4)]
    )
    assert (found.updates, found.hit, found.spurious, found.hole) == (4, 2, 3, 4)
    assert (found.shutdowns, found.pages_lost, found.guest_gap.max_ns) == (1, 2, 9)
    document = found.as_json()
    assert document["internal_errors"] == 1
    assert document["deaths"] == {"internal_error": 0, "shutdown": 1}
    assert document["guest_gap_us"] == {"p50": 0.005, "p90": 0.009, "p99": 0.009, "max": 0.009}
