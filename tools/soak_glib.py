"""A GLib program with an agent inside, for a minute under each loop: does all of it proceed?

    dbus-run-session python -m tools.soak_glib [--seconds 60] [--qemu 11.1]

Runs docs/examples/glib_program.py on a guest that changes its map every half second.  Each timer
tick, D-Bus call, subprocess, signal and round trip must have happened, with less than 2 % of a CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

from qmp_memlistener.glib_loop import integrations
from qmp_memlistener.guests import (
    HOST_BRIDGE,
    I440FX,
    PAM_RAM,
    GuestSpec,
    Pulse,
    boot_args,
    find_qemus,
    launch,
)

PROGRAM = Path(__file__).parents[1] / "docs" / "examples" / "glib_program.py"
MOST_CPU = 0.02
PERIOD_S = 0.5


async def soak(version: str, seconds: float) -> int:
    build = [b for b in find_qemus() if b.version.startswith(version)][-1]
    faults = 0
    async with launch(GuestSpec(accel="kvm", args=boot_args()).on(build)) as guest:
        assert guest.ram is not None
        with Pulse(guest.ram) as pulse:
            await pulse.wait_ready()
            period = int(PERIOD_S * 3e9)
            values = (PAM_RAM << 4, 0)
            await pulse.toggle(
                HOST_BRIDGE, I440FX.pam, values, 1 << 31, period=period, unit="ticks"
            )
            for loop in integrations():
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, str(PROGRAM), f"unix:{guest.monitors[0]}"),
                    *("--seconds", str(seconds), "--loop", loop),
                    stdout=asyncio.subprocess.PIPE,
                )
                out, _ = await process.communicate()
                did = json.loads(out)
                wrong = [name for name in ("calls", "subprocesses", "signals", "round_trips")
                         if did[name] < seconds * 0.8]  # fmt: skip
                wrong += ["ticks"] if did["ticks"] < seconds * 8 else []
                wrong += ["transitions"] if did["transitions"] < seconds else []
                wrong += ["cpu"] if did["cpu"] >= MOST_CPU else []
                print(f"QEMU {build.version}, {loop}: {did}, wrong: {wrong or 'nothing'}")
                faults += len(wrong)
    return 1 if faults else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--qemu", default="", help="a version that is installed")
    asked = parser.parse_args()
    sys.exit(asyncio.run(soak(asked.qemu, asked.seconds)))
