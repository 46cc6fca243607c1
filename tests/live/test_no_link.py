"""A QEMU that cannot be asked: a session with its process."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from qmp_memlistener.errors import TargetLost, TargetUnreachable
from qmp_memlistener.qmp import Abilities, Monitor, PidTarget
from tests.support.bare_qemu import running
from tests.support.host import patience
from tests.support.live import NO_QEMU, QEMUS

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not QEMUS, reason=NO_QEMU),
    pytest.mark.asyncio,
]


async def test_a_qemu_is_known_by_its_process_and_cannot_be_asked(
    tmp_path: Path,
) -> None:
    async with running(QEMUS[0], tmp_path) as qemu:
        pid = qemu.pid
        monitor = Monitor(PidTarget(pid))
        await monitor.reconnect()
        assert monitor.identity.pid == pid
        assert monitor.identity.certain
        assert monitor.abilities == Abilities()
        assert str(monitor.version) == QEMUS[0].version
        with pytest.raises(TargetUnreachable, match="query-status"):
            await monitor.execute("query-status")
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(patience(5)):
            assert isinstance(await monitor.lost, TargetLost)
        await monitor.close()


async def test_a_process_that_is_no_qemu_is_refused() -> None:
    with pytest.raises(TargetUnreachable, match="no running QEMU"):
        await Monitor(PidTarget(os.getpid())).reconnect()
