"""Verbs that measure: limits and exit codes, the freeze, doctor, what is left after kill -9."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.probes.registry import PROBES
from tests.live.test_timeline_live import hold_bql
from tests.live.verbs_support import one_build
from tests.support.host import patience
from tests.support.leftovers import enabled_events, left_behind
from tests.support.live import NO_QEMU, QEMUS, best_accel, booted, builds, cases, qmp
from tests.support.verbs import run_in_terminal, run_verb, started_verb

pytestmark = [pytest.mark.qemu, pytest.mark.skipif(not QEMUS, reason=NO_QEMU)]

STALL_KEYS = {
    "kind",
    "start_ns",
    "end_ns",
    "at_least_ns",
    "at_most_ns",
    "probe",
    "witnesses",
    "thread",
    "site",
    "cause",
}
PROBE_KEYS = {"name", "measures", "usable", "reason", "remedy", "resolution_ns", "cost"}


@cases()
@pytest.mark.asyncio
async def test_a_limit_that_is_exceeded(build: QemuBuild, accel: str) -> None:
    """With the least privilege there is: a second monitor."""
    async with booted(build, accel) as vm, qmp(vm.guest.monitors[1]) as monitor:
        options = ("--probes", "ping", "--max-stall", "main_loop=20ms", "--json")
        async with started_verb("watch", vm.target, *options) as watch:
            await watch.until('"type":"probes"')
            await hold_bql(monitor)
            await watch.until('"type":"violation"')
            ran = await watch.signalled(signal.SIGINT)
    ran.check_error(1, "violation", "remedy: ")
    (violation, *_) = (r for r in ran.documents if r["type"] == "violation")
    assert violation["kind"] == "main_loop"
    assert violation["limit_ns"] == 20_000_000
    found = violation["found_ns"]
    assert isinstance(found, int)
    assert found > 20_000_000
    for stall in (r for r in ran.documents if r["type"] == "stall"):
        assert stall.keys() >= STALL_KEYS


@builds()
@pytest.mark.asyncio
async def test_limits_that_hold(build: QemuBuild) -> None:
    accel = best_accel(build)
    kinds = ("main_loop", "missing") if accel == "kvm" else ("main_loop",)
    options = (word for kind in kinds for word in ("--max-stall", f"{kind}=10s"))
    async with booted(build, accel) as vm:
        ran = await run_verb("watch", vm.target, *options, "--for", "500ms")
    assert ran.code == 0, ran.err
    assert "not measured all the time" not in ran.err


@one_build
@pytest.mark.asyncio
async def test_a_limit_that_nothing_measures_is_no_success(build: QemuBuild) -> None:
    async with booted(build, best_accel(build)) as vm:
        for probes, limit, reason in (
            (("--probes", "none"), "main_loop=5ms", "ping: it was not requested"),
            (("--probes", "ping"), "vcpu_gap=1ms", "pulse: it was not requested"),
            (("--probes", "none", "--freeze"), "commit=1ms", "uprobes: it was not requested"),
        ):
            ran = await run_verb("watch", vm.target, *probes, "--max-stall", limit, "--for", "10s")
            ran.check_error(4, limit.partition("=")[0], reason, "--probes")
            assert ran.seconds < patience(8)


@builds()
@pytest.mark.asyncio
async def test_a_frozen_guest_is_not_touched_and_its_transitions_are_violations(
    build: QemuBuild, tmp_path: Path
) -> None:
    async with booted(build, best_accel(build)) as vm:
        async with started_verb("watch", vm.target, "--freeze", "--json") as watch:
            await watch.until('"type":"probes"')
            for refused in (
                ("show", vm.target),
                ("watch", f"pid:{vm.guest.pid}", "--for", "100ms"),
                ("record", f"unix:{vm.guest.monitors[1]}", "-o", str(tmp_path / "r")),
                ("doctor", vm.target),
            ):
                (await run_verb(*refused)).check_error(
                    1, "frozen", str(watch.process.pid), "remedy: "
                )
            assert not (tmp_path / "r").exists()
            listed = await run_verb("list")
            assert f"{vm.guest.pid} is frozen" in listed.out
            await vm.open_pam()
            await watch.until('"type":"violation"')
            ran = await watch.signalled(signal.SIGINT)
        ran.check_error(1, "violation")
        assert any(r["type"] == "violation" and r["kind"] == "transition" for r in ran.documents)
        assert (await run_verb("show", vm.target)).code == 0


@builds()
@pytest.mark.asyncio
async def test_a_freeze_ends_with_its_holder(build: QemuBuild) -> None:
    async with booted(build, best_accel(build)) as vm:
        async with started_verb("watch", vm.target, "--freeze") as watch:
            await watch.until("probes:")
            await watch.signalled(signal.SIGKILL)
        assert (await run_verb("show", vm.target)).code == 0


@pytest.mark.alone
@builds()
@pytest.mark.asyncio
async def test_nothing_is_left_after_kill_9_with_all_probes_at_work(build: QemuBuild) -> None:
    names = ",".join(PROBES)
    async with booted(build, best_accel(build)) as vm, qmp(vm.guest.monitors[1]) as monitor:
        before = await enabled_events(monitor)
        async with started_verb("watch", vm.target, "--probes", names) as watch:
            await watch.until("probes:")
            await watch.signalled(signal.SIGKILL)
        ran = await run_verb("doctor", "--json")
        (document,) = ran.documents
        assert f"pid {vm.guest.pid}" in str(document["leftovers"])
        assert "profil" in str(document["leftovers"])
        cleaned = await run_verb("doctor", "--clean", "--json")
        (document,) = cleaned.documents
        assert document["leftovers"] == []
        assert left_behind(vm.guest.pid) == []
        assert await enabled_events(monitor) == before
        told = await monitor.execute("human-monitor-command", {"command-line": "sync-profile"})
        assert "off" in str(told)


@cases()
@pytest.mark.asyncio
async def test_doctor_lists_every_probe(build: QemuBuild, accel: str) -> None:
    async with booted(build, accel) as vm:
        (document,) = (await run_verb("doctor", vm.target, "--json")).documents
        probes = document["probes"]
        assert isinstance(probes, list)
        assert [p["name"] for p in probes] == list(PROBES)
        for probe in probes:
            assert probe.keys() == PROBE_KEYS
            assert probe["usable"] is (probe["reason"] is None)
            if not probe["usable"]:
                assert probe["remedy"]
        usable = {p["name"] for p in probes if p["usable"]}
        assert usable >= {"runstate", "trace", "pulse", "ping", "lockprofile"}
        assert ("kvmstats" in usable) is (accel == "kvm")
        lines = await run_in_terminal("doctor", vm.target)
        assert [line for line in lines if len(line) > 80 and "  " in line.strip()] == []


@pytest.mark.asyncio
async def test_wrong_probes_limits_and_bounds_are_bad_usage() -> None:
    for options in (
        ("--probes", "ping,nonsense"),
        ("--probes", ","),
        ("--max-stall", "main_loop"),
        ("--max-stall", "nonsense=5ms"),
        ("--max-stall", "main_loop=fast"),
        ("--max-overhead", "0"),
        ("--max-overhead", "200%"),
    ):
        ran = await run_verb("watch", "/nowhere", *options)
        assert ran.code == 2, options
        assert ran.out == ""
