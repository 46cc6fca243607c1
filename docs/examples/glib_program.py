"""A GLib program with an agent inside: D-Bus in both directions, timers and a guest side by side.

    dbus-run-session python docs/examples/glib_program.py unix:/run/vm.qmp --seconds 60

It offers `org.example.Holes` on the session bus, whose method `Count` tells how many transitions
were seen, and calls that method each second as any Gio client would.  Beside it run a timer of
GLib's, a subprocess each second, a signal handler, and the agent's own traffic with QEMU.  At the
end it prints what each of them did, and what all of it took of a CPU.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from typing import Any

from gi.repository import Gio, GLib

from qmp_memlistener import MemoryListener, attach
from qmp_memlistener.glib_loop import Integration, new_event_loop

NAME, PATH = "org.example.Holes", "/org/example/Holes"
INTERFACE = f"<node><interface name='{NAME}'><method name='Count'><arg type='u' direction='out'/>"
INTERFACE += "</method></interface></node>"


class Counter(MemoryListener):
    """Counts transitions; the present map, which is told first, is none."""

    def __init__(self) -> None:
        self.seen = -1

    def commit(self, transition: object) -> None:
        del transition
        self.seen += 1


def serve(bus: Any, counter: Counter) -> None:
    """Answer `Count`: Gio calls back in the main loop."""

    def called(*call: Any) -> None:
        call[-1].return_value(GLib.Variant("(u)", (max(counter.seen, 0),)))

    description = Gio.DBusNodeInfo.new_for_xml(INTERFACE).interfaces[0]
    bus.register_object(PATH, description, called, None, None)
    Gio.bus_own_name_on_connection(bus, NAME, Gio.BusNameOwnerFlags.NONE, None, None)


async def call(bus: Any) -> int:
    """Ask `Count`: a callback of Gio's sets a future that asyncio waits for."""
    answer = asyncio.get_running_loop().create_future()

    def came(bus: Any, result: Any) -> None:
        try:
            answer.set_result(bus.call_finish(result).unpack()[0])
        except GLib.Error as error:
            answer.set_exception(error)

    kind, flags = GLib.VariantType("(u)"), Gio.DBusCallFlags.NONE
    bus.call(NAME, PATH, NAME, "Count", None, kind, flags, 3000, None, came)
    return int(await answer)


async def main(target: str, seconds: float) -> dict[str, Any]:
    done = {"ticks": 0, "calls": 0, "subprocesses": 0, "signals": 0, "round_trips": 0}
    counter = Counter()

    def tick() -> bool:
        done["ticks"] += 1
        return True

    def signalled() -> None:
        done["signals"] += 1

    bus = Gio.bus_get_sync(Gio.BusType.SESSION)
    serve(bus, counter)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, signalled)
    timer = GLib.timeout_add(100, tick)
    async with attach(target, probes=()) as agent:
        agent.register(counter)
        began, cpu = time.monotonic(), time.process_time()
        while time.monotonic() - began < seconds:
            assert await call(bus) <= agent.transitions
            done["calls"] += 1
            process = await asyncio.create_subprocess_exec("true")
            done["subprocesses"] += await process.wait() == 0
            os.kill(os.getpid(), signal.SIGUSR1)
            await agent.settle()
            done["round_trips"] += 1
            await asyncio.sleep(min(1.0, seconds / 4))
        spent = (time.process_time() - cpu) / (time.monotonic() - began)
    GLib.source_remove(timer)
    return done | {"transitions": max(counter.seen, 0), "cpu": round(spent, 4)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A GLib program with an agent inside.")
    parser.add_argument("target", help="the guest's monitor, such as unix:/run/vm.qmp")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--loop", choices=list(Integration), help="default: what is installed")
    asked = parser.parse_args()
    with asyncio.Runner(loop_factory=lambda: new_event_loop(integration=asked.loop)) as runner:
        print(json.dumps(runner.run(main(asked.target, asked.seconds))))
    sys.exit()
