"""Recorded guests on the lab: KVM answers as it did, and who met missing RAM."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmp_memlistener.errors import InputError
from qmp_memlistener.kvmlab import Kvm, ReplayOptions, replay_document, run_replay
from qmp_memlistener.kvmlab.replay.run import ReplayReport
from tests.kvm.lab_support import recorded, recordings, slot_log

pytestmark = [pytest.mark.kvm, pytest.mark.alone, pytest.mark.timeout(600)]

STRATEGIES = (
    *("naive", "qemu-7.2", "pause", "pause+sync", "inhibit", "batch"),
    *("presplit-2m", "hole", "hole-munmap", "hole-userfault", "hole-split"),
)
QUIET = ("control", "pause", "pause+sync", "inhibit", "batch", "hole", "hole-munmap")
SLOT_SAMPLES = (
    *("7.2/pc-pam", "7.2/q35-tseg", "7.2/pc-migration", "7.2/q35-pciexbar"),
    *("10.0/q35-smbase", "10.0/pc-dimm", "11.1/pc-reset", "11.1/q35-vga"),
)


def is_quick(path: Path) -> bool:
    """Each form once: recordings of ours are of one machine, logs of QEMU of the other."""
    machine = "pc-" if ".jsonl" in path.name else "q35-"
    return path.parent.name == "11.1" and path.name.startswith(machine)


RECORDINGS = [
    pytest.param(
        path,
        id=f"{path.parent.name}/{path.name}",
        marks=() if is_quick(path) else pytest.mark.full,
    )
    for path in recordings()
]


def check(report: ReplayReport) -> None:
    """What holds of every replay, whatever is in it."""
    found = {r.name: r for r in report.results}
    for r in report.results:
        assert r.skipped is None, r.name
        assert r.transitions, r.name
        assert [t.seq for t in r.transitions if t.return_mismatches] == [], r.name
    for name in (*QUIET, "hole-userfault"):
        assert [t.seq for t in found[name].transitions if t.update.hit] == [], name
    assert len({len(r.transitions) for r in report.results}) == 1


@pytest.mark.parametrize("sample", SLOT_SAMPLES)
def test_recorded_steps(kvm: Kvm, sample: str, tmp_path: Path) -> None:
    del kvm
    report = run_replay(str(slot_log(sample, tmp_path)), ReplayOptions(strategies=STRATEGIES))
    check(report)


@pytest.mark.parametrize("path", RECORDINGS)
def test_recorded_guests(kvm: Kvm, path: Path, tmp_path: Path) -> None:
    """Boots, resets, PAM, hotplug: recordings of ours and logs of QEMU, in all their forms."""
    del kvm
    file = recorded(path, tmp_path)
    names = ("naive", "pause+sync", "inhibit", "hole")
    report = run_replay(str(file), ReplayOptions(strategies=names, most=80))
    for r in report.results:
        assert sum(t.return_mismatches for t in r.transitions) == 0, r.name
        if r.name != "naive":
            assert r.totals.hit == 0, r.name


def test_naive_replay_meets_missing_ram_and_the_document_says_so(kvm: Kvm, tmp_path: Path) -> None:
    del kvm
    path = str(slot_log("7.2/pc-pam", tmp_path))
    report = run_replay(path, ReplayOptions(strategies=("naive", "hole"), vcpus=2))
    document = replay_document(report)
    strategies = document["strategies"]
    assert isinstance(strategies, list)
    control, naive, hole = strategies
    assert (control["name"], naive["name"], hole["name"]) == ("control", "naive", "hole")
    assert naive["transitions"] == hole["transitions"] == len(naive["by_transition"]) == 49
    assert naive["ops"] == 171
    assert naive["transitions_hit"] > 0
    assert naive["spurious_exits"] > 0
    assert control["transitions_hit"] == hole["transitions_hit"] == 0
    assert hole["ops"] < naive["ops"]
    for key in ("guest_gap_us", "update_us", "ioctl_us", "missing_us", "vcpu_stall_us"):
        assert set(naive[key]) == {"p50", "p90", "p99", "max"}


def test_only_the_first_transitions(kvm: Kvm, tmp_path: Path) -> None:
    del kvm
    path = str(slot_log("7.2/pc-pam", tmp_path))
    report = run_replay(path, ReplayOptions(strategies=("pause",), most=3))
    assert [len(r.transitions) for r in report.results] == [3, 3]
    with pytest.raises(InputError):
        run_replay(path, ReplayOptions(most=0))


def test_what_kvm_answers_otherwise_is_counted(kvm: Kvm, tmp_path: Path) -> None:
    """A log that claims an overlap was refused although it is none, and the other way round."""
    del kvm
    path = tmp_path / "odd.log"
    line = "kvm_set_user_memory AddrSpace#0 Slot#{} flags=0x0 gpa={} size={} ua={} ret={}\n"
    path.write_text(
        line.format(0, "0x0", "0x100000", "0x7f0000000000", 0)
        + line.format(1, "0x100000", "0x100000", "0x7f0000100000", -17)
        + line.format(1, "0x100000", "0x100000", "0x7f0000100000", 0)
    )
    report = run_replay(str(path), ReplayOptions(strategies=("naive",)))
    naive = report.results[1]
    assert sum(t.return_mismatches for t in naive.transitions) >= 1


def test_operations_that_were_refused_are_refused_again(kvm: Kvm, tmp_path: Path) -> None:
    """Also when their host address tells of no memory that anything else has."""
    del kvm
    path = tmp_path / "refused.log"
    line = "kvm_set_user_memory AddrSpace#0 Slot#{} flags=0x0 gpa={} size={} ua={} ret={}\n"
    path.write_text(
        line.format(0, "0x0", "0x100000", "0x7f0000000000", 0)
        + line.format(1, "0x80000", "0x100000", "0x7e0000000000", -17)
        + line.format(1, "0x200000", "0x100000", "0x7f0000200000", 0)
    )
    report = run_replay(str(path), ReplayOptions(strategies=("naive", "pause", "hole")))
    for r in report.results:
        assert sum(t.return_mismatches for t in r.transitions) == 0, r.name


def test_ram_that_would_take_too_many_slots_is_not_split(kvm: Kvm, tmp_path: Path) -> None:
    """512 MiB in slots of 4 KiB: said before anything is planned, and the others run."""
    del kvm
    path = tmp_path / "large.log"
    line = "kvm_set_user_memory AddrSpace#0 Slot#0 flags=0x0 gpa={} size={} ua={} ret=0\n"
    path.write_text(
        line.format("0x0", "0x20000000", "0x7f0000000000")
        + line.format("0x0", "0x0", "0x7f0000000000")
        + line.format("0x0", "0x10000000", "0x7f0000000000")
    )
    report = run_replay(str(path), ReplayOptions(strategies=("presplit-4k", "hole")))
    _, split, hole = report.results
    assert "slots" in str(split.skipped)
    assert hole.skipped is None
    assert hole.transitions
