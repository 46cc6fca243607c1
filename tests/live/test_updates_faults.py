"""Every command of an update fails in every way, in front of a real QEMU; what is left then.

The commands of an update that succeeds are recorded first; then it is repeated once for each of
them and each way to fail; in the quick tier each command fails in one way.  Commands that only
read, before anything is touched, are alike: each takes its turn with one way per case, and over the
cases they take them all.

What must hold: the guest runs; nothing is left of an update that failed, unless QEMU had been sent
the command that makes the change: then the change stands, with what it stands on; the exit code is
that of the end; the recording is complete.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from qmp_memlistener import Strategy
from qmp_memlistener.agent import source
from qmp_memlistener.errors import DeadlineExceeded, MemListenerError, MonitorBusy, TargetLost
from qmp_memlistener.guests import GuestSpec, LaunchedGuest, QemuBuild, launch
from qmp_memlistener.qmp import Monitor, UnixTarget, asking, guest, guest_devices, hmp
from qmp_memlistener.records import Recording, SummaryRecord
from qmp_memlistener.updates import guest_response, operation
from qmp_memlistener.updates.model import Intent, Outcome, Plug, Role, Unplug
from qmp_memlistener.updates.options import parse_addition, parse_resize
from qmp_memlistener.updates.property_types import type_arguments
from qmp_memlistener.updates.settings import UpdateOptions
from tests.support.live import NO_QEMU, QEMUS, attach_bare, qmp
from tests.support.qmp_proxy import INJECTED, Fault, How, QmpProxy

pytestmark = pytest.mark.qemu

MIB = 1 << 20
GUESTS = 3
"""At a time; one waits while another works."""
PATIENCE_S = 0.3
TRIES = 3
"""On a host that is too busy for `PATIENCE_S` an update may end before its fault has its turn."""
OWN_DEADLINE_S = 30.0
ARGS = (
    *("-m", "slots=250,maxmem=64G", "-device", "qemu-xhci,id=xhci"),
    *("-object", "memory-backend-ram,id=vm0-ram,size=1G"),
    *("-device", "virtio-mem-pci,id=vm0,memdev=vm0-ram,requested-size=0"),
    # behind the proxy it is known by that
    *("-uuid", "6f1d3e2a-0d3b-4c55-9d0f-0a3f5f1f7a11"),
)
MEMORY: dict[str, object] = {"qom-type": "memory-backend-ram", "id": "m0", "size": MIB}
NETDEV: dict[str, object] = {"type": "hubport", "id": "n0", "hubid": 1}
DEVICE: dict[str, object] = {"driver": "usb-net", "id": "u0", "netdev": "n0"}
BACKENDS = (
    parse_addition(Role.OBJECT, "memory-backend-ram,id=m0,size=1M"),
    parse_addition(Role.NETDEV, "hubport,id=n0,hubid=1"),
)
PLUG = Plug(parse_addition(Role.DEVICE, "usb-net,id=u0,netdev=n0"), BACKENDS)
CASES: tuple[tuple[str, Intent, Strategy], ...] = (
    ("plug", PLUG, Strategy.DIRECT),
    ("plug", PLUG, Strategy.PAUSE),
    ("unplug", Unplug("u0", BACKENDS), Strategy.DIRECT),
    ("unplug", Unplug("u0", BACKENDS), Strategy.PAUSE),
    ("resize", parse_resize("+128M"), Strategy.DIRECT),
    ("resize", parse_resize("+128M"), Strategy.PAUSE),
    ("resize", parse_resize("+128M"), Strategy.HOLE),
)
MOST_COMMANDS = 1
NUMBERS = [
    *(
        pytest.param(n, False, id=f"{what}-{how}", marks=pytest.mark.full)
        for n, (what, _, how) in enumerate(CASES)
    ),
    pytest.param(MOST_COMMANDS, True, id="quick"),
]
TOUCHING = frozenset({"object-add", "netdev_add", "device_add", "device_del", "qom-set", "stop"})
OBSERVING = frozenset({"human-monitor-command", "query-status"})
"""The agent sends these on its own as well, and gives up a snapshot that does not come."""
SILENT = (How.SWALLOWED, How.MUTED)


@dataclass(frozen=True)
class State:
    """What an update can leave in a guest."""

    things: frozenset[str]
    requested: int


@dataclass
class Bench:
    """A guest, the proxy in front of one monitor, and a monitor of the test's own."""

    guest: LaunchedGuest
    proxy: QmpProxy
    monitor: Monitor
    directory: Path
    runs: int = 0

    async def ask(self, name: str, arguments: Mapping[str, object] | None = None) -> object:
        """Of the test's own: what the product's deadlines are set to does not concern it."""
        return await self.monitor.execute(name, arguments, deadline=OWN_DEADLINE_S)

    async def state(self) -> State:
        things = set()
        for path in ("/objects", "/machine/peripheral"):
            for child in await self.list(path):
                things.add(child)
        network = await hmp(self.monitor, "info network", deadline=OWN_DEADLINE_S)
        if re.search(r"\\ n0\b", network):
            things.add("n0")
        size = {"path": "/machine/peripheral/vm0", "property": "requested-size"}
        requested = await self.ask("qom-get", size)
        assert isinstance(requested, int)
        return State(frozenset(things), requested)

    async def list(self, path: str) -> list[str]:
        found = await self.ask("qom-list", {"path": path})
        assert isinstance(found, list)
        return [c["name"] for c in found if c["type"].startswith("child<")]

    async def ready(self, what: str) -> None:
        """As the update expects the guest: with or without the device and what it stands on."""
        there = (await self.state()).things
        if what == "plug":
            for name, command in (("u0", "device_del"), ("n0", "netdev_del"), ("m0", "object-del")):
                if name in there:
                    await self.ask(command, {"id": name})
        elif what == "unplug":
            for name, command, arguments in (
                ("m0", "object-add", MEMORY),
                ("n0", "netdev_add", NETDEV),
                ("u0", "device_add", DEVICE),
            ):
                if name not in there:
                    await self.ask(command, arguments)
        else:
            path = {"path": "/machine/peripheral/vm0", "property": "requested-size", "value": 0}
            await self.ask("qom-set", path)

    async def running(self) -> bool:
        """Within some seconds: it may be the guard that resumes it."""
        for _ in range(100):
            status = await self.ask("query-status")
            assert isinstance(status, dict)
            if status["running"]:
                return True
            await asyncio.sleep(0.05)
        return False

    async def guard_gone(self) -> None:
        """Until the monitor for guards is free again."""
        for _ in range(20):
            try:
                async with await Monitor.connect(self.guard_target, deadline=2.0):
                    return
            except MonitorBusy:
                pass
        raise AssertionError("the guard stays")

    @property
    def guard_target(self) -> UnixTarget:
        return UnixTarget(str(self.guest.monitors[2]))


