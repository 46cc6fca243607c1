"""Every way in which a command line says where a monitor is, and where a guest's output goes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.qmp import TcpTarget, UnixTarget
from qmp_memlistener.qmp.chardevs import (
    Chardev,
    chardev_of_options,
    chardev_of_text,
    config_groups,
    options_text,
    parse_options,
)
from qmp_memlistener.qmp.cmdline import CommandLine, parse_arguments

KEYS = st.text(alphabet="abcxyz-", min_size=1, max_size=6).filter(lambda k: k[:2] != "no")
VALUES = st.text(alphabet='ab,=/" ', max_size=8)


@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_options_survive_being_written(options: dict[str, str]) -> None:
    assert parse_options(options_text(options)) == options


@given(st.text(alphabet='abc,=:{}[]"unix tcpfd0', max_size=40))
def test_no_text_raises(text: str) -> None:
    device = chardev_of_text(text)
    assert (device.listens, device.fd, device.address, device.files) is not None
    chardev_of_options(text)
    config_groups(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["id", "backend", "type", "data", "addr"]), inner)
        ),
        max_leaves=8,
    )
)
def test_no_json_raises(document: object) -> None:
    found = chardev_of_options("{" + json.dumps({"id": "x", "backend": document})[1:])
    assert found is None or isinstance(found[1], Chardev)


@pytest.mark.parametrize(
    ("text", "address", "fd"),
    [
        ("unix:path=/run/q,server=on,wait=off", UnixTarget("/run/q"), None),
        ("unix:server=on,wait=off,path=/run/q", UnixTarget("/run/q"), None),
        ("unix:/run/q,server=yes", UnixTarget("/run/q"), None),
        ("unix:path=q,abstract=on,server", UnixTarget("@q"), None),
        ("unix:fd=3,server=on,wait=off", None, 3),
        ("mon:unix:fd=3,server", None, 3),
        ("tcp:host=::1,port=4444,server=on", TcpTarget("::1", 4444), None),
        ("tcp:port=4444,host=,server=on", TcpTarget("127.0.0.1", 4444), None),
        ("unix:path=/run/q", None, None),
        ("telnet:127.0.0.1:4444,server", None, None),
        ("websocket:127.0.0.1:4444,server", None, None),
    ],
)
def test_where_it_listens(
    text: str, address: UnixTarget | TcpTarget | None, fd: int | None
) -> None:
    device = chardev_of_text(text)
    assert (device.address, device.fd) == (address, fd)


@pytest.mark.parametrize(
    ("args", "files", "on_stdout"),
    [
        (("-serial", "file:/log,1"), ("/log,1",), False),
        (("-debugcon", "file:/log"), ("/log",), False),
        (("-serial", "mon:stdio"), (), True),
        (("-nographic",), (), True),
        (("-chardev", "file,id=s,path=/log,append=on"), ("/log",), False),
        (("-chardev", "socket,id=s,path=/s,server=on,logfile=/log"), ("/log",), False),
        (("-chardev", "stdio,id=s,logfile=/log"), ("/log",), True),
        (
            ("-chardev", '{"id":"s","backend":{"type":"file","data":{"out":"/log"}}}'),
            ("/log",),
            False,
        ),
        (("-serial", "unix:/s,server=on,logfile=/log"), ("/log",), False),
        (("-serial", "null"), (), False),
    ],
)
def test_where_the_guests_output_goes(
    args: tuple[str, ...], files: tuple[str, ...], on_stdout: bool
) -> None:
    line = parse_arguments("qemu", args)
    assert (line.guest_files, line.guest_on_stdout) == (files, on_stdout)


CONFIG = """
# what QEMU wrote
[machine]
type = "q35"
  accel="kvm"

[chardev "m,1"]
backend = "socket"
path = "/run/a,b"
server = "on"
[mon "mon0"]
chardev = "m,1"
mode = "control"
[name]
guest = "box"
[msg]
timestamp = "on"
"""


def config(text: str) -> CommandLine:
    return parse_arguments("qemu", ("-readconfig", "f"), lambda _: text)


def test_a_file_for_readconfig_is_as_good_as_options() -> None:
    line = config(CONFIG)
    assert (line.name, line.machine, line.accel, line.timestamps) == ("box", "q35", "kvm", True)
    assert [m.address for m in line.monitors] == [UnixTarget("/run/a,b")]
    assert (line.unread, line.notes) == ((), ())


def test_an_accelerator_of_its_own_group() -> None:
    assert config('[accel]\naccel = "kvm"\n').accel == "kvm"


def test_a_file_that_is_not_known_is_named() -> None:
    line = parse_arguments("qemu", ("-readconfig", "vm.conf"))
    assert (line.monitors, line.accel, line.unread) == ((), None, ("vm.conf",))
    assert "monitors" in line.notes[0]
    assert "vm.conf" in line.notes[0]


@given(st.text(max_size=200))
def test_no_config_raises(text: str) -> None:
    config(text)


def test_what_follows_an_option_is_no_option() -> None:
    line = parse_arguments("qemu", ("-append", "-qmp", "-kernel", "-D", "-qmp", "unix:/q,server"))
    assert [m.address for m in line.monitors] == [UnixTarget("/q")]
    assert line.log_file is None
