"""`compare` of what the guest itself does, under the strategies of `steer`."""

from __future__ import annotations

import signal
from collections import Counter
from typing import Any

import pytest

from qmp_memlistener.guests import HOST_BRIDGE, I440FX, PAM_RAM, High, LaunchedGuest
from qmp_memlistener.host.processes import Process
from qmp_memlistener.steer import Mode, State, state_of
from tests.support.host import patience
from tests.support.live import QEMUS, booted
from tests.support.steer import NEEDS, STEERED, racing, steer
from tests.support.verbs import Ran, run_verb, started_verb

pytestmark = NEEDS


def _state(guest: LaunchedGuest) -> State | None:
    process = Process.read(guest.pid)
    assert process is not None
    return state_of(process)


def window() -> str:
    """There and back takes a few milliseconds; on a busy host it takes longer."""
    return f"{round(patience(300))}ms"


async def _compare(guest: LaunchedGuest, *options: str) -> Ran:
    target = f"unix:{guest.monitors[0]}"
    return await run_verb("compare", target, "--json", "--seed", "1", *options, seconds=90)


@pytest.mark.asyncio
async def test_pam_under_each_strategy() -> None:
    async with racing(High.NOTHING) as (guest, pulse):
        pam = I440FX.pam
        await pulse.write_config(HOST_BRIDGE, pam, PAM_RAM << 4, 1)
        options = ("--transition", "pam", "--repeat", "2", "--window", window())
        ran = await _compare(guest, *options)
        assert ran.code == 0, ran.err
        found: dict[str, Any] = ran.documents[0]
        assert found["skipped"] == []
        rounds = found["rounds"]
        assert {r["outcome"] for r in rounds} == {"done"}
        names = ["direct", "pause", "inhibit", "hole", "control"]
        assert Counter(r["strategy"] for r in rounds) == dict.fromkeys(names, 2)
        ops = {(r["strategy"], r["slot_ops"], r["transitions"]) for r in rounds}
        # there and back: four operations each, or one delete and one add
        assert ops == {
            *(("direct", 8, 2), ("pause", 8, 2), ("inhibit", 8, 2)),
            *(("hole", 4, 2), ("control", 0, 0)),
        }
        assert await pulse.read_config(HOST_BRIDGE, pam, 1) == PAM_RAM << 4
        now = _state(guest)
        assert now is not None
        assert (now.mode, now.hooked) == (Mode.OFF, False)


@pytest.mark.asyncio
@pytest.mark.full
@pytest.mark.parametrize("what", ["smram", "tseg", "mmconfig", "reset"])
async def test_each_transition_of_the_pulse_guest(what: str) -> None:
    """Without a display there is nothing in front of SMRAM."""
    async with booted(STEERED[-1], "kvm", "q35", "-device", "VGA", memory=512 << 20) as vm:
        options = ("--transition", what, "--repeat", "1", "--window", window())
        ran = await _compare(vm.guest, *options, "--strategies", "direct,inhibit,hole")
        assert ran.code == 0, ran.err
        found: dict[str, Any] = ran.documents[0]
        rounds = {r["strategy"]: r for r in found["rounds"]}
        assert {r["outcome"] for r in rounds.values()} == {"done"}
        ops = {name: r["slot_ops"] for name, r in rounds.items()}
        assert ops["direct"] == ops["inhibit"] > ops["control"] == 0
        assert ops["hole"] > 0


@pytest.mark.asyncio
async def test_any_guest_while_it_makes_transitions() -> None:
    """A guest that was steered before goes on so."""
    async with racing(High.NOTHING) as (guest, pulse):
        assert (await steer(guest, "inhibit")).code == 0
        await pulse.toggle(HOST_BRIDGE, I440FX.pam, (PAM_RAM << 4, 0), 1 << 30, period=200)
        options = ("--guest-made", "6", "--repeat", "2", "--strategies", "direct,hole")
        ran = await _compare(guest, *options, "--probes", "pulse")
        assert ran.code == 0, ran.err
        found: dict[str, Any] = ran.documents[0]
        assert found["window_ns"] == 0
        rounds = found["rounds"]
        assert Counter(r["strategy"] for r in rounds) == {"direct": 2, "hole": 2, "control": 2}
        for r in rounds:
            assert r["outcome"] == "done"
            assert r["took_ns"] > 0
            low, high = (2, 3) if r["strategy"] == "hole" else (4, 5)
            assert 5 * low <= r["slot_ops"] <= 40 * high
        now = _state(guest)
        assert now is not None
        assert (now.mode, now.hooked) == (Mode.INHIBIT, True)


@pytest.mark.asyncio
async def test_a_guest_that_makes_none_is_told() -> None:
    async with racing(High.NOTHING) as (guest, _):
        options = ("--guest-made", "3", "--window", "200ms", "--strategies", "hole")
        ran = await _compare(guest, *options)
        assert ran.code == 1
        assert "error: the guest made 0 of 2 transitions in 0.2 s" in ran.err
        assert "--window" in ran.err
        now = _state(guest)
        assert now is not None
        assert not now.hooked


@pytest.mark.asyncio
@pytest.mark.full
async def test_interrupted_qemu_goes_its_own_way_again() -> None:
    async with racing(High.NOTHING) as (guest, _):
        target = f"unix:{guest.monitors[0]}"
        options = ("--transition", "pam", "--window", "200ms", "--repeat", "1000")
        async with started_verb("compare", target, *options) as verb:
            await verb.told("round 1 of")
            assert (await verb.signalled(signal.SIGINT)).code == 130
        now = _state(guest)
        assert now is not None
        assert not now.hooked


@pytest.mark.asyncio
async def test_what_cannot_be_steered_is_refused() -> None:
    async with booted(STEERED[-1], "tcg") as vm:
        ran = await _compare(vm.guest, "--transition", "pam")
        ran.check_error(4, "KVM")
    newer = [b for b in QEMUS if b not in STEERED]
    if newer:
        async with booted(newer[-1], "kvm") as vm:
            ran = await _compare(vm.guest, "--transition", "pam", "--strategies", "pause,inhibit")
            ran.check_error(4, newer[-1].version)
            now = _state(vm.guest)
            assert now is None or not now.hooked