@asynccontextmanager
async def bench(build: QemuBuild, directory: Path) -> AsyncIterator[Bench]:
    """Its firmware finds nothing to boot and waits; a vCPU that spins would keep what is removed
    from being freed."""
    spec = GuestSpec(accel="tcg", memory=64 * MIB, shared_memory=False, args=ARGS)
    async with (
        launch(spec.on(build)) as guest,
        QmpProxy.on(guest.monitors[0]) as proxy,
        qmp(guest.monitors[1]) as monitor,
    ):
        yield Bench(guest, proxy, monitor, directory)


@dataclass(frozen=True)
class Run:
    """How an update ended: exit code, Outcome or error, state before and after."""

    code: int
    end: Outcome | MemListenerError
    before: State
    after: State


async def run(b: Bench, case: tuple[str, Intent, Strategy], *faults: Fault) -> Run:
    """The update through the proxy, once; checks what must hold however it ends."""
    what, intent, strategy = case
    await b.ready(what)
    before = await b.state()
    b.runs += 1
    file = b.directory / f"{id(b)}-{b.runs}.jsonl"
    options = UpdateOptions(max_pause_s=0.5, wait_s=0.2, guard_monitor=str(b.guard_target))
    b.proxy.begin()
    end: Outcome | MemListenerError
    try:
        async with attach_bare(
            b.proxy.target, trace=False, record=str(file), deadline=5.0
        ) as agent:
            b.proxy.begin(*faults)
            end = await agent.update(intent, strategy, options)
            code = 0 if end.outcome == "done" else 1
    except MemListenerError as exc:
        end, code = exc, exc.exit_code
    assert await b.running()
    if strategy is Strategy.PAUSE:
        await b.guard_gone()
    recording = Recording(str(file))
    records = list(recording)
    assert not recording.truncated
    assert recording.header.target == b.proxy.target
    assert isinstance(records[-1], SummaryRecord)
    return Run(code, end, before, await b.state())


