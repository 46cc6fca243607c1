"""`dbus-serve`: the guests of this host on a D-Bus, an object each."""

from __future__ import annotations

import asyncio

import rich_click as click

from ..errors import MemListenerError, MissingPrerequisite
from .common import json_option, print_json, run_async, say
from .follow import probe_names
from .signals import signals


@click.command("dbus-serve")
@click.option("--system/--session", default=False, help="Which bus; default: the session bus.")
@click.option("--all", "watch_all", is_flag=True, help="Watch every guest from the start, and not "
              "only those that a client asks to be watched.")  # fmt: skip
@click.option("--probes", callback=probe_names, metavar="NAMES", help="Measure stalls of watched "
              "guests with these only, such as ping,uprobes, or none.")  # fmt: skip
@click.option("--no-trace", is_flag=True, help="Touch neither trace events nor the log of a "
              "watched guest; poll instead.")  # fmt: skip
@click.option("--policy", is_flag=True, help="Print the policy that a system bus needs, and end.")
@click.option("--group", metavar="NAME", help="With --policy: a group that may use the service, "
              "beside root.")  # fmt: skip
@json_option
def command(
    system: bool,
    watch_all: bool,
    probes: tuple[str, ...] | None,
    no_trace: bool,
    policy: bool,
    group: str | None,
    as_json: bool,
) -> None:
    """Serve the guests of this host on a D-Bus: one object for each, with its map, holes and slots.

    A guest is left alone until a client calls Watch on its object; when the last such client has
    left, trace events and log are as they were. Ends with Ctrl-C, or (exit code 3) with the bus.

    Example: qmp-memlistener dbus-serve
    """
    if group is not None and not policy:
        raise click.UsageError("--group goes with --policy")
    if policy:
        from ..dbus.interface import policy_text

        text = policy_text(group)
        if as_json:
            print_json({"schema": 1, "policy": text})
        else:
            say(*text.splitlines())
        return
    run_async(_serve("system" if system else "session", probes, not no_trace, watch_all, as_json))


async def _serve(
    bus: str, probes: tuple[str, ...] | None, trace: bool, watch_all: bool, as_json: bool
) -> None:
    try:
        from dbus_fast import BusType

        from ..dbus.guest import Settings
        from ..dbus.service import serving
    except ImportError as exc:
        raise MissingPrerequisite(
            f"dbus-serve needs dbus-fast, which is not installed in this Python ({exc})",
            remedy="pip install 'qmp-memlistener[dbus]', or the Debian package python3-dbus-fast",
        ) from None
    from ..probes.registry import known_names

    settings = Settings(None if probes is None else known_names(probes), trace)
    async with serving(BusType[bus.upper()], settings, watch_all=watch_all) as service:
        asked = asyncio.Event()
        loop = asyncio.get_running_loop()

        def end() -> bool:
            if asked.is_set():
                return False
            loop.call_soon_threadsafe(asked.set)
            return True

        with signals.asking(end):
            serves = asyncio.create_task(service.run())
            ended = asyncio.create_task(asked.wait())
            told = asyncio.create_task(_tell(service.named, bus, as_json))
            try:
                await asyncio.wait({serves, ended}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                told.cancel()
                ended.cancel()
                serves.cancel()
                await asyncio.wait({serves})
        error = None if serves.cancelled() else serves.exception()
        if isinstance(error, MemListenerError):
            raise error
        assert error is None, error


async def _tell(named: asyncio.Event, bus: str, as_json: bool) -> None:
    """Say when clients can find us."""
    from ..dbus.interface import BUS_NAME

    await named.wait()
    if as_json:
        print_json({"schema": 1, "name": BUS_NAME, "bus": bus})
    else:
        say(f"{BUS_NAME} is on the {bus} bus; Ctrl-C ends it")
