"""QMP for the resume guard of a guest that libvirt manages: a process of its own.

    python -m qmp_memlistener.qmp.libvirt_bridge FD TARGET KEY

The guard (`updates.pause`) speaks QMP on a socket and must outlive the agent.  This process has its
own connection to libvirt and speaks QMP on FD: `stop` and `cont` are libvirt's suspend and resume,
everything else goes to QEMU's monitor.  It lives as long as the guard, and as long as the QEMU
process KEY: should libvirtd be restarted meanwhile it connects again, for a guest that is paused is
to be resumed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from ..errors import MemListenerError, MissingPrerequisite
from ..host.processes import Process, process_of
from .libvirt_session import DomainFacts, LibvirtSession
from .links import MANAGED
from .targets import LibvirtTarget, parse_target

__all__ = ["bridged"]

_AGAIN_S = 0.2


def bridged(target: LibvirtTarget, process: Process) -> socket.socket:
    """A socket at whose other end such a process will greet.  Raises OSError."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", __name__]
        try:
            bridge = subprocess.Popen(
                [*command, str(theirs.fileno()), str(target), process.key],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
                pass_fds=(theirs.fileno(),),
                # Ctrl-C and the end of our terminal are not for it.
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
    threading.Thread(target=bridge.wait, daemon=True, name="libvirt bridge").start()
    return ours


class _Bridge:
    """The process: reads commands, writes answers and events."""

    def __init__(self, sock: socket.socket, target: LibvirtTarget, key: str) -> None:
        self._sock = sock
        self._target = target
        self._key = key
        self._lock = threading.Lock()
        self._session, facts = self._connect()
        self._say(
            {
                "QMP": {"version": {}, "capabilities": []},
                "domain": {"uuid": facts.uuid, "uri": facts.uri},
            }
        )

    def run(self) -> None:
        """Until the guard has closed its end, or QEMU has ended."""
        with self._sock.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                answer = self._answer(str(message.get("execute")))
                if "id" in message:
                    answer["id"] = message["id"]
                self._say(answer)

    def _answer(self, name: str) -> dict[str, object]:
        if name == "qmp_capabilities":
            return {"return": {}}
        while True:
            try:
                if name in MANAGED:
                    refused = self._session.change(name, {})
                    if refused is None:
                        return {"return": {}}
                    return {"error": {"class": "GenericError", "desc": refused}}
                answer = json.loads(self._session.command(json.dumps({"execute": name})))
                return {key: answer[key] for key in ("return", "error") if key in answer}
            except MemListenerError:
                self._session.close()
                self._session, _ = self._connect(again=True)

    def _connect(self, *, again: bool = False) -> tuple[LibvirtSession, DomainFacts]:
        """A session; the second time for as long as it takes, while QEMU lives."""
        while True:
            session = LibvirtSession(self._target, self._on_event, lambda _error: self._look())
            try:
                return session, session.open()
            except MissingPrerequisite:
                raise
            except MemListenerError:
                if not again:
                    raise
            self._look()
            time.sleep(_AGAIN_S)

    def _on_event(self, name: str, seconds: int, microseconds: int, details: str | None) -> None:
        stamp = {"seconds": seconds, "microseconds": microseconds}
        data = json.loads(details) if details else {}
        self._say({"event": name, "data": data, "timestamp": stamp})

    def _look(self) -> None:
        """End when QEMU has: then there is nothing to resume."""
        if process_of(self._key) is None:
            os._exit(0)

    def _say(self, message: dict[str, object]) -> None:
        try:
            with self._lock:
                self._sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            os._exit(0)  # the guard has ended


def main(number: str, target: str, key: str) -> None:
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    named = parse_target(target)
    if isinstance(named, LibvirtTarget):
        _Bridge(socket.socket(fileno=int(number)), named, key).run()
    os._exit(0)  # whatever libvirt's threads are at


if __name__ == "__main__":
    main(*sys.argv[1:])
