"""`lab race`, `lab replay`, `lab strategies` as a user runs them: documents, errors, Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from qmp_memlistener.kvmlab import STRATEGIES, Kvm
from tests.kvm.lab_support import slot_log
from tests.support.verbs import Ran, run_in_terminal, run_verb, started_verb

RACE_KEYS = {
    *("name", "skipped", "updates", "updates_hit", "spurious_exits", "internal_errors"),
    *("guest_gap_us", "update_us", "ioctl_us", "missing_us", "vcpu_stall_us"),
    *("dirty_pages_changed", "dirty_pages_lost", "slot_ids_kept", "bitmap_kept"),
}


def run(*args: str | Path) -> Ran:
    return asyncio.run(run_verb("lab", *map(str, args), seconds=60.0))


@pytest.mark.kvm
def test_race_prints_its_document(kvm: Kvm) -> None:
    del kvm
    ran = run("race", "--strategy", "all", "--updates", "4", "--slot-size", "1M", "--json")
    assert (ran.code, ran.err) == (0, "")
    (document,) = ran.documents
    assert document["schema"] == 1
    assert isinstance(document["host"], dict)
    strategies = document["strategies"]
    assert isinstance(strategies, list)
    assert [s["name"] for s in strategies] == [s.name for s in STRATEGIES]
    for entry in strategies:
        assert set(entry) >= RACE_KEYS
        assert entry["updates"] == (None if entry["skipped"] else 4)
        measured = entry.keys() - {"name", "skipped", "fidelity", "model"}
        assert {entry[key] is None for key in measured} == {bool(entry["skipped"])}
    skipped = {s["name"] for s in strategies if s["skipped"]}
    assert {"batch-ioctl", "hole-flag"} <= skipped


@pytest.mark.kvm
def test_tables_fit_a_terminal_of_80_columns(kvm: Kvm, tmp_path: Path) -> None:
    del kvm
    log = slot_log("7.2/pc-pam", tmp_path)
    for args in (
        ("race", "--updates", "2", "--slot-size", "1M", "--guest", "writer"),
        ("race", "--updates", "2", "--slot-size", "1M", "--touch-hole", "--dirty-log"),
        ("replay", str(log), "--first", "3"),
        ("strategies",),
    ):
        lines = asyncio.run(run_in_terminal("lab", *args, seconds=60.0))
        assert [line for line in lines if len(line.rstrip()) > 80] == [], args
        assert any("control" in line for line in lines)


@pytest.mark.kvm
def test_replay_by_file(kvm: Kvm, tmp_path: Path) -> None:
    del kvm
    log = slot_log("10.0/pc-dimm", tmp_path)
    ran = run("replay", log, "--strategy", "inhibit,hole", "--json")
    assert ran.code == 0, ran.err
    (document,) = ran.documents
    strategies = document["strategies"]
    assert isinstance(strategies, list)
    assert [s["return_mismatches"] for s in strategies] == [0, 0, 0]


def wait_for_vcpus(pid: int) -> None:
    """Until a process has vCPUs: KVM maps the state of each."""
    deadline = time.monotonic() + 30
    while "kvm-vcpu" not in Path(f"/proc/{pid}/maps").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.kvm
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_middle(kvm: Kvm, number: signal.Signals) -> None:
    del kvm

    async def interrupted() -> Ran:
        async with started_verb(
            "lab", "race", "--updates", "1000000", "--slot-size", "1M", "--strategy", "pause,hole"
        ) as verb:
            await asyncio.to_thread(wait_for_vcpus, verb.process.pid)
            return await verb.signalled(number)

    ran = asyncio.run(interrupted())
    assert ran.code == 130
    assert ran.err == "interrupted\n"
    assert ran.out == ""


# Errors: none of these needs a KVM that works.


def test_no_device(tmp_path: Path) -> None:
    ran = run("race", "--device", tmp_path / "kvm")
    ran.check_error(4, "there is no KVM here", "remedy:")


def test_strategies_are_listed_without_a_device_too(tmp_path: Path) -> None:
    ran = run("strategies", "--device", tmp_path / "kvm")
    assert ran.code == 0
    assert "there is no KVM here" in ran.out
    assert "remedy: " in ran.out
    ran = run("strategies", "--device", tmp_path / "kvm", "--json")
    (document,) = ran.documents
    assert document["host"] is None
    strategies = document["strategies"]
    assert isinstance(strategies, list)
    assert all(s["skipped"] for s in strategies)


def test_a_device_that_is_not_kvm() -> None:
    run("race", "--device", "/dev/null").check_error(4, "is not KVM", "remedy:")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its rights")
def test_no_permission(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.write_bytes(b"")
    device.chmod(0)
    with pytest.MonkeyPatch.context() as patch:
        # open(2) of a file that nobody may open succeeds for root: be somebody else
        patch.setattr(os, "open", _refused)
        from qmp_memlistener.errors import MissingPrerequisite

        with pytest.raises(MissingPrerequisite, match="Permission denied") as caught:
            Kvm(str(device))
    assert caught.value.exit_code == 4
    assert "root" in str(caught.value.remedy)


def _refused(path: str, _flags: int) -> int:
    raise PermissionError(13, os.strerror(13), path)


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("race", "--strategy", "fast"), ('no strategy "fast"', "presplit")),
        (("race", "--slot-size", "1K"), ("slot of 1024",)),
        (("race", "--hole-size", "1G"), ("does not",)),
        (("race", "--hole-at", "64M"), ("does not",)),
        (("race", "--vcpus", "1000"), ("1000 vCPUs",)),
        (("race", "--touch-hole", "--guest", "code"), ("does not go through",)),
        (
            ("race", "--guest", "pagetable", "--slot-size", "64K", "--hole-size", "32K"),
            ("no room",),
        ),
        (("replay", "/does/not/exist"), ("cannot be read",)),
        (("replay", __file__), ("no usable",)),
    ],
)
def test_bad_input(kvm: Kvm, args: tuple[str, ...], words: tuple[str, ...]) -> None:
    del kvm
    run(*args).check_error(2, *words)


@pytest.mark.parametrize(
    "args",
    [
        ("race", "--updates", "0"),
        ("race", "--slot-size", "big"),
        ("race", "--guest", "none"),
        ("race", "--strategy", ""),
        ("replay",),
        ("nothing",),
    ],
)
def test_bad_usage(args: tuple[str, ...]) -> None:
    ran = run(*args)
    assert ran.code == 2
    assert "Traceback" not in ran.err


@pytest.mark.kvm
def test_out_of_slots(kvm: Kvm) -> None:
    """More slots than a VM may have: those strategies are skipped, and none runs."""
    del kvm
    ran = run("race", "--slots", "40000", "--strategy", "naive", "--json")
    ran.check_error(4, "it takes 400", "slots", "remedy:")
    (document,) = ran.documents
    strategies = document["strategies"]
    assert isinstance(strategies, list)
    assert all("slots" in s["skipped"] for s in strategies)


@pytest.mark.kvm
def test_what_no_kernel_has(kvm: Kvm) -> None:
    """It alone was asked for: its plan is told all the same, but nothing ran."""
    del kvm
    ran = run("race", "--strategy", "hole-flag", "--updates", "2", "--json")
    ran.check_error(4, "none of the requested strategies", "hole-flag: no kernel has it", "remedy:")
    (document,) = ran.documents
    strategies = document["strategies"]
    assert isinstance(strategies, list)
    assert strategies[1]["model"]["operations"] == 1


@pytest.mark.kvm
def test_doctor_says_whether_the_lab_runs(kvm: Kvm) -> None:
    del kvm
    ran = asyncio.run(run_verb("doctor", "--json", seconds=60.0))
    (document,) = ran.documents
    checks = document["checks"]
    assert isinstance(checks, list)
    found = {check["name"]: check for check in checks if check["name"].startswith("lab")}
    assert [check["usable"] for name, check in found.items() if name.startswith("lab (")] == [True]
    for name, check in found.items():
        assert check["usable"] or check["reason"], name


@pytest.mark.kvm
def test_out_of_memory(kvm: Kvm) -> None:
    del kvm
    run("race", "--slot-size", "100000T", "--strategy", "naive").check_error(
        1, "no room", "remedy:"
    )
