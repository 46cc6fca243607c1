"""Targets: every accepted form, and what the refusal says about the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.errors import InputError
from qmp_memlistener.qmp import (
    LibvirtTarget,
    NameTarget,
    PidTarget,
    Target,
    TcpTarget,
    UnixTarget,
    parse_target,
)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("unix:/run/vm.qmp", UnixTarget("/run/vm.qmp")),
        ("unix:vm.qmp", UnixTarget("vm.qmp")),
        ("unix:a:1", UnixTarget("a:1")),
        ("unix:@vm", UnixTarget("@vm")),
        ("/run/vm.qmp", UnixTarget("/run/vm.qmp")),
        ("./vm:4444", UnixTarget("./vm:4444")),
        ("localhost:4444", TcpTarget("localhost", 4444)),
        (":4444", TcpTarget("localhost", 4444)),
        ("tcp:10.0.0.1:4444", TcpTarget("10.0.0.1", 4444)),
        ("[::1]:4444", TcpTarget("::1", 4444)),
        ("[fe80::1%eth0]:1", TcpTarget("fe80::1%eth0", 1)),
        ("pid:1", PidTarget(1)),
        ("pid:4194304", PidTarget(4194304)),
        ("name:web 1", NameTarget("web 1")),
        ("name:a/b:1", NameTarget("a/b:1")),
        ("libvirt:web1", LibvirtTarget("web1")),
        ("libvirt:a?b", LibvirtTarget("a?b")),
        (
            "libvirt:web1?connect=qemu:///embed?root=/r",
            LibvirtTarget("web1", "qemu:///embed?root=/r"),
        ),
    ],
)
def test_accepted_forms(text: str, target: Target) -> None:
    assert parse_target(text) == target
    assert parse_target(str(target)) == target


def test_a_bare_name_is_a_path_when_it_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        parse_target("vm.qmp")
    (tmp_path / "vm.qmp").touch()
    assert parse_target("vm.qmp") == UnixTarget("vm.qmp")


@pytest.mark.parametrize(
    "text",
    [
        *("", "unix:", "unix:@", "pid:", "pid:0", "pid:-1", "pid:x", "pid:99999999999", "pid:٣"),
        *(
            "host:0",
            "host:65536",
            "host:port",
            "tcp:host",
            "::1:4444x",
            "name:",
            "libvirt:",
            "libvirt:vm?connect=",
            "a b:1",
        ),
        *("no-such-file", "a/b\0c", "/run/x\ny"),
        *("bad..host:12", ".:5", f"{'x' * 70}:12", "tcp:bad..host:12"),
    ],
)
def test_everything_else_is_refused_with_the_accepted_forms(text: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_target(text)
    assert refused.value.exit_code == 2
    for form in ("unix:PATH", "HOST:PORT", "pid:N", "name:GUEST", "libvirt:DOMAIN"):
        assert form in (refused.value.remedy or "")


@given(st.text(max_size=40))
def test_any_text_is_a_target_or_an_input_error(text: str) -> None:
    try:
        target = parse_target(text)
    except InputError:
        return
    assert parse_target(str(target)) == target
