"""`hotplug`, `unplug`, `resize`: what their options mean, and what is refused before anybody is
asked.

The targets here do not exist: whoever tried to reach one would end with exit code 3, not 2.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qmp_memlistener import Agent
from qmp_memlistener.cli import update_options
from qmp_memlistener.cli.update_options import Attaching
from qmp_memlistener.updates.model import (
    GuestStates,
    Intent,
    Outcome,
    Phase,
    PhaseName,
    Plug,
    Resize,
    Result,
    Role,
    Strategy,
    Unplug,
)
from qmp_memlistener.updates.settings import UpdateOptions
from tests.unit.cli.cli_support import Ran, check_types, run

Capture = pytest.CaptureFixture[str]
NOBODY = "unix:/nonexistent/qmp"
MIB = 1 << 20
DEVICE = ("--device", "virtio-rng-pci,id=d0")


@dataclass
class Asked:
    """What a verb would have done."""

    attaching: Attaching
    intend: Intent | Callable[[Agent], Awaitable[Intent]]
    strategy: str
    options: UpdateOptions
    what: str
    as_json: bool

    def intent(self) -> Intent:
        """Of a verb that asks no guest for it."""

        async def intended() -> Intent:
            if not callable(self.intend):
                return self.intend
            return await self.intend(None)  # type: ignore[arg-type]  # it is not looked at

        return asyncio.run(intended())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """The verbs only say what they would do."""
    found: list[Asked] = []

    def take(
        attaching: Attaching,
        intend: Intent | Callable[[Agent], Awaitable[Intent]],
        strategy: str,
        options: UpdateOptions,
        what: str,
        *,
        as_json: bool,
    ) -> int:
        found.append(Asked(attaching, intend, strategy, options, what, as_json))
        return 0

    for verb in ("hotplug", "unplug", "resize"):
        monkeypatch.setattr(f"qmp_memlistener.cli.{verb}.run_update", take)
    return found


def only(ran: Ran, asked: list[Asked]) -> Asked:
    assert (ran.code, ran.err) == (0, "")
    (one,) = asked
    return one


# -- what options mean ---------------------------------------------------------------------------


def test_defaults(capsys: Capture, asked: list[Asked]) -> None:
    one = only(run(capsys, "resize", NOBODY, "+256M"), asked)
    assert one.attaching == Attaching(NOBODY, False, None, None, None, None)
    assert one.strategy == "direct"
    assert one.options == UpdateOptions()
    assert (one.what, one.as_json) == ("resize +256M", False)


def test_everything(capsys: Capture, asked: list[Asked]) -> None:
    one = only(
        run(
            capsys,
            *("resize", NOBODY, "+256M", "--strategy", "pause", "--max-pause", "1.5s"),
            *("--wait", "200ms", "--guard-monitor", "/x/guard", "--no-trace"),
            *("--probes", "ping,trace", "-o", "file", "--ping-monitor", "/x/ping"),
            *("--ops-monitor", "/x/ops", "--json"),
        ),
        asked,
    )
    assert one.attaching == Attaching(NOBODY, True, ("ping", "trace"), "file", "/x/ping", "/x/ops")
    assert one.strategy == "pause"
    assert one.options == UpdateOptions(max_pause_s=1.5, wait_s=0.2, guard_monitor="/x/guard")
    assert one.as_json


@pytest.mark.parametrize(
    ("text", "intent"),
    [
        ("+256M", Resize("+", 256 * MIB)),
        ("-256M", Resize("-", 256 * MIB)),
        ("-256MiB", Resize("-", 256 * MIB)),
        ("-0.5G", Resize("-", 512 * MIB)),
        ("=1G", Resize("=", 1024 * MIB)),
    ],
)
@pytest.mark.parametrize("before", [(), ("--json",), ("--strategy", "hole"), ("-o", "file")])
def test_a_size_may_begin_with_a_dash(
    capsys: Capture, asked: list[Asked], text: str, intent: Resize, before: tuple[str, ...]
) -> None:
    for argv in ((NOBODY, text, *before), (*before, NOBODY, text), (NOBODY, *before, text)):
        asked.clear()
        assert only(run(capsys, "resize", *argv), asked).intent() == intent


def test_what_a_device_stands_on_comes_in_an_order_that_works(
    capsys: Capture, asked: list[Asked]
) -> None:
    one = only(
        run(
            capsys,
            *("hotplug", NOBODY, "--blockdev", "null-co,node-name=b0", *DEVICE),
            *("--netdev", "user,id=n0", "--object", "iothread,id=io0", "--object", "secret,id=s0"),
        ),
        asked,
    )
    plug = one.intent()
    assert isinstance(plug, Plug)
    assert [(b.role, b.id) for b in plug.backends] == [
        (Role.OBJECT, "io0"),
        (Role.OBJECT, "s0"),
        (Role.NETDEV, "n0"),
        (Role.BLOCKDEV, "b0"),
    ]
    assert one.what == "plug virtio-rng-pci d0"


def test_unplug_names_a_device(capsys: Capture, asked: list[Asked]) -> None:
    one = only(run(capsys, "unplug", NOBODY, "d0"), asked)
    assert one.intent() == Unplug("d0")
    assert one.what == "unplug d0"


@pytest.mark.parametrize("as_json", [False, True])
def test_a_property_is_never_split(capsys: Capture, asked: list[Asked], as_json: bool) -> None:
    value = "a,b=c \"d\" 'e' {f} é🐑\n\t\\ ,,id=x"
    text = f"virtserialport,id=p0,name={value.replace(',', ',,')}"
    if as_json:
        text = json.dumps({"driver": "virtserialport", "id": "p0", "name": value})
    plug = only(run(capsys, "hotplug", NOBODY, "--device", text), asked).intent()
    assert isinstance(plug, Plug)
    assert plug.device.arguments == {"driver": "virtserialport", "id": "p0", "name": value}


# -- what is refused before anybody is asked -----------------------------------------------------

HOSTILE = ("", " ", "a b", 'a"b', "a,,b", "a\nb", "é", "🐑", "../x", "1a", "-a", "x" * 5000)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("role", list(Role))
def test_names_that_qemu_does_not_take(capsys: Capture, name: str, role: Role) -> None:
    text = f"some,{role.id_key}={name}"
    as_json = json.dumps({role.type_key: "some", role.id_key: name.replace(",,", ",")})
    for said in (text, as_json):
        device = () if role is Role.DEVICE else DEVICE
        err = run(capsys, "hotplug", NOBODY, f"--{role}", said, *device).refused()
        assert role.id_key in err
        assert len(err) < 500
        assert err.replace("…", "").isascii()


@pytest.mark.parametrize(
    "argv",
    [
        ("hotplug", NOBODY),
        ("hotplug", *DEVICE),
        ("hotplug", NOBODY, "--device", ""),
        ("hotplug", NOBODY, "--device", "{"),
        ("hotplug", NOBODY, "--device", "id=d0"),
        ("hotplug", NOBODY, "--device", "virtio-rng-pci"),
        ("hotplug", NOBODY, "--device", "virtio-rng-pci,id=d0,id=d1"),
        ("hotplug", NOBODY, "--device", "virtio-rng-pci,id=d0,a,b"),
        ("hotplug", NOBODY, "--device", "virtio-rng-pci,id=d0,a=\0"),
        ("hotplug", NOBODY, *DEVICE, "--strategy", "other"),
        ("hotplug", NOBODY, *DEVICE, "--max-pause", "-1s"),
        ("hotplug", NOBODY, *DEVICE, "--max-pause", "0"),
        ("hotplug", NOBODY, *DEVICE, "--wait", "long"),
        ("hotplug", NOBODY, *DEVICE, "--probes", "other"),
        ("hotplug", NOBODY, *DEVICE, "--guard-monitor", "a:b:c", "--strategy", "pause"),
        ("hotplug", NOBODY, *DEVICE, "--guard-monitor", "/x/guard"),
        ("hotplug", NOBODY, *DEVICE, "--guard-monitor", "/x/guard", "--strategy", "hole"),
        ("unplug", NOBODY),
        ("unplug", NOBODY, "d0", "d1"),
        ("resize", NOBODY),
        ("resize", NOBODY, "256M"),
        ("resize", NOBODY, "+256"),
        ("resize", NOBODY, "+0M"),
        ("resize", NOBODY, "=-1G"),
        ("resize", NOBODY, "+256M", "--other"),
        ("resize", NOBODY, "+256M", "-256M"),
        ("resize", "-256M", NOBODY),
        ("resize", NOBODY, "-256M\n"),
        ("resize", NOBODY, "+" + "9" * 5000 + "M"),
        ("resize", NOBODY, "+\u0662\u0665\u0666M"),
    ],
    ids=lambda argv: " ".join(argv)[:60].encode("unicode-escape").decode(),
)  # fmt: skip
def test_wrong_input(capsys: Capture, argv: tuple[str, ...]) -> None:
    ran = run(capsys, *argv)
    assert (ran.code, ran.out) == (2, "")
    assert "rror" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("name", ["", "d\udcff"])
def test_no_device_is_called_that(capsys: Capture, name: str) -> None:
    """More than it gives a new device, QEMU 10.0 takes over QMP: spaces, other scripts."""
    assert "'ID'" in run(capsys, "unplug", NOBODY, name).refused()


def test_good_input_reaches_for_the_target(capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "recording"
    for argv in (
        ("hotplug", NOBODY, *DEVICE, "-o", str(file)),
        ("unplug", NOBODY, "d0", "-o", str(file)),
        ("resize", NOBODY, "-256M", "-o", str(file)),
    ):
        run(capsys, *argv).refused(3)
        assert not file.exists()


# -- what is printed -----------------------------------------------------------------------------

DOCUMENT = {
    "schema": int, "outcome": str, "reason": (str, type(None)), "remedy": (str, type(None)),
    "strategy": str, "phases": list, "stalls": list, "slot_ops": list, "guest_state": dict,
    "transitions": int, "notes": list, "probes": list, "placed": list, "interrupted": bool,
}  # fmt: skip


def outcome(kind: str, reason: str | None) -> Outcome:
    return Outcome(
        outcome=Result(kind),
        reason=reason,
        remedy=None,
        strategy=Strategy.DIRECT,
        phases=[Phase(PhaseName.ACCEPTED, 1_000, 2_000)],
        stalls=[],
        slot_ops=[],
        guest_state=GuestStates("running", "running"),
    )


@pytest.mark.parametrize(
    ("kind", "code"), [("done", 0), ("partial", 1), ("refused", 1), ("failed", 1)]
)
def test_the_exit_code_is_that_of_the_outcome(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, kind: str, code: int
) -> None:
    reason = None if kind == "done" else "d0 \x1b[2J\n is kept"

    async def made(*_: object) -> Outcome:
        return outcome(kind, reason)

    monkeypatch.setattr(update_options, "_update", made)
    ran = run(capsys, "unplug", NOBODY, "d0", "--json")
    assert (ran.code, ran.err) == (code, "")
    assert ran.out.count("\n") == 1
    document = json.loads(ran.out)
    check_types(document, DOCUMENT)
    assert document["phases"] == [{"name": "accepted", "start_ns": 1_000, "end_ns": 2_000}]
    assert document["guest_state"] == {"before": "running", "after": "running"}
    assert document["reason"] == reason
    ran = run(capsys, "unplug", NOBODY, "d0")
    assert ran.code == code
    assert ran.out.startswith(f"{kind}: unplug d0 (strategy direct)\n")
    assert "\x1b" not in ran.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ("--transition",)),
        (("+256M", "--transition", "pam"), ("--guest-made",)),
        (("--transition", "pam", "--guest-made", "3"), ("--guest-made",)),
        (("--transition", "flash"), ("--transition", "flash")),
        (("--guest-made", "0"), ("--guest-made",)),
        (("--transition", "pam", "--strategies", "hole,naive"), ("direct,pause,inhibit,hole",)),
        (("+256M", "--strategies", "inhibit"), ("direct,pause,hole",)),
        (("--transition", "pam", "--object", "memory-backend-ram,id=m0"), ("INTENT",)),
        (("--transition", "pam", "--window", "0s"), ("--window",)),
    ],
)
def test_what_is_compared_is_one_thing(
    capsys: Capture, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    ran = run(capsys, "compare", NOBODY, *options)
    assert ran.code == 2
    for word in words:
        assert word in ran.err
