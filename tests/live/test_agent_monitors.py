"""Which monitors of a QEMU an agent uses for what."""

from __future__ import annotations

import pytest

from qmp_memlistener import attach
from qmp_memlistener.agent.checkup import examine_guest
from qmp_memlistener.errors import InputError, MonitorBusy, WrongGuest
from qmp_memlistener.guests import GuestSpec, launch
from qmp_memlistener.qmp import Monitor, allowed, parse_target

SPEC = GuestSpec(machine="pc", accel="tcg", args=("-S",), monitors=3)


@pytest.mark.asyncio
async def test_a_free_monitor_is_found_for_operations() -> None:
    async with launch(SPEC) as guest, attach(str(guest.monitors[0])) as agent:
        assert not any("operations" in remark for remark in agent.remarks)
        async with agent.operating() as monitor:
            assert monitor is not agent.monitor
            assert monitor.identity.pid == guest.pid
            assert await monitor.execute("query-status")
        async with agent.operating() as again:
            assert again.target == monitor.target


@pytest.mark.asyncio
async def test_a_single_monitor_is_shared_and_that_is_said() -> None:
    one = GuestSpec(machine="pc", accel="tcg", args=("-S",), monitors=1)
    async with launch(one) as guest, attach(str(guest.monitors[0])) as agent:
        assert any("operations" in remark for remark in agent.remarks)
        async with agent.operating() as monitor:
            assert monitor is agent.monitor


@pytest.mark.asyncio
async def test_monitors_that_are_named_are_used() -> None:
    async with launch(SPEC) as guest:
        target, ping, operations = (f"unix:{path}" for path in guest.monitors)
        async with attach(target, ping_monitor=ping, ops_monitor=operations) as agent:
            assert str(agent.companions.ping) == ping
            await agent.probes_started()
            assert "ping" in agent.measuring.names
            async with agent.operating() as monitor:
                assert monitor is agent.operations
                assert str(monitor.target) == operations
            with pytest.raises(MonitorBusy):
                await Monitor.connect(parse_target(ping))
        async with await Monitor.connect(parse_target(ping)) as freed:
            assert freed.is_connected


@pytest.mark.asyncio
async def test_a_qemu_that_nothing_was_tried_on_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(allowed, "TRIED", ((1, 0), (1, 1)))
    async with launch(SPEC) as guest:
        target = str(guest.monitors[0])
        async with attach(target, probes=(), trace=False) as agent:
            (remark,) = [r for r in agent.remarks if "tried on" in r]
            assert "is newer than those that our commands were tried on (1.0 to 1.1)" in remark
        (check,) = [c for c in (await examine_guest(target))[1] if "commands" in c.name]
        assert (check.usable, check.reason) == (False, remark)
        assert check.remedy


@pytest.mark.asyncio
async def test_the_observers_own_monitor_or_another_qemus_is_refused() -> None:
    async with launch(SPEC) as guest, launch(SPEC) as other:
        target = str(guest.monitors[0])
        with pytest.raises(InputError, match="in use by this agent"):
            async with attach(target, ops_monitor=target):
                pass
        one, two, _ = map(str, other.monitors)  # QEMU may be slow to see that a client has gone
        for ping, operations in ((one, None), (None, two)):
            with pytest.raises(WrongGuest, match=f"pid {other.pid}.*pid {guest.pid}"):
                async with attach(target, ping_monitor=ping, ops_monitor=operations):
                    pass
