"""The way back of a compared guest: exactly what the change made, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import cast

import pytest

from qmp_memlistener.errors import CommandFailed
from qmp_memlistener.qmp import Monitor
from qmp_memlistener.qmp.links import Abilities
from qmp_memlistener.updates.compare import guest as compare_guest
from qmp_memlistener.updates.compare.guest import ComparedState, HostGuest, NotPutBack
from qmp_memlistener.updates.model import (
    Addition,
    Intent,
    Outcome,
    Plug,
    Resize,
    Role,
    Strategy,
    Unplug,
    UpdateRefused,
)
from qmp_memlistener.updates.operation import Host
from qmp_memlistener.updates.settings import UpdateOptions
from tests.unit.updates.compare_fakes import outcome

MIB = 1 << 20
DIMM, MEMORY = (Role.DEVICE, "qml-dimm0"), (Role.OBJECT, "qml-mem0")


class Vm:
    """A guest whose DIMMs and virtio-mem devices do what is asked; it is its own monitor, too."""

    def __init__(self, *ids: tuple[Role, str], **memory: int) -> None:
        self.ids = set(ids)
        self.memory = dict(memory)
        self.did: list[str] = []
        self.refuses_unplug = 0
        self.abilities = Abilities()

    @property
    def monitor(self) -> Vm:
        return self

    @asynccontextmanager
    async def operating(self) -> AsyncIterator[Vm]:
        yield self

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, **_: object
    ) -> object:
        given = arguments or {}
        self.did.append(command)
        match command:
            case "qom-get" if given["property"] == "memdev":
                return "/objects/" + str(given["path"]).rpartition("/")[2].replace("dimm", "mem")
            case "qom-set":
                self.memory[str(given["path"]).rpartition("/")[2]] = int(str(given["value"]))
                return {}
            case "object-del" if (Role.OBJECT, given["id"]) in self.ids:
                self.ids.remove((Role.OBJECT, str(given["id"])))
                return {}
            case "netdev_del" if (Role.NETDEV, given["id"]) in self.ids:
                self.ids.remove((Role.NETDEV, str(given["id"])))
                return {}
        raise CommandFailed(command, "GenericError", "no such thing")

    async def read(self, _: Monitor, __: Intent) -> ComparedState:
        return ComparedState(frozenset(self.ids), {n: (s, s) for n, s in self.memory.items()})

    async def perform(
        self, _: Host, intent: Intent, strategy: Strategy, __: UpdateOptions | None = None
    ) -> Outcome:
        match intent:
            case Plug():
                self.did.append(f"plug {strategy}")
                self.ids |= {(a.role, a.id) for a in (intent.device, *intent.backends)}
            case Unplug() if self.refuses_unplug:
                self.refuses_unplug -= 1
                return outcome("failed", 0, 1, reason="it is being unplugged already")
            case Unplug():
                self.did.append(f"unplug {intent.id} {strategy}")
                self.ids -= {(Role.DEVICE, intent.id), *((a.role, a.id) for a in intent.also)}
            case Resize() if strategy is Strategy.HOLE:
                self.did.append(f"resize {intent.sign} {strategy}")
                sign = 1 if intent.sign == "+" else -1
                # grows the first one, shrinks the last one
                name = (sorted(self.memory) if sign > 0 else sorted(self.memory)[::-1])[0]
                self.memory[name] += sign * intent.size
            case Resize():
                assert intent.sign == "+", "a DIMM goes by its name only"
                self.did.append(f"resize + {strategy}")
                self.ids |= {DIMM, MEMORY}
        return outcome("done", 0, 1, strategy=strategy)


async def begun(vm: Vm, intent: Intent) -> HostGuest:
    guest = HostGuest(cast(Host, vm), intent, UpdateOptions(), perform=vm.perform, read=vm.read)
    await guest.begin()
    return guest


@pytest.mark.asyncio
@pytest.mark.parametrize("sign", ["+", "-"])
@pytest.mark.parametrize("strategy", list(Strategy))
async def test_memory_comes_and_goes_and_the_guest_has_what_it_had(
    sign: str, strategy: Strategy
) -> None:
    own = ((Role.DEVICE, "dimm0"), (Role.OBJECT, "mem0"))
    vm = Vm(*own, vm0=512 * MIB, vm1=256 * MIB)
    before = await vm.read(cast(Monitor, vm), Resize("+", 0))
    guest = await begun(vm, Resize(sign, 256 * MIB))
    done = await guest.change(strategy)
    assert done.outcome == "done"
    if sign == "-" and strategy is Strategy.PAUSE:
        assert vm.did[0] == "resize + direct", "the guest is not paused for what is not measured"
        assert vm.did[-1] == "unplug qml-dimm0 pause"
    await guest.put_back()
    assert await vm.read(cast(Monitor, vm), Resize("+", 0)) == before


@pytest.mark.asyncio
async def test_nothing_happened_yet_so_there_is_nothing_to_undo() -> None:
    """Interrupted before anything was plugged: DIMMs of the user's own are not touched."""
    vm = Vm(DIMM, MEMORY, vm0=512 * MIB)
    guest = await begun(vm, Resize("+", 256 * MIB))
    await guest.put_back()
    assert vm.did == []
    assert vm.ids == {DIMM, MEMORY}


@pytest.mark.asyncio
async def test_what_is_being_unplugged_already_is_waited_for() -> None:
    vm = Vm()
    guest = await begun(vm, Resize("+", 256 * MIB))
    await guest.change(Strategy.DIRECT)
    vm.refuses_unplug = 2
    await guest.put_back()
    assert vm.ids == set()


@pytest.mark.asyncio
async def test_backends_that_are_left_over_go() -> None:
    """The device is gone, and its unplugging was interrupted before its backends went."""
    vm = Vm((Role.NETDEV, "n0"))
    nic = Addition(Role.DEVICE, "nic1", {"driver": "e1000", "id": "nic1"})
    guest = await begun(vm, Plug(nic, (Addition(Role.NETDEV, "n1"), Addition(Role.OBJECT, "o1"))))
    await guest.change(Strategy.DIRECT)
    vm.ids.remove((Role.DEVICE, "nic1"))
    await guest.put_back()
    assert vm.ids == {(Role.NETDEV, "n0")}


@pytest.mark.asyncio
async def test_memory_that_is_gone_is_not_memory_of_no_size() -> None:
    vm = Vm(vm0=512 * MIB)
    guest = await begun(vm, Resize("+", 256 * MIB))
    del vm.memory["vm0"]
    assert await guest.left() == "vm0 is gone, and had 512 MiB"


@pytest.mark.asyncio
async def test_what_does_not_go_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_guest, "PATIENCE_S", 0.05)
    vm = Vm(vm0=512 * MIB)
    vm.refuses_unplug = 10**6
    guest = HostGuest(
        cast(Host, vm),
        Resize("+", 256 * MIB),
        UpdateOptions(wait_s=0.05),
        perform=vm.perform,
        read=vm.read,
    )
    await guest.begin()
    await guest.change(Strategy.DIRECT)
    with pytest.raises(NotPutBack, match="being unplugged already") as caught:
        await guest.put_back()
    assert caught.value.remedy is not None
    assert "device qml-dimm0 is there" in caught.value.remedy


@pytest.mark.asyncio
async def test_unplugging_has_no_way_back() -> None:
    with pytest.raises(UpdateRefused, match="put back"):
        await begun(Vm(), Unplug("dimm0"))