async def check(b: Bench, case: tuple[str, Intent, Strategy], fault: Fault) -> list[str]:
    """What is wrong after this fault."""
    for _ in range(TRIES):
        done = await run(b, case, fault)
        if b.proxy.hits or not isinstance(done.end, DeadlineExceeded):
            break
    wrong = []
    if not b.proxy.hits:
        return [] if done.code in (0, 1) else [f"not hit, and {done.end!r}"]
    if fault.how is How.REFUSED:
        if done.code not in (0, 1) or not isinstance(done.end, Outcome):
            wrong.append(f"{done.code} {done.end!r}")
    elif done.code != 3 and fault.name not in OBSERVING:
        wrong.append(f"{done.code} {done.end!r}")
    what, _, strategy = case
    made = done.after.things - done.before.things
    lost = done.before.things - done.after.things
    sent = b.proxy.forwarded
    if what == "plug":
        expected = {"m0", "n0", "u0"} if "device_add" in sent else set()
        if made != expected or lost:
            wrong.append(f"made {made}, lost {lost}")
    elif what == "unplug":
        if made or ("u0" in lost) != ("device_del" in sent):
            wrong.append(f"made {made}, lost {lost}")
        if done.code == 0 and lost != {"m0", "n0", "u0"}:
            wrong.append(f"lost only {lost}")
    elif strategy is Strategy.HOLE:
        # a connection that ends before the answer has come: sent again, to take it back
        failed = fault.name == "qom-set" or sent.count("qom-set") % 2 == 0
        expected_sizes = {0 if failed else 128 * MIB}
        if fault.name in OBSERVING and isinstance(done.end, TargetLost):
            # the connection was cut with the command on its way: QEMU may have read it, or not
            expected_sizes = {0, 128 * MIB}
        if done.after.requested not in expected_sizes or made or lost:
            wrong.append(f"requested {done.after.requested}, made {made}, lost {lost}")
    elif len(made) != (2 if "device_add" in sent else 0) or lost:
        wrong.append(f"made {made}, lost {lost}")
    if isinstance(done.end, Outcome):
        wrong += check_outcome(done.end, bool(made or lost))
    return [f"{fault.name} #{fault.nth} {fault.how}: {w} ({done.end!r})" for w in wrong]


def check_outcome(outcome: Outcome, changed: bool) -> list[str]:
    """Words that fit what came of it."""
    if (outcome.reason is None) != (outcome.outcome == "done"):
        return [f"{outcome.outcome} with reason {outcome.reason}"]
    if outcome.outcome in ("refused", "failed") and changed:
        return [f"{outcome.outcome}, and something has changed: {outcome.notes}"]
    if outcome.outcome in ("refused", "failed") and any("new DIMM" in n for n in outcome.notes):
        return [f"{outcome.outcome}, and there is no new DIMM of ours: {outcome.notes}"]
    if outcome.guest_state.after not in ("running", "unknown"):
        return [f"left {outcome.guest_state}"]
    return []


def faults_of(commands: Sequence[str], number: int, quick: bool) -> list[Fault]:
    """Every way to fail for what touches the guest and all that comes then; one for the rest, and
    for all of them when it has to be `quick`."""
    found = []
    touched = False
    hows = list(How)
    for i, name in enumerate(commands):
        touched |= name in TOUCHING
        nth = commands[: i + 1].count(name)
        chosen = hows if touched and not quick else [hows[(i + number) % len(hows)]]
        found += [Fault(name, nth, how) for how in chosen]
    return found


@pytest.mark.skipif(not QEMUS, reason=NO_QEMU)
@pytest.mark.parametrize(("number", "quick"), NUMBERS)
@pytest.mark.asyncio
async def test_every_fault(
    number: int, quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_response, "QUIET_S", 0.02)
    monkeypatch.setattr(guest_response, "FIRST_SIGN_S", 0.05)
    build = QEMUS[number % min(2, len(QEMUS))]
    case = CASES[number]
    async with bench(build, tmp_path) as first:
        good = await run(first, case)
        # this guest answers for no memory
        assert good.code == (1 if case[0] == "resize" else 0), good.end
        faults = faults_of(first.proxy.commands, number, quick)
        wrong = await all_of(first, build, case, [f for f in faults if f.how not in SILENT])
        impatient(monkeypatch)
        wrong += await all_of(first, build, case, [f for f in faults if f.how in SILENT])
    assert wrong == []


