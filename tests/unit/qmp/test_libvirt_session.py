"""What libvirt's errors and states come to, with a libvirt-python that is made up."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from qmp_memlistener.errors import (
    DeadlineExceeded,
    MonitorBusy,
    TargetError,
    TargetLost,
    TargetUnreachable,
)
from qmp_memlistener.qmp import LibvirtTarget, libvirt_session
from qmp_memlistener.qmp.libvirt_session import LibvirtSession

NO_DOMAIN, INVALID, TIMEOUT, DENIED, SYSTEM, INVALID_ARG = range(1, 7)


class LibvirtError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"libvirt said {code}")
        self.code = code

    def get_error_code(self) -> int:
        return self.code


class Domain:
    """`fails` is the code with which each call fails, `job` that of a job under way."""

    def __init__(self, *, active: bool = True, job: int = 0, state: int = 1) -> None:
        self.active, self.job, self.state_now = active, job, state
        self.fails: int | None = None
        self.calls: list[str] = []

    def isActive(self) -> bool:  # noqa: N802 (libvirt's names)
        return self.active

    def jobInfo(self) -> list[int]:  # noqa: N802
        return [self.job]

    def name(self) -> str:
        return "web1"

    def UUIDString(self) -> str:  # noqa: N802
        return "u-u"

    def state(self) -> list[int]:
        return [self.state_now]

    def suspend(self) -> None:
        self._call("suspend")

    def resume(self) -> None:
        self._call("resume")

    def attachDeviceFlags(self, xml: str, _flags: int) -> None:  # noqa: N802
        self._call(xml)

    def _call(self, what: str) -> None:
        if self.fails is not None:
            raise LibvirtError(self.fails)
        self.calls.append(what)


class Connection:
    def __init__(self, domain: Domain | None, uri: str) -> None:
        self.domain, self.uri, self.alive, self.closed = domain, uri, True, False

    def getURI(self) -> str:  # noqa: N802
        return self.uri

    def isAlive(self) -> bool:  # noqa: N802
        return self.alive

    def close(self) -> None:
        self.closed = True

    def lookupByName(self, _name: str) -> Domain:  # noqa: N802
        if self.domain is None:
            raise LibvirtError(NO_DOMAIN)
        return self.domain

    def lookupByUUIDString(self, _name: str) -> Domain:  # noqa: N802
        raise LibvirtError(INVALID_ARG)

    def __getattr__(self, _name: str) -> Callable[..., int]:
        return lambda *_: 1


class Made:
    """A session of a made-up libvirt."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        domain: Domain | None,
        uri: str = "qemu:///system",
        refuses: int | None = None,
    ) -> None:
        self.gone: list[TargetError] = []
        self.connection = Connection(domain, uri)

        def connect(_uri: str | None) -> Connection:
            if refuses is not None:
                raise LibvirtError(refuses)
            return self.connection

        api = SimpleNamespace(
            libvirtError=LibvirtError,
            open=connect,
            VIR_ERR_NO_DOMAIN=NO_DOMAIN,
            VIR_ERR_OPERATION_INVALID=INVALID,
            VIR_ERR_OPERATION_TIMEOUT=TIMEOUT,
            VIR_ERR_AUTH_FAILED=DENIED,
            VIR_ERR_AUTH_CANCELLED=DENIED,
            VIR_ERR_ACCESS_DENIED=DENIED,
            VIR_ERR_SYSTEM_ERROR=SYSTEM,
            VIR_ERR_INVALID_ARG=INVALID_ARG,
            VIR_DOMAIN_JOB_NONE=0,
            VIR_DOMAIN_RUNNING=1,
            VIR_DOMAIN_EVENT_ID_LIFECYCLE=0,
            VIR_DOMAIN_AFFECT_LIVE=1,
        )
        self.qemu = SimpleNamespace(
            qemuMonitorEventRegister=lambda *_: 1,
            qemuMonitorEventDeregister=lambda *_: None,
            qemuMonitorCommandWithFiles=lambda *_: ("{}", []),
            qemuMonitorCommand=self._command,
        )
        self.domain = domain
        patch.setattr(libvirt_session, "load", lambda: (api, self.qemu))
        self.session = LibvirtSession(
            LibvirtTarget("web1"), lambda *_: None, lambda error: self.gone.append(error)
        )

    def _command(self, domain: Domain, _text: str, _flags: int) -> str:
        if domain.fails is not None:
            raise LibvirtError(domain.fails)
        return "{}"


@pytest.mark.parametrize(
    ("uri", "local"),
    [
        ("qemu:///system", True),
        ("qemu:///embed?root=/r", True),
        ("qemu+unix:///system?socket=/s", True),
        ("qemu+ssh://h/system", False),
        ("qemu+tcp:///system", False),
    ],
)
def test_where_its_processes_are(monkeypatch: pytest.MonkeyPatch, uri: str, local: bool) -> None:
    made = Made(monkeypatch, Domain(), uri)
    facts = made.session.open()
    assert (facts.uuid, facts.local, facts.hands_files) == ("u-u", local, local)
    made.session.close()
    assert made.connection.closed


@pytest.mark.parametrize(
    ("domain", "refuses", "error", "words"),
    [
        (None, None, TargetUnreachable, "no domain"),
        (Domain(active=False), None, TargetUnreachable, "not running"),
        (Domain(job=2), None, MonitorBusy, "migration"),
        (Domain(), DENIED, TargetUnreachable, "could not be reached"),
        (Domain(), SYSTEM, TargetUnreachable, "could not be reached"),
    ],
)
def test_what_is_not_opened(
    monkeypatch: pytest.MonkeyPatch,
    domain: Domain | None,
    refuses: int | None,
    error: type[TargetError],
    words: str,
) -> None:
    made = Made(monkeypatch, domain, refuses=refuses)
    with pytest.raises(error, match=words) as refused:
        made.session.open()
    assert refused.value.exit_code == 3
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("code", "alive", "error"),
    [
        (TIMEOUT, True, DeadlineExceeded),
        (NO_DOMAIN, True, TargetLost),
        (INVALID, True, TargetUnreachable),  # the domain is active: it is another reason
        (SYSTEM, False, TargetLost),
    ],
)
def test_a_command_that_libvirt_refuses(
    monkeypatch: pytest.MonkeyPatch, code: int, alive: bool, error: type[TargetError]
) -> None:
    domain = Domain()
    made = Made(monkeypatch, domain)
    made.session.open()
    domain.fails, made.connection.alive = code, alive
    with pytest.raises(error):
        made.session.command("{}")
    assert [type(e) for e in made.gone] == ([TargetLost] if error is TargetLost else [])


def test_changes_and_their_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    domain = Domain()
    made = Made(monkeypatch, domain)
    made.session.open()
    assert made.session.change("stop", {}) is None
    assert made.session.change("cont", {}) is None  # it runs: libvirt would refuse
    domain.state_now = 3
    assert made.session.change("cont", {}) is None
    assert domain.calls == ["suspend", "resume"]
    domain.fails = INVALID
    assert made.session.change("attach-device", {"xml": "<x/>"}) == f"libvirt said {INVALID}"
    domain.active = False
    with pytest.raises(TargetLost):
        made.session.change("attach-device", {"xml": "<x/>"})
