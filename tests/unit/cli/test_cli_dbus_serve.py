"""`dbus-serve` where something is missing, and its policy."""

from __future__ import annotations

import json
import sys

import pytest

from qmp_memlistener.cli.main import main
from qmp_memlistener.dbus.interface import policy_text


def test_without_dbus_fast_the_extra_and_the_package_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n.startswith("dbus_fast")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "dbus_fast", None)
    assert main(["dbus-serve"]) == 4
    err = capsys.readouterr().err
    assert "qmp-memlistener[dbus]" in err
    assert "python3-dbus-fast" in err


def test_without_a_bus_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nowhere/at/all")
    assert main(["dbus-serve"]) == 4
    assert "the session bus cannot be connected to" in capsys.readouterr().err


def test_the_policy_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dbus-serve", "--policy", "--group", "kvm-watch"]) == 0
    assert capsys.readouterr().out == policy_text("kvm-watch")
    assert main(["dbus-serve", "--policy", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {"schema": 1, "policy": policy_text(None)}


@pytest.mark.parametrize("words", [["--group", "x"], ["--policy", "--group", "a b"]])
def test_a_group_goes_with_a_policy_and_is_a_name(words: list[str]) -> None:
    assert main(["dbus-serve", *words]) == 2
