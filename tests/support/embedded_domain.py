"""Run by a test below `reaping`: a domain of the driver in this very process, which is followed.

Prints JSON: how changes were seen, how many of 20 were, and what libvirt says of the domain.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from qmp_memlistener import attach
from qmp_memlistener.guests import HOST_BRIDGE, I440FX, PAM_RAM, Pulse
from qmp_memlistener.records import TransitionRecord
from tests.support.libvirt import ACCEL, domain_xml, embedded

NAME = "embedded"


async def followed(root: Path) -> dict[str, object]:
    target = f"libvirt:{NAME}?connect=qemu:///embed?root={root}"
    (ram,) = await asyncio.to_thread(lambda: list(root.glob("lib/qemu/ram/*/*")))
    seen = 0
    async with attach(target, probes=()) as agent:
        with Pulse(ram) as pulse:
            await pulse.wait_ready()
            records = agent.records()
            toggle = await pulse.toggle(HOST_BRIDGE, I440FX.pam, (PAM_RAM << 4, 0), 20)
            written = await toggle.wait()
            await agent.settle()
        source, pid = agent.source, agent.header.pid
    async for record in records:
        seen += record.merged if isinstance(record, TransitionRecord) else 0
    return {"source": source, "pid": pid, "written": written, "seen": seen}


def main() -> None:
    with embedded() as (root, connection):
        domain = connection.createXML(domain_xml(NAME, accel=ACCEL))
        found = asyncio.run(followed(root))
        found["running"] = domain.state()[0] == 1  # VIR_DOMAIN_RUNNING
        found["qemu"] = int((root / f"run/qemu/{NAME}.pid").read_text())
        json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
