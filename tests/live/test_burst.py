"""A guest that changes its map without a pause: all of it is written, and a signal is obeyed."""

from __future__ import annotations

import pytest

from qmp_memlistener.guests import QemuBuild
from tests.live.verbs_support import in_time
from tests.support.live import QEMUS, cases, skip_without_kvm
from tools.soak_toggle import burst

pytestmark = pytest.mark.qemu

_ALLOWED_RSS = 96 << 20


@cases("kvm", of=QEMUS[:1])
@pytest.mark.parametrize(
    ("verb", "probes", "signal_first"),
    [("record", "uprobes,ping", False), ("watch", "none", True)],
    ids=["measured", "in the middle"],
)
@pytest.mark.asyncio
async def test_all_transitions_and_a_quick_end(
    build: QemuBuild, accel: str, verb: str, probes: str, signal_first: bool
) -> None:
    """`tools/soak_toggle.py` does the same for longer, on every QEMU."""
    skip_without_kvm(build, accel)
    found = await burst(
        build, 3.0, verb=verb, options=("--probes", probes), signal_first=signal_first
    )
    assert found.faults(in_time()) == []
    assert found.written > 50
    assert max(found.rss) < _ALLOWED_RSS
