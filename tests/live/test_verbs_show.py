"""`show`, `list` and `demo` as a user runs them, and the help of all verbs."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.memslots import Rules
from tests.live.verbs_support import check_tables_fit, watched
from tests.support.linux import image
from tests.support.live import QEMUS, Vm, best_accel, booted, builds, cases, qmp
from tests.support.verbs import run_verb

pytestmark = pytest.mark.qemu

SECTION_KEYS = {"start", "size", "kind", "name", "offset", "owner", "memslot"}
HOLE_KEYS = {"start", "size", "offset", "covered_by", "owner"}


@cases()
@pytest.mark.asyncio
async def test_show(build: QemuBuild, accel: str, tmp_path: Path) -> None:
    args = ("-m", "slots=2,maxmem=1G", "-device", "VGA")
    dimm = ("-object", "memory-backend-ram,id=m0,size=16M", "-device", "pc-dimm,id=d0,memdev=m0")
    async with booted(build, accel, "pc", *args, *dimm) as vm:
        shown = await run_verb("show", vm.target, "--json")
        text = await run_verb("show", f"pid:{vm.guest.pid}")
        await check_tables_fit("show", vm.target)
        async with qmp(vm.guest.monitors[0]) as monitor:
            saved = await monitor.execute(
                "human-monitor-command", {"command-line": "info mtree -o"}
            )
    assert (shown.code, shown.err) == (0, "")
    (document,) = shown.documents
    assert document["schema"] == 1
    assert document["address_space"] == "memory"
    ranges = msgspec.convert(document["ranges"], list[dict[str, object]])
    assert all(r.keys() >= SECTION_KEYS for r in ranges)
    starts = [msgspec.convert(r["start"], int) for r in ranges]
    assert starts == sorted(starts)
    blocks = msgspec.convert(document["ram_blocks"], list[dict[str, object]])
    by_name = {b["name"]: b for b in blocks}
    holes = msgspec.convert(by_name["pc.ram"]["holes"], list[dict[str, object]])
    assert all(h.keys() >= HOLE_KEYS for h in holes)
    assert (0xA0000, "vga-lowmem") in [(h["start"], h["covered_by"]) for h in holes]
    assert document["guest"] == {
        **msgspec.convert(document["guest"], dict[str, object]),
        "version": build.version,
        "accel": accel,
        "status": "running",
    }
    (device,) = msgspec.convert(document["memory_devices"], list[dict[str, object]])
    assert (device["id"], device["size"]) == ("d0", 16 << 20)

    # The same from a file.
    assert isinstance(saved, str)
    (tmp_path / "mtree").write_text(saved, newline="")
    from_file = await run_verb("show", "--from", tmp_path / "mtree", "--json")
    (second,) = from_file.documents
    assert second["ranges"] == document["ranges"]
    assert second["ram_blocks"] == document["ram_blocks"]

    assert (text.code, text.err) == (0, "")
    for words in ("vga-lowmem", "pc.ram", "memory devices", "d0"):
        assert words in text.out
    assert ("memslots" in text.out) == (accel == "kvm")


@builds()
@pytest.mark.asyncio
async def test_list(build: QemuBuild) -> None:
    accel = best_accel(build)

    async def entry(vm: Vm) -> dict[str, object]:
        ran = await run_verb("list", "--json")
        assert (ran.code, ran.err) == (0, "")
        (document,) = ran.documents
        assert document.keys() == {"schema", "guests"}
        guests = msgspec.convert(document["guests"], list[dict[str, object]])
        (found,) = (g for g in guests if g["pid"] == vm.guest.pid)
        return found

    def expected(vm: Vm, *states: str) -> dict[str, object]:
        monitors = [
            {"target": f"unix:{path}", "state": state, "why": None}
            for path, state in zip(vm.guest.monitors, states, strict=True)
        ]
        return {
            "pid": vm.guest.pid,
            "name": "a guest",
            "version": build.version,
            "machine": "q35",
            "accel": accel,
            "monitors": monitors,
            "owners": [],
            "targets": [
                "name:a guest",
                f"pid:{vm.guest.pid}",
                *(str(m["target"]) for m in monitors if m["state"] == "free"),
            ],
            "visible": True,
            "notes": [],
            "strategy": "off",
            "frozen": None,
            "left_behind": [],
        }

    async with booted(build, accel, "q35", "-name", "a guest") as vm:
        assert await entry(vm) == expected(vm, "free", "free", "free")
        async with watched(vm, "--probes", "none"):
            assert await entry(vm) == expected(vm, "busy", "free", "free")
            text = await run_verb("list")
            assert (text.code, text.err) == (0, "")
            assert str(vm.guest.pid) in text.out
            assert "a guest" in text.out
            assert "busy" in text.out
            await check_tables_fit("list")
        assert await entry(vm) == expected(vm, "free", "free", "free")


@builds()
@pytest.mark.parametrize("machine", [pytest.param("pc", marks=pytest.mark.full), "q35"])
@pytest.mark.asyncio
async def test_demo(build: QemuBuild, machine: str) -> None:
    """Under the accelerator it chooses, and in words under TCG."""
    which = ("--qemu", build.version, "--machine", machine, "--repeat", "0")
    ran = await run_verb("demo", "--json", *which, seconds=30)
    assert (ran.code, ran.err) == (0, "")
    (document,) = ran.documents
    assert document["schema"] == 1
    accel = best_accel(build)
    assert (document["qemu"], document["machine"]) == (build.version, machine)
    assert (document["accel"], document["source"]) == (accel, "trace")
    assert document["toggles_seen"] == document["toggles"]
    ops, predicted = document["slot_ops"], document["predicted_slot_ops"]
    assert ops
    assert predicted == (ops if accel == "tcg" else 0)

    ran = await run_verb("demo", "--accel", "tcg", *which, seconds=30)
    assert (ran.code, ran.err) == (0, "")
    for words in ("hole punched", "hole filled", "RAM appeared", "(predicted)", "missing in"):
        assert words in ran.out
    assert ("tseg" in ran.out) == (machine == "q35")


@builds(of=QEMUS[:1])
@pytest.mark.asyncio
async def test_the_demo_under_kvm(build: QemuBuild) -> None:
    """It plans with the slots of a guest that has run for a while, whose ids are not those of a new
    one; and what kills a vCPU up to QEMU 7.2 does not when it is steered."""
    if best_accel(build) != "kvm":
        pytest.skip("KVM cannot be used here")
    ran = await run_verb("demo", "--qemu", build.version, "--repeat", "0", seconds=60)
    assert (ran.code, ran.err) == (0, "")
    _, _, plans = ran.out.partition("-- the first transition under every strategy")
    rules = Rules.parse(build.version)
    for words in (f"(rules {rules.order})", "delete     slot", "missing in between", "clear_hole"):
        assert words in plans
    _, steered, race = plans.partition("steered with `hole`")
    assert bool(steered) != rules.queued
    if steered and "left out: " not in race:
        assert "survived 200 writes" in race
        assert "RAM missing" not in race


@builds(of=QEMUS[:1])
@pytest.mark.asyncio
async def test_the_demo_ends_with_a_comparison(build: QemuBuild) -> None:
    image()  # built before, or the reason why not
    which = ("--qemu", build.version, "--accel", "tcg", "--repeat", "1")
    ran = await run_verb("demo", "--json", *which, seconds=90)
    assert (ran.code, ran.err) == (0, "")
    (document,) = ran.documents
    comparison = document["comparison"]
    assert isinstance(comparison, dict)
    assert comparison["ended_early"] is None
    strategies = [r["strategy"] for r in comparison["rounds"]]
    assert sorted(strategies) == ["control", "direct", "hole", "pause"]


@pytest.mark.parametrize("verb", ["list", "show", "watch", "record", "plan", "demo"])
@pytest.mark.asyncio
async def test_help_has_an_example(verb: str) -> None:
    ran = await run_verb(verb, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"Example: qmp-memlistener {verb}" in " ".join(ran.out.split())
    assert all(len(line) <= 80 for line in ran.lines)
