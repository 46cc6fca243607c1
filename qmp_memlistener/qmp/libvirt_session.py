"""A connection to libvirt and one of its domains; every call blocks.

libvirt-python is an extra: it is imported when a target asks for it.  libvirt reports events from
an event loop of its own, which a process has once.  Here that is libvirt's default one in a daemon
thread: the loop of libvirtaio belongs to one asyncio loop, and does nothing when that is closed.  A
program that has registered another before keeps its own.

Sources: libvirt's docs of virConnectOpen, virDomainQemuMonitorCommand and
virConnectDomainQemuMonitorEventRegister; src/qemu/qemu_driver.c for job lock and taint.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias
from xml.etree import ElementTree as ET

from ..errors import (
    DeadlineExceeded,
    MissingPrerequisite,
    MonitorBusy,
    TargetError,
    TargetLost,
    TargetUnreachable,
)
from .targets import LibvirtTarget

__all__ = ["INSTALL", "DomainFacts", "LibvirtSession", "OnDomainEvent", "is_installed", "load"]

OnDomainEvent = Callable[[str, int, int, str | None], None]
"""Name, seconds and microseconds of QEMU's stamp, its data as JSON or None; called in libvirt's
thread."""

INSTALL = "pip install 'qmp-memlistener[libvirt]', or Debian's package python3-libvirt"
_Objects: TypeAlias = Any
"""What libvirt-python makes; it has no types."""
_KEEPALIVE_S, _KEEPALIVE_COUNT = 2, 3
"""A libvirtd that does not answer that often is gone; the connection then ends by itself."""
_STOPPED = 5  # VIR_DOMAIN_EVENT_STOPPED, include/libvirt/libvirt-domain.h


@dataclass(frozen=True, slots=True)
class DomainFacts:
    """What libvirt says of the domain.  `uri` is what we are connected to; `local`: its processes
    are on this host; `hands_files`: a descriptor can go with a command."""

    name: str
    uuid: str
    uri: str
    local: bool
    hands_files: bool


def is_installed() -> bool:
    """libvirt-python is here."""
    return importlib.util.find_spec("libvirt") is not None


@functools.cache
def load() -> tuple[ModuleType, ModuleType]:
    """libvirt and libvirt_qemu, their events running.  Raises MissingPrerequisite."""
    try:
        api = importlib.import_module("libvirt")
        qemu = importlib.import_module("libvirt_qemu")
    except ImportError as error:
        raise MissingPrerequisite(
            f"libvirt's Python module is missing ({error})",
            remedy=INSTALL,
        ) from error
    api.registerErrorHandler(_say_nothing, None)  # errors are exceptions, too
    api.virEventRegisterDefaultImpl()
    threading.Thread(target=_run_events, args=(api,), daemon=True, name="libvirt events").start()
    return api, qemu


def _say_nothing(_context: object, _error: object) -> None:
    """libvirt prints errors on stderr without a handler."""


def _run_events(api: ModuleType) -> None:
    while True:
        api.virEventRunDefaultImpl()


class LibvirtSession:
    """One connection for one domain.

    `on_event` and `on_gone(error)` are called in libvirt's thread; the second when the domain has
    ended or the connection broke, maybe more than once.
    """

    def __init__(
        self,
        target: LibvirtTarget,
        on_event: OnDomainEvent,
        on_gone: Callable[[TargetError], None],
    ) -> None:
        self._target = target
        self._on_event = on_event
        self._on_gone = on_gone
        self._lock = threading.Lock()
        self._closed = False
        self._undo: list[Callable[[], object]] = []

    def open(self) -> DomainFacts:
        """Connect, find the domain, have its events reported.  Raises TargetError and
        MissingPrerequisite."""
        self._libvirt, self._qemu = load()
        try:
            return self._open()
        except self._libvirt.libvirtError as error:
            raise self._typed(error, "be reached") from error
        finally:
            if self._closed:  # given up meanwhile
                self._take_back()

    def _open(self) -> DomainFacts:
        api, target = self._libvirt, self._target
        connection = api.open(target.uri)
        self._undo.append(connection.close)
        self._connection = connection
        uri = str(connection.getURI())
        try:
            connection.setKeepAlive(_KEEPALIVE_S, _KEEPALIVE_COUNT)
        except api.libvirtError:
            pass  # a driver in this process has no connection that could break
        domain = self._find(connection)
        self._domain = domain
        if not domain.isActive():
            raise TargetUnreachable(
                f"{target} is not running", remedy=f"virsh -c {uri} start {domain.name()}"
            )
        self._refuse_if_in_job(uri)
        self._register(connection, domain)
        scheme, _, rest = uri.partition("://")
        host = rest.partition("/")[0]
        direct = "+" not in scheme or scheme.endswith("+unix")
        return DomainFacts(
            name=str(domain.name()),
            uuid=str(domain.UUIDString()),
            uri=uri,
            local=not host and direct,
            hands_files=not host and direct and hasattr(self._qemu, "qemuMonitorCommandWithFiles"),
        )

    def _find(self, connection: _Objects) -> _Objects:
        api, name = self._libvirt, self._target.domain
        for look_up in ("lookupByName", "lookupByUUIDString"):
            try:
                return getattr(connection, look_up)(name)
            except api.libvirtError as error:
                if error.get_error_code() not in (api.VIR_ERR_NO_DOMAIN, api.VIR_ERR_INVALID_ARG):
                    raise
        raise TargetUnreachable(
            f"libvirt has no domain that {self._target} names",
            remedy="`virsh list` shows those that run; another connection: "
            f"libvirt:{name}?connect=URI",
        )

    def _refuse_if_in_job(self, uri: str) -> None:
        """A migration, a save or a dump holds off commands to the monitor.  Raises MonitorBusy."""
        try:
            job = self._domain.jobInfo()[0]
        except self._libvirt.libvirtError:
            return
        if job != self._libvirt.VIR_DOMAIN_JOB_NONE:
            raise MonitorBusy(
                f"libvirt has a job on {self._target} that lasts (a migration, save or dump), and "
                "no monitor command gets in",
                remedy="try again when it is over: "
                f"virsh -c {uri} domjobinfo {self._target.domain}",
            )

    def _register(self, connection: _Objects, domain: _Objects) -> None:
        api, qemu = self._libvirt, self._qemu

        def on_close(_connection: object, _reason: int, _opaque: object) -> None:
            self._on_gone(self._lost("the connection to libvirt broke"))

        def on_lifecycle(
            _connection: object, _domain: object, event: int, _detail: int, _opaque: object
        ) -> None:
            if event == _STOPPED:
                self._on_gone(self._lost("the domain has ended"))

        def on_event(
            _connection: object,
            _domain: object,
            name: str,
            seconds: int,
            microseconds: int,
            details: str | None,
            _opaque: object,
        ) -> None:
            self._on_event(name, seconds, microseconds, details)

        try:
            connection.registerCloseCallback(on_close, None)
            self._undo.append(connection.unregisterCloseCallback)
        except api.libvirtError:
            pass  # as above
        number = connection.domainEventRegisterAny(
            domain, api.VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_lifecycle, None
        )
        self._undo.append(lambda: connection.domainEventDeregisterAny(number))
        events = qemu.qemuMonitorEventRegister(connection, domain, None, on_event, None, 0)
        self._undo.append(lambda: qemu.qemuMonitorEventDeregister(connection, events))

    def command(self, text: str, files: Sequence[int] = ()) -> str:
        """QEMU's answer as JSON.  Raises TargetError, ConnectionError when the session is over."""
        try:
            if files:
                answer, _ = self._qemu.qemuMonitorCommandWithFiles(
                    self._domain, text, list(files), 0
                )
                return str(answer)
            return str(self._qemu.qemuMonitorCommand(self._domain, text, 0))
        except self._libvirt.libvirtError as error:
            raise self._typed(error, "run a monitor command") from error

    def change(self, name: str, arguments: Mapping[str, object]) -> str | None:
        """A change of the domain (`links.MANAGED`); why libvirt refused it, or None.

        Raises TargetError.
        """
        domain, live = self._domain, self._libvirt.VIR_DOMAIN_AFFECT_LIVE
        try:
            if name == "stop":
                domain.suspend()
            elif name == "cont":
                if domain.state()[0] != self._libvirt.VIR_DOMAIN_RUNNING:
                    domain.resume()
            elif name == "attach-device":
                domain.attachDeviceFlags(arguments["xml"], live)
            elif name == "detach-device":
                domain.detachDeviceAlias(arguments["alias"], live)
            elif name == "update-memory-device":
                changed = _requesting(domain.XMLDesc(0), arguments["alias"], arguments["bytes"])
                domain.updateDeviceFlags(changed, live)
            else:
                raise AssertionError(name)
        except self._libvirt.libvirtError as error:
            if domain.isActive() and self._connection.isAlive():
                return str(error)
            raise self._typed(error, f"do {name}") from error
        return None

    def close(self) -> None:
        """Say no more, and hang up.  From any thread; blocks as long as libvirt does."""
        self._closed = True
        self._take_back()

    def _take_back(self) -> None:
        with self._lock:
            while self._undo:
                try:
                    self._undo.pop()()
                except self._libvirt.libvirtError:
                    pass  # the connection is broken: nothing is left of it

    def _is_active(self) -> bool:
        try:
            return bool(self._domain.isActive())
        except self._libvirt.libvirtError:
            return False

    def _lost(self, why: str) -> TargetLost:
        return TargetLost(
            f"{self._target}: {why}",
            remedy="was the guest shut down, or libvirtd restarted?  Trace events of a guest that "
            "runs on are put back by the next attach",
        )

    def _typed(self, error: Exception, what: str) -> TargetError:
        """Our error for libvirt's."""
        api, target = self._libvirt, self._target
        code = getattr(error, "get_error_code", lambda: None)()
        message = f"{target} could not {what}: {error}"
        if code == api.VIR_ERR_NO_DOMAIN or (
            code == api.VIR_ERR_OPERATION_INVALID and not self._is_active()
        ):
            self._on_gone(self._lost("the domain has ended"))
            return self._lost("the domain has ended")
        connection = getattr(self, "_connection", None)
        if connection is not None and not connection.isAlive():
            lost = self._lost("the connection to libvirt broke")
            self._on_gone(lost)
            return lost
        if code == api.VIR_ERR_OPERATION_TIMEOUT:
            return DeadlineExceeded(
                message, remedy=f"another client has a job on it: virsh domjobinfo {target.domain}"
            )
        if code in (api.VIR_ERR_AUTH_FAILED, api.VIR_ERR_AUTH_CANCELLED, api.VIR_ERR_ACCESS_DENIED):
            return TargetUnreachable(
                message, remedy="run as root, or as a user in the group libvirt"
            )
        remedies = {
            api.VIR_ERR_SYSTEM_ERROR: "is libvirtd running, and is this the right connection?  "
            f"libvirt:{target.domain}?connect=URI names another",
        }
        return TargetUnreachable(message, remedy=remedies.get(code))


def _requesting(xml: str, alias: object, size: object) -> str:
    """The virtio-mem device of a domain with another size requested, as XML."""
    for memory in ET.fromstring(xml).iterfind("./devices/memory"):
        name, requested = memory.find("alias"), memory.find("target/requested")
        if name is not None and name.get("name") == alias and requested is not None:
            requested.set("unit", "B")
            requested.text = str(size)
            return ET.tostring(memory, encoding="unicode")
    raise TargetUnreachable(f"the domain has no virtio-mem device {alias}")
