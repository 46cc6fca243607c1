"""Plans: what is asked of QEMU for an intent under a strategy, and what is refused beforehand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.qmp import MemoryDevice
from qmp_memlistener.updates.guest_view import Facts, GuestView
from qmp_memlistener.updates.model import (
    Addition,
    Awaited,
    Plug,
    Resize,
    Role,
    Strategy,
    Unplug,
    UpdatePlan,
    UpdateRefused,
    Value,
)
from qmp_memlistener.updates.plans import plan_update

MIB = 1 << 20
GIB = 1 << 30
PC = GuestView(
    status="running",
    migration=None,
    jobs=(),
    machine="pc-i440fx-10.0",
    nvdimm=False,
    base_memory=GIB,
    max_memory=4 * GIB,
    dimm_slots=4,
    memory_devices=(),
    device_memory=(4 * GIB, 12 * GIB),
)
NONE = Facts({})
DIMM = Facts({}, memory=True, slot=True)
D0 = {Role.DEVICE: frozenset({"d0"})}


def dimm(name: str, size: int, memdev: str, hotpluggable: bool) -> MemoryDevice:
    return MemoryDevice("dimm", name, GIB, size, memdev, hotpluggable)


def virtio_mem(name: str, size: int, requested: int, most: int, block: int) -> MemoryDevice:
    return MemoryDevice(
        "virtio-mem", name, GIB, size, requested=requested, max_size=most, block_size=block
    )


def device(driver: str, name: str = "d0", **properties: Value) -> Addition:
    return Addition(Role.DEVICE, name, {"driver": driver, "id": name, **properties}, typed=True)


def memory(name: str, size: int) -> Addition:
    arguments: dict[str, Value] = {"qom-type": "memory-backend-ram", "id": name, "size": size}
    return Addition(Role.OBJECT, name, arguments, typed=True)


def commands(plan: UpdatePlan) -> list[tuple[str, object]]:
    steps = (*plan.prepare, *plan.update, *plan.finish)
    return [(s.command.name, (s.command.arguments or {}).get("id")) for s in steps]


def dimm_of(size: int) -> Plug:
    return Plug(device("pc-dimm", memdev="m0"), (memory("m0", size),))


def test_backends_come_first_and_can_be_taken_back() -> None:
    plan = plan_update(dimm_of(256 * MIB), Strategy.DIRECT, PC, NONE)
    assert commands(plan) == [("object-add", "m0"), ("device_add", "d0")]
    (backend,) = plan.prepare
    assert backend.undo is not None
    assert (backend.undo.name, backend.undo.arguments) == ("object-del", {"id": "m0"})


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize(
    "view",
    [
        replace(PC, migration="active"),
        *(
            replace(PC, status=status)
            for status in ("postmigrate", "internal-error", "inmigrate", "guest-panicked")
        ),
    ],
    ids=lambda view: view.migration or view.status,
)
def test_a_guest_in_no_state_for_it(view: GuestView, strategy: Strategy) -> None:
    with pytest.raises(UpdateRefused, match="nothing was touched"):
        plan_update(Unplug("d0"), strategy, view, Facts({}, used=D0))


def test_block_jobs_forbid_only_a_pause() -> None:
    view = replace(PC, jobs=("backup",))
    with pytest.raises(UpdateRefused, match="backup"):
        plan_update(dimm_of(MIB), Strategy.PAUSE, view, NONE)
    assert plan_update(dimm_of(MIB), Strategy.DIRECT, view, NONE).update


@pytest.mark.parametrize(
    ("view", "size", "words"),
    [
        (replace(PC, dimm_slots=0), 256 * MIB, "no slots"),
        (
            replace(PC, dimm_slots=1, memory_devices=(dimm("a", MIB, "/objects/a", True),)),
            256 * MIB,
            "all 1 memory slots",
        ),
        (PC, 4 * GIB, "has room for 3072 MiB"),
        (
            replace(PC, memory_devices=(virtio_mem("v", 0, 0, 3 * GIB, 2 * MIB),)),
            256 * MIB,
            "has room for 0 MiB",
        ),
    ],
)
def test_no_room_for_a_dimm(view: GuestView, size: int, words: str) -> None:
    for intent in (dimm_of(size), Resize("+", size)):
        with pytest.raises(UpdateRefused, match=words) as caught:
            plan_update(intent, Strategy.PAUSE, view, DIMM)
        assert caught.value.remedy is not None
        assert "maxmem" in caught.value.remedy


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (replace(PC, device_memory=None, machine="microvm"), "machine microvm has no"),
        (replace(PC, device_memory=None, max_memory=None), "the guest has no device memory"),
    ],
)
def test_a_machine_without_device_memory(view: GuestView, words: str) -> None:
    plug = Plug(device("virtio-mem-pci", memdev="m0"), (memory("m0", MIB),))
    for intent, facts in ((plug, replace(DIMM, slot=False, pci=True)), (dimm_of(MIB), DIMM)):
        with pytest.raises(UpdateRefused, match=words) as caught:
            plan_update(intent, Strategy.DIRECT, view, facts)
        assert "q35" in str(caught.value.remedy)


def test_room_without_slots_is_what_the_machine_keeps_for_it() -> None:
    """QEMU does not tell maxmem then."""
    view = replace(PC, max_memory=None, dimm_slots=0, device_memory=(4 * GIB, 5 * GIB))
    facts = Facts({}, memory=True, pci=True)
    for size, room in ((GIB, True), (2 * GIB, False)):
        plug = Plug(device("virtio-mem-pci", memdev="m0"), (memory("m0", size),))
        if room:
            assert plan_update(plug, Strategy.DIRECT, view, facts).update
            continue
        with pytest.raises(UpdateRefused, match="room for 1024 MiB of more memory, not for 2048"):
            plan_update(plug, Strategy.DIRECT, view, facts)


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({"requested-size": 2 * GIB}, "requested-size is 2048 MiB, and the memory behind d0 has"),
        ({"requested-size": 3 * MIB, "block-size": 2 * MIB}, "no multiple of the block size"),
    ],
)
def test_a_size_that_virtio_mem_never_can_have(properties: dict[str, Value], words: str) -> None:
    asked = {"driver": "virtio-mem-pci", "id": "d0", "memdev": "m0", **properties}
    plug = Plug(Addition(Role.DEVICE, "d0", asked, typed=True), (memory("m0", GIB),))
    with pytest.raises(UpdateRefused, match=words) as caught:
        plan_update(plug, Strategy.DIRECT, PC, Facts({}, memory=True, pci=True))
    assert caught.value.remedy


def test_an_nvdimm_needs_a_machine_that_takes_it() -> None:
    plug = Plug(device("nvdimm", memdev="m0"), (memory("m0", MIB),))
    with pytest.raises(UpdateRefused, match="NVDIMM") as caught:
        plan_update(plug, Strategy.DIRECT, PC, NONE)
    assert "nvdimm=on" in str(caught.value.remedy)
    assert plan_update(plug, Strategy.DIRECT, replace(PC, nvdimm=True), NONE).update


def test_a_dimm_fills_no_hole() -> None:
    with pytest.raises(UpdateRefused, match="memslot of its own") as caught:
        plan_update(dimm_of(MIB), Strategy.HOLE, PC, DIMM)
    assert "virtio-mem" in str(caught.value.remedy)


def test_an_id_in_use() -> None:
    taken = {Role.OBJECT: frozenset({"m0"}), Role.NETDEV: frozenset({"d0"})}
    with pytest.raises(UpdateRefused, match="an object called m0 already"):
        plan_update(dimm_of(MIB), Strategy.DIRECT, PC, Facts({}, used=taken))


def test_unplug_waits_for_the_device_and_then_removes_what_it_stood_on() -> None:
    facts = Facts({}, used=D0)
    plan = plan_update(Unplug("d0", (memory("m0", MIB),)), Strategy.PAUSE, PC, facts)
    assert commands(plan) == [("device_del", "d0"), ("object-del", "m0")]
    assert plan.awaited is Awaited.GONE
    assert [s.command.name for s in plan.finish] == ["object-del"]


def test_unplug_of_what_is_not_there() -> None:
    with pytest.raises(UpdateRefused, match="no device d1; those with an id: d0"):
        plan_update(Unplug("d1"), Strategy.DIRECT, PC, Facts({}, used=D0))


def test_a_dimm_from_the_command_line_stays() -> None:
    view = replace(PC, memory_devices=(dimm("d0", MIB, "/objects/m", False),))
    with pytest.raises(UpdateRefused, match="not hotpluggable"):
        plan_update(Unplug("d0"), Strategy.DIRECT, view, Facts({}, used=D0))


def test_growing_takes_ids_that_are_free() -> None:
    used = {Role.DEVICE: frozenset({"qml-dimm0"}), Role.OBJECT: frozenset({"qml-mem1"})}
    facts = Facts({}, used=used)
    plan = plan_update(Resize("+", 256 * MIB), Strategy.DIRECT, PC, facts)
    assert commands(plan) == [("object-add", "qml-mem2"), ("device_add", "qml-dimm2")]


def test_a_size_that_no_guest_can_use() -> None:
    with pytest.raises(UpdateRefused, match="multiple of 128 MiB"):
        plan_update(Resize("+", 100 * MIB), Strategy.DIRECT, PC, NONE)


def test_equals_counts_all_memory() -> None:
    view = replace(PC, memory_devices=(dimm("a", GIB, "/objects/am", True),))
    assert commands(plan_update(Resize("=", 2 * GIB), Strategy.DIRECT, view, NONE)) == []
    less = plan_update(Resize("=", GIB), Strategy.DIRECT, view, NONE)
    assert commands(less) == [("device_del", "a"), ("object-del", "am")]
    more = plan_update(Resize("=", 3 * GIB), Strategy.DIRECT, view, NONE)
    assert (more.prepare[0].command.arguments or {})["size"] == GIB


def test_equals_waits_for_what_was_asked_for_before() -> None:
    view = replace(PC, memory_devices=(virtio_mem("v", 256 * MIB, 0, GIB, 2 * MIB),))
    plan = plan_update(Resize("=", GIB), Strategy.HOLE, view, NONE)
    assert commands(plan) == []
    assert plan.sizes == {"v": 0}
    assert plan.awaited is Awaited.SIZE


def test_shrinking_takes_whole_dimms_the_newest_first() -> None:
    sizes = (256 * MIB, 512 * MIB, 256 * MIB)
    dimms = tuple(dimm(f"d{i}", s, f"/objects/m{i}", True) for i, s in enumerate(sizes))
    view = replace(PC, memory_devices=dimms)
    one = plan_update(Resize("-", 256 * MIB), Strategy.DIRECT, view, NONE)
    assert one.devices == ("d2",)
    two = plan_update(Resize("-", 768 * MIB), Strategy.DIRECT, view, NONE)
    assert two.devices == ("d2", "d1")
    with pytest.raises(UpdateRefused, match="d2 256 MiB, d1 512 MiB, d0 256 MiB"):
        plan_update(Resize("-", 128 * MIB), Strategy.DIRECT, view, NONE)


def test_hole_without_virtio_mem_says_what_to_add() -> None:
    with pytest.raises(UpdateRefused, match="no virtio-mem device") as caught:
        plan_update(Resize("+", 256 * MIB), Strategy.HOLE, PC, NONE)
    assert "virtio-mem-pci" in str(caught.value.remedy)


BLOCK = 2 * MIB
DEVICES = st.lists(st.tuples(st.integers(0, 64), st.integers(0, 64)), min_size=1, max_size=4)


@given(DEVICES, st.integers(-128, 128).filter(bool))
def test_virtio_mem_devices_share_a_change(pairs: list[tuple[int, int]], change: int) -> None:
    """They take all of it within their bounds, or nothing at all."""
    mems = tuple(
        virtio_mem(f"v{i}", a * BLOCK, min(a, b) * BLOCK, max(a, b) * BLOCK, BLOCK)
        for i, (a, b) in enumerate(pairs)
    )
    view = replace(PC, memory_devices=mems)
    room = sum(v.max_size - v.requested if change > 0 else v.requested for v in mems)
    intent = Resize("+" if change > 0 else "-", abs(change) * BLOCK)
    if abs(change) * BLOCK > room:
        with pytest.raises(UpdateRefused, match="nothing was touched"):
            plan_update(intent, Strategy.HOLE, view, NONE)
        return
    plan = plan_update(intent, Strategy.HOLE, view, NONE)
    known = {v.id: v for v in mems}
    assert sum(s - known[name].requested for name, s in plan.sizes.items()) == change * BLOCK
    assert all(0 <= s <= known[name].max_size for name, s in plan.sizes.items())
    for step in plan.update:
        assert step.undo is not None
        name = str((step.command.arguments or {})["path"]).rpartition("/")[2]
        assert (step.undo.arguments or {})["value"] == known[name].requested


def test_a_part_of_a_block_is_refused() -> None:
    view = replace(PC, memory_devices=(virtio_mem("v", 0, 0, GIB, BLOCK),))
    with pytest.raises(UpdateRefused, match="block size, 2 MiB"):
        plan_update(Resize("+", MIB), Strategy.HOLE, view, NONE)
