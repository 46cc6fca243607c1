"""`dbus-serve`: guests on a bus of the test's own, with real clients, good and bad."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from tempfile import gettempdir

import pytest
from dbus_fast import MessageType

from qmp_memlistener.dbus.interface import BUS_NAME, ERROR, GUEST, OBJECT_MANAGER, policy_text
from qmp_memlistener.guests import GuestSpec, QemuBuild, launch
from qmp_memlistener.qmp import hmp
from tests.support.dbus import Client, own_bus, run_tool, skip_without
from tests.support.live import QEMUS, best_accel, booted, builds, qmp
from tests.support.verbs import started_verb

pytestmark = pytest.mark.qemu

PROPERTIES = "org.freedesktop.DBus.Properties"
ON = "kvm_set_user_memory : state 1"


async def tracing(monitor: Path) -> bool:
    """The agent's trace events are on."""
    async with qmp(monitor) as link:
        return ON in await hmp(link, "info trace-events kvm_set_user_memory")


@builds(QEMUS[-1:])
@pytest.mark.asyncio
async def test_a_guest_is_watched_as_long_as_a_client_wants(
    build: QemuBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with own_bus(tmp_path) as (address, _), booted(build, best_accel(build)) as vm:
        monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", address)
        async with started_verb("dbus-serve", "--probes", "none", "--json") as verb:
            assert json.loads(await verb.line()) == {
                "schema": 1,
                "name": BUS_NAME,
                "bus": "session",
            }
            async with Client.connected(address) as looker:
                path = await looker.object_of(vm.guest.pid)
                idle = await looker.properties(path)
                assert idle["State"] == "idle"
                assert "Map" not in idle
                refused = await looker.ask(
                    "Get", "ss", [GUEST, "Map"], path=path, interface=PROPERTIES
                )
                assert refused.error_name == f"{ERROR}.NotKnown"
                (snapshot,) = await looker.call("Snapshot", path=path)
                assert isinstance(snapshot, dict)
                assert snapshot["source"].value == "polling"
                assert any(r["name"].value == "pc.ram" for r in snapshot["map"].value)
                assert not await tracing(vm.guest.monitors[2])

                async with Client.connected(address) as watcher:
                    await watcher.call("Watch", path=path)
                    assert await tracing(vm.guest.monitors[2])
                    await vm.toggle(5, 20)
                    seen = await watcher.until("TransitionSeen", path, 5)
                    assert [s.body[0] for s in seen] == [1, 2, 3, 4, 5]
                    (punched, *_) = await watcher.until("HolePunched", path)
                    assert punched.body[:3] == ["pc.ram", 0xF0000, 0x10000]
                    watched = await looker.properties(path)
                    assert (watched["State"], watched["RunState"]) == ("watching", "running")
                    assert (watched["Source"], watched["Transitions"]) == ("trace", 5)
                    assert watched["Slots"]
                    assert watched["Holes"]
                # it left without a word
                await looker.until_property(path, "State", "idle")
                assert not await tracing(vm.guest.monitors[2])

                os.kill(vm.guest.pid, signal.SIGKILL)
                await looker.until("InterfacesRemoved", path)
                gone = await looker.ask("Watch", path=path)
                assert gone.error_name == "org.freedesktop.DBus.Error.UnknownObject"
            ran = await verb.signalled(signal.SIGTERM)
            assert (ran.code, ran.err) == (0, "")


@builds(QEMUS[-1:])
@pytest.mark.asyncio
async def test_many_guests_strange_names_and_a_client_that_floods(
    build: QemuBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = os.fsdecode(b"a/\xff\x01 \xe2\x80\xaeb")
    spec = GuestSpec(machine="none", accel="tcg", shared_memory=False)
    mute = GuestSpec(machine="none", accel="tcg", shared_memory=False, monitors=0)
    named = GuestSpec(machine="none", accel="tcg", shared_memory=False, args=("-name", name))
    async with (
        own_bus(tmp_path) as (address, _),
        launch(spec.on(build)) as first,
        launch(named.on(build)) as second,
        launch(mute.on(build)) as third,
    ):
        monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", address)
        async with (
            started_verb("dbus-serve", "--probes", "none") as verb,
            Client.connected(address) as client,
        ):
            await verb.until("on the session bus")
            paths = [await client.object_of(g.pid) for g in (first, second, third)]
            assert len(set(paths)) == 3
            known = await client.properties(paths[1])
            assert known["Name"] == "a/\\udcff\x01 \u202eb"
            refused = await client.ask("Watch", path=paths[2])
            assert (refused.error_name or "").startswith(ERROR)
            assert (await client.properties(paths[2]))["State"] == "failed"

            async with Client.connected(address) as flooder:
                calls = [flooder.ask("Snapshot", path=paths[0]) for _ in range(300)]
                flood = asyncio.gather(*calls)
                assert (await client.properties(paths[1]))["State"] == "idle"
                answers = await flood
            kinds = [a.error_name for a in answers if a.message_type is MessageType.ERROR]
            assert set(kinds) == {"org.freedesktop.DBus.Error.LimitsExceeded"}
            assert 0 < len(kinds) < 300


@builds(QEMUS[-1:])
@pytest.mark.asyncio
async def test_when_the_bus_is_gone_the_guest_is_as_before(
    build: QemuBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with own_bus(tmp_path) as (address, bus), booted(build, best_accel(build)) as vm:
        monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", address)
        async with started_verb("dbus-serve", "--probes", "none") as verb:
            await verb.until("on the session bus")
            async with Client.connected(address) as client:
                path = await client.object_of(vm.guest.pid)
                await client.call("Watch", path=path)
                second = await _ended("dbus-serve")
                assert second == 1
                bus.kill()
                ran = await verb.end(20.0)
            ran.check_error(3, "the bus has closed the connection")
        assert not await tracing(vm.guest.monitors[0])
        async with qmp(vm.guest.monitors[0]) as link:
            status = await link.execute("query-status")
        assert isinstance(status, dict)
        assert status["status"] == "running"


@builds(QEMUS[-1:])
@pytest.mark.asyncio
async def test_a_bus_that_stands_still_is_waited_for(
    build: QemuBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a guest does meanwhile is more than the socket holds, and less than we keep."""
    async with own_bus(tmp_path) as (address, bus), booted(build, best_accel(build)) as vm:
        monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", address)
        async with (
            started_verb("dbus-serve", "--probes", "none") as verb,
            Client.connected(address) as client,
        ):
            await verb.until("on the session bus")
            path = await client.object_of(vm.guest.pid)
            await client.call("Watch", path=path)
            bus.send_signal(signal.SIGSTOP)
            try:
                await vm.toggle(400)
            finally:
                bus.send_signal(signal.SIGCONT)
            seen = await client.until("TransitionSeen", path, 400)
            assert [s.body[0] for s in seen] == list(range(1, 401))
            assert client.seen("Missed", path) == []


async def _ended(*args: str) -> int:
    async with started_verb(*args) as verb:
        return (await verb.end(20.0)).code


@pytest.mark.asyncio
async def test_what_the_tools_of_d_bus_make_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without("busctl", "gdbus", "xmllint", "qemu-system-x86_64")
    spec = GuestSpec(machine="none", accel="tcg", shared_memory=False)
    async with own_bus(tmp_path) as (address, _), launch(spec) as guest:
        monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", address)
        async with (
            started_verb("dbus-serve", "--probes", "none") as verb,
            Client.connected(address) as client,
        ):
            await verb.until("on the session bus")
            path = await client.object_of(guest.pid)
            bus = f"--address={address}"
            assert path in await run_tool("busctl", bus, "tree", "--list", BUS_NAME)
            shown = await run_tool("busctl", bus, "introspect", BUS_NAME, path)
            assert ".TransitionSeen" in shown
            told = await run_tool(
                *("busctl", bus, "--json=short", "call", BUS_NAME, path, GUEST, "Snapshot")
            )
            assert json.loads(told)["data"][0]["transitions"]["data"] == 0
            at = ("--address", address, "--dest", BUS_NAME, "--object-path")
            (tmp_path / "introspect.dtd").write_text(DTD)
            for place in (path, path.rpartition("/")[0], f"/{BUS_NAME.replace('.', '/')}", "/"):
                xml = await run_tool("gdbus", "introspect", *at, place, "--xml")
                (tmp_path / "node.xml").write_text(xml)
                dtd = str(tmp_path / "introspect.dtd")
                await run_tool(
                    "xmllint", "--nonet", "--noout", "--dtdvalid", dtd, str(tmp_path / "node.xml")
                )
            (introspected,) = await client.call(
                "Introspect", path=path, interface="org.freedesktop.DBus.Introspectable"
            )
            assert GUEST in str(introspected)
            managed = await run_tool(
                "gdbus", "call", *at, "/org/qmp_memlistener1", "--method",
                f"{OBJECT_MANAGER}.GetManagedObjects",
            )  # fmt: skip
            assert path in managed


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be several users")
@pytest.mark.asyncio
async def test_on_a_system_bus_root_and_the_group_may_and_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without("busctl", "setpriv")
    for directory in (tmp_path, *tmp_path.parents):
        if directory == Path(gettempdir()):
            break
        directory.chmod(0o755)
    policy = tmp_path / "policy.conf"
    policy.write_text(policy_text("games"))
    async with own_bus(tmp_path, include=policy) as (address, _):
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
        async with started_verb("dbus-serve", "--system", "--probes", "none") as verb:
            await verb.until("on the system bus")
            call = (
                *("busctl", f"--address={address}", "call", BUS_NAME, "/org/qmp_memlistener1"),
                *(OBJECT_MANAGER, "GetManagedObjects"),
            )
            nobody = ("setpriv", "--reuid=65534", "--regid=65534")
            assert await run_tool(*call)
            assert await run_tool(*nobody, "--groups=60", *call)
            with pytest.raises(AssertionError, match=r"Access ?[dD]enied"):
                await run_tool(*nobody, "--clear-groups", *call)
            own = (
                *("busctl", f"--address={address}", "call", "org.freedesktop.DBus", "/"),
                *("org.freedesktop.DBus", "RequestName", "su", BUS_NAME, "0"),
            )
            with pytest.raises(AssertionError, match="Access denied"):
                await run_tool(*nobody, "--groups=60", *own)


# http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd
DTD = """
<!ELEMENT node (node|interface)*>
<!ATTLIST node name CDATA #IMPLIED>
<!ELEMENT interface (annotation|method|signal|property)*>
<!ATTLIST interface name CDATA #REQUIRED>
<!ELEMENT method (annotation|arg)*>
<!ATTLIST method name CDATA #REQUIRED>
<!ELEMENT signal (arg|annotation)*>
<!ATTLIST signal name CDATA #REQUIRED>
<!ELEMENT arg (annotation*)>
<!ATTLIST arg name CDATA #IMPLIED type CDATA #REQUIRED direction (in|out) #IMPLIED>
<!ELEMENT property (annotation)*>
<!ATTLIST property name CDATA #REQUIRED type CDATA #REQUIRED access (read|readwrite) #REQUIRED>
<!ELEMENT annotation EMPTY>
<!ATTLIST annotation name CDATA #REQUIRED value CDATA #REQUIRED>
"""