async def all_of(
    first: Bench, build: QemuBuild, case: tuple[str, Intent, Strategy], faults: list[Fault]
) -> list[str]:
    """`GUESTS` guests share the faults."""
    left = list(faults)
    wrong: list[str] = []

    async def work(b: Bench) -> None:
        while left:
            wrong.extend(await check(b, case, left.pop(0)))

    async def one_more() -> None:
        async with bench(build, first.directory) as b:
            await work(b)

    async with asyncio.TaskGroup() as group:
        group.create_task(work(first))
        for _ in range(GUESTS - 1):
            group.create_task(one_more())
    return wrong


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines of a fraction of a second, but for taking back what was made."""
    monkeypatch.setattr(operation, "UPDATE_DEADLINE", PATIENCE_S)
    monkeypatch.setattr(source, "SNAPSHOT_DEADLINE_S", PATIENCE_S)
    functions = [Monitor.execute, Monitor.timed, Monitor.pipeline, type_arguments, hmp]
    for module in (asking, guest, guest_devices):  # whatever the guest is asked
        functions += [f for f in vars(module).values() if "deadline" in _defaults_of(f)]
    for function in functions:
        defaults = _defaults_of(function)
        assert "deadline" in defaults
        monkeypatch.setitem(defaults, "deadline", PATIENCE_S)


def _defaults_of(function: object) -> dict[str, object]:
    return getattr(function, "__kwdefaults__", None) or {}


@pytest.mark.skipif(not QEMUS, reason=NO_QEMU)
@pytest.mark.asyncio
async def test_what_cannot_be_taken_back_is_said(tmp_path: Path) -> None:
    async with bench(QEMUS[0], tmp_path) as b:
        faults = [Fault(name, 1, How.REFUSED) for name in ("device_add", "netdev_del")]
        done = await run(b, ("plug", PLUG, Strategy.PAUSE), *faults)
        assert b.proxy.hits == 2
        assert isinstance(done.end, Outcome)
        assert done.end.outcome == "failed"
        assert done.end.notes == [f"netdev n0 is still there: QEMU refused netdev_del: {INJECTED}"]
        assert done.after.things - done.before.things == {"n0"}


@pytest.mark.skipif(not QEMUS, reason=NO_QEMU)
@pytest.mark.parametrize("how", [How.CUT_BEFORE, How.CUT_AFTER])
@pytest.mark.asyncio
async def test_what_came_of_a_command_without_an_answer_is_asked(how: How, tmp_path: Path) -> None:
    async with bench(QEMUS[0], tmp_path) as b:
        unplug = ("unplug", Unplug("u0", BACKENDS), Strategy.PAUSE)
        done = await run(b, unplug, Fault("device_del", 1, how))
        assert b.proxy.hits == 1
        gone = "u0" in done.before.things - done.after.things
        assert gone is (how is How.CUT_AFTER)
        told = "is gone" if gone else "whether QEMU took the command is unknown"
        assert isinstance(done.end, MemListenerError)
        assert re.search(rf"device u0:? {told}", done.end.message)


@pytest.mark.skipif(not QEMUS, reason=NO_QEMU)
@pytest.mark.parametrize("strategy", [Strategy.DIRECT, Strategy.PAUSE])
@pytest.mark.asyncio
async def test_of_two_dimms_one_stays(strategy: Strategy, tmp_path: Path) -> None:
    """What the guest was asked for cannot be taken back: it is said, and the rest is not done."""
    async with bench(QEMUS[0], tmp_path) as b:
        for _ in range(2):
            grown = await run(b, ("resize", parse_resize("+128M"), Strategy.DIRECT))
            assert len(grown.after.things - grown.before.things) == 2
        fault = Fault("device_del", 2, How.REFUSED)
        done = await run(b, ("resize", parse_resize("-256M"), strategy), fault)
        assert isinstance(done.end, Outcome)
        assert done.end.outcome == "partial"
        assert done.end.reason == f"QEMU refused device_del: {INJECTED}"
        assert done.end.notes == ["device qml-dimm1: this was done, and is not taken back"]


@pytest.mark.skipif(not QEMUS, reason=NO_QEMU)
@pytest.mark.parametrize("command", ["object-add", "netdev_add", "device_add"])
@pytest.mark.asyncio
async def test_cancelled_before_the_answer(command: str, tmp_path: Path) -> None:
    """What QEMU may have made is removed, too; a device that it has made stands."""
    async with bench(QEMUS[0], tmp_path) as b:
        before = await b.state()
        async with attach_bare(b.proxy.target, trace=False) as agent:
            nth = 2 if command == "netdev_add" else 1  # the first one tells the type of hubid
            b.proxy.begin(Fault(command, nth, How.MUTED))
            task = asyncio.ensure_future(agent.update(PLUG))
            async with asyncio.timeout(10):
                while command not in b.proxy.done:  # noqa: ASYNC110 - nothing tells
                    await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        made = (await b.state()).things - before.things
        assert made == ({"m0", "n0", "u0"} if command == "device_add" else set())
