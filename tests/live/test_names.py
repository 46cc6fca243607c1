"""Guests by their names: which of the host's, and what a name cannot lead to."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest

from qmp_memlistener.cli.common import complete_target
from qmp_memlistener.errors import InputError, MissingPrerequisite, MonitorBusy, TargetUnreachable
from qmp_memlistener.qmp import Monitor, libvirt_session, parse_target
from tests.support.bare_qemu import running
from tests.support.host import patience
from tests.support.live import NO_QEMU, QEMUS
from tests.support.verbs import run_verb

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not QEMUS, reason=NO_QEMU),
    pytest.mark.asyncio,
]


async def test_a_guest_by_its_name(tmp_path: Path) -> None:
    name = f"web-{os.getpid()}"
    async with running(QEMUS[0], tmp_path, "-name", f"guest={name}") as qemu:
        target = parse_target(f"name:{name}")
        async with await Monitor.connect(target) as monitor:
            assert monitor.identity.pid == qemu.pid
            assert str(monitor.target) in (str(qemu.a), str(qemu.b))
        listed = await run_verb("list", "--json")
        (guest,) = [g for g in json.loads(listed.out)["guests"] if g["pid"] == qemu.pid]
        assert guest["owners"] == []
        assert guest["targets"] == [str(target), f"pid:{qemu.pid}", str(qemu.a), str(qemu.b)]
        async with asyncio.timeout(patience(10)):  # a busy host may not look at each in time
            while not (found := await asyncio.to_thread(completed, "name:web")):
                pass
        assert found == [str(target)]
        (tmp_path / "other").mkdir()
        async with running(QEMUS[0], tmp_path / "other", "-name", name) as other:
            with pytest.raises(InputError, match="2 guests") as refused:
                await Monitor.connect(target)
            assert {f"pid:{qemu.pid}", f"pid:{other.pid}"} <= words(refused.value.message)


async def test_a_name_that_nobody_has() -> None:
    with pytest.raises(TargetUnreachable, match='"nobody at all"'):
        await Monitor.connect(parse_target("name:nobody at all"))


async def test_what_is_missing_for_libvirt_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(importlib, "import_module", missing)
    libvirt_session.load.cache_clear()
    with pytest.raises(MissingPrerequisite) as refused:
        await Monitor.connect(parse_target("libvirt:web1"))
    assert refused.value.exit_code == 4
    assert "qmp-memlistener[libvirt]" in str(refused.value.remedy)
    assert "python3-libvirt" in str(refused.value.remedy)


async def test_a_guest_of_libvirts_by_its_process_names_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without libvirt's module; the only monitor serves libvirt."""
    monkeypatch.setattr("qmp_memlistener.qmp.resolving.is_installed", lambda: False)
    chardev = f"socket,id=charmonitor,path={tmp_path}/m,server=on,wait=off"
    options = ("-name", "guest=mine", "-chardev", chardev)
    monitor = ("-mon", "chardev=charmonitor,id=monitor,mode=control")
    async with (
        running(QEMUS[0], tmp_path, *options, *monitor, monitors=False) as qemu,
        await Monitor.connect(parse_target(f"unix:{tmp_path}/m")),
    ):
        with pytest.raises(MonitorBusy) as busy:
            await Monitor.connect(parse_target(f"pid:{qemu.pid}"))
    assert "libvirt:mine" in str(busy.value.remedy)
    assert "qmp-memlistener[libvirt]" in str(busy.value.remedy)


def completed(incomplete: str) -> list[str]:
    return complete_target(None, None, incomplete)  # type: ignore[arg-type]  # not looked at


def words(text: str) -> set[str]:
    found: Iterable[str] = text.replace(",", " ").split()
    return set(found)
