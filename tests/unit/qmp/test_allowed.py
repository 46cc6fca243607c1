"""The list of commands that may be sent, and that it is enforced before anything leaves."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

from qmp_memlistener.errors import CommandNotAllowed
from qmp_memlistener.qmp import Command, Monitor, allowed
from qmp_memlistener.qmp.allowed import (
    HMP,
    QMP,
    Permit,
    check,
    is_listed,
    may_be_examined,
    names,
)
from qmp_memlistener.qmp.identity import ASKED
from tests.unit.qmp.fake_qmp import GREETING, message, serving, within

EVIDENCE = sorted((Path(__file__).parents[2] / "conformance" / "introspection").glob("*.json"))
HMP_COMMAND = "human-monitor-command"
PERMITTED = frozenset(Permit)


def hmp(line: str, permits: frozenset[Permit] = frozenset()) -> bool:
    return is_listed(HMP_COMMAND, {"command-line": line}, permits)


def test_nothing_unstable_is_listed_and_everything_has_its_evidence() -> None:
    listed = [command.name for command in QMP]
    assert len(listed) == len(set(listed))
    assert not any(name.startswith("x-") or name == HMP_COMMAND for name in listed)
    assert not any("x-" in command.form.pattern for command in HMP)
    assert all(command.why for command in (*QMP, *HMP))


@pytest.mark.parametrize(
    "line",
    [
        "info mtree -o -D",
        "info  mtree   -o  -D",
        "info ramblock",
        "info network",
        "info registers -a",
        "gva2gpa 0xfff0",
        "print 0x71aa",
        "logfile /dev/stderr",
        'logfile "/a b"',
        "info sync-profile 0x40",
        "sync-profile",
        "sync-profile on",
    ],
)
def test_listed_lines(line: str) -> None:
    assert hmp(line)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "info mtree",
        "info mtree -f",
        "info mtree -o -D -f",
        "info virtio-status /machine",
        "sync-profile reset",
        "print $pc",
        "info registers",
        "device_del d0",
        "quit",
        "x /4x 0",
        "logfile",
        "info mtree -o -D\nquit",
    ],
)
def test_lines_that_are_not_listed(line: str) -> None:
    assert not hmp(line, PERMITTED)


def test_the_flat_view_needs_the_permit() -> None:
    assert not hmp("info mtree -f -o")
    assert hmp("info mtree -f -o", PERMITTED)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("x-query-virtio-status", {"path": "/machine/peripheral/d0/virtio-backend"}),
        ("query-qmp-schema", {}),
        ("qom-list-properties", {"typename": "e1000"}),
        ("query-command-line-options", {}),
        ("quit", {}),
        ("qom-get", {"path": "/machine", "property": "rtc-time"}),
        ("qom-get", {}),
        ("qom-set", {"path": "/machine/peripheral/v0", "property": "block-size", "value": 1}),
        ("device-list-properties", {"typename": "virtio-gpu-gl-pci"}),
    ],
)
def test_commands_that_are_not_listed(name: str, arguments: dict[str, object]) -> None:
    with pytest.raises(CommandNotAllowed, match=name):
        check(name, arguments, PERMITTED)


def test_names_for_a_process_of_its_own() -> None:
    assert names("cont", "query-status") == ["cont", "query-status"]
    with pytest.raises(CommandNotAllowed):
        names("cont", "system_reset")


@pytest.mark.parametrize("path", EVIDENCE, ids=lambda p: p.stem)
def test_no_type_that_ended_a_guest_is_examined(path: Path) -> None:
    evidence = json.loads(path.read_text())
    assert evidence["aborted"]
    assert not any(may_be_examined(name) for name in evidence["aborted"])
    left_out = [name for name in evidence["answered"] if not may_be_examined(name)]
    assert all(re.search("gpu|vga", name) for name in left_out)


@pytest.mark.asyncio
async def test_nothing_is_sent_when_one_of_several_is_not_listed(tmp_path: Path) -> None:
    requests: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(message(GREETING))
        while text := (await reader.read(65536)).decode():
            while text:
                told, end = json.JSONDecoder().raw_decode(text)
                text = text[end:].lstrip()
                requests.append(told.get("execute") or told["exec-oob"])
                exec_id = {key: told[key] for key in told if key == "id"}
                writer.write(message({"return": {}, **exec_id}))

    async with (
        within(5),
        serving(tmp_path, serve) as target,
        await Monitor.connect(target) as monitor,
    ):
        await monitor.execute("query-name")
        with pytest.raises(CommandNotAllowed):
            await monitor.pipeline([Command("query-kvm"), Command("x-query-virtio")])
        with pytest.raises(CommandNotAllowed):
            await monitor.execute("quit", oob=True)
        await monitor.execute("query-status")
    assert requests == ["qmp_capabilities", *ASKED, "query-name", "query-status"]


def test_a_qemu_that_nothing_was_tried_on_is_told_of() -> None:
    assert [allowed.untried(v) for v in ((7, 2), (8, 0), (11, 1))] == [None, None, None]
    assert "QEMU 7.1 is older" in str(allowed.untried((7, 1)))
    assert "QEMU 11.2 is newer" in str(allowed.untried((11, 2)))
    assert "(7.2 to 11.1)" in str(allowed.untried((12, 0)))
