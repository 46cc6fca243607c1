"""The link through libvirt, with a session that is not libvirt's."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping, Sequence

import pytest

from qmp_memlistener.errors import CommandFailed, ProtocolViolation, TargetLost
from qmp_memlistener.qmp import Command, LibvirtTarget, Reply
from qmp_memlistener.qmp.libvirt_link import LibvirtLink
from qmp_memlistener.qmp.libvirt_session import DomainFacts, LibvirtSession

pytestmark = pytest.mark.asyncio

VERSION = {"qemu": {"major": 7, "minor": 2, "micro": 1}, "package": ""}


class FakeSession(LibvirtSession):
    """Answers as a domain on another host does; `hold` keeps calls until it is set."""

    def __init__(self, link: LibvirtLink) -> None:
        super().__init__(link._target, link._heard, link._has_gone)
        self.sent: list[str] = []
        self.hold = threading.Event()
        self.hold.set()
        self.begun = threading.Event()

    def open(self) -> DomainFacts:
        return DomainFacts("web1", "u", "qemu+ssh://h/system", local=False, hands_files=False)

    def command(self, text: str, files: Sequence[int] = ()) -> str:  # noqa: ARG002
        name = json.loads(text)["execute"]
        self._call(name)
        if name == "odd":
            return "[]"
        if name == "refused":
            return json.dumps({"error": {"class": "GenericError", "desc": "no"}})
        return json.dumps({"return": VERSION if name == "query-version" else {"status": name}})

    def change(self, name: str, arguments: Mapping[str, object]) -> str | None:  # noqa: ARG002
        self._call(name)
        return "not today" if name == "detach-device" else None

    def close(self) -> None:
        self.sent.append("close")

    def _call(self, name: str) -> None:
        self.begun.set()
        self.hold.wait()
        self.sent.append(name)


async def opened() -> tuple[LibvirtLink, FakeSession, list[str]]:
    events: list[str] = []
    link = LibvirtLink(
        LibvirtTarget("web1"),
        lambda message, _t_ns, _size: events.append(str(message["event"])),
        lambda: events.append("end"),
    )
    session = FakeSession(link)
    link._session = session
    await link.open(None, 1)
    session.sent.clear()
    session.begun.clear()
    return link, session, events


async def test_commands_go_to_qemu_and_changes_to_libvirt() -> None:
    link, session, _ = await opened()
    assert str(link.version) == "7.2.1"
    assert "tainted" in link.abilities.remark
    names = ("query-status", "refused", "stop", "detach-device", "cont")
    replies = await link.run([Command(name) for name in names])
    assert [isinstance(r, Reply) for r in replies] == [True, False, True, False, True]
    refused = replies[3]
    assert isinstance(refused, CommandFailed)
    assert refused.desc == "not today"
    assert session.sent == list(names)
    with pytest.raises(ProtocolViolation):
        await link.run([Command("odd")])
    with pytest.raises(ProtocolViolation, match="out-of-band"):
        await link.run([Command("query-yank")], oob=True)


async def test_what_was_given_up_is_not_sent_and_a_late_stop_is_taken_back() -> None:
    link, session, _ = await opened()
    session.hold.clear()
    run = asyncio.ensure_future(link.run([Command("stop"), Command("query-status")]))
    await asyncio.to_thread(session.begun.wait)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    session.hold.set()
    await link.run([Command("query-kvm")])  # behind it
    assert session.sent == ["stop", "cont", "query-kvm"]


async def test_events_and_the_end_come_from_another_thread() -> None:
    link, session, events = await opened()
    lost = TargetLost("gone")

    def report() -> None:
        link._heard("STOP", 1, 2, '{"a":1}')
        link._heard("ODD", 1, 2, "{")
        link._has_gone(lost)
        link._has_gone(TargetLost("again"))

    await asyncio.to_thread(report)
    await asyncio.sleep(0)
    assert events == ["STOP", "ODD", "end"]
    with pytest.raises(ConnectionError):
        await link.run([Command("query-status")])
    with pytest.raises(TargetLost, match="gone"):
        await link.end()
    assert session.sent == ["close"]
