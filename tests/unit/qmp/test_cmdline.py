"""What QEMU command lines, as people and libvirt write them, are understood to say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.qmp import MonitorMode, TcpTarget, UnixTarget
from qmp_memlistener.qmp.chardevs import parse_options
from qmp_memlistener.qmp.cmdline import (
    CommandLine,
    is_qemu_name,
    parse_arguments,
    program_index,
)

QEMU = "/usr/bin/qemu-system-x86_64"
JSON_CHARDEV = (
    '{"id":"j","backend":{"type":"socket","data":{"addr":'
    '{"type":"unix","data":{"path":"/run/j"}},"server":true}}}'
)


def parsed(*args: str, binary: str = QEMU) -> CommandLine:
    return parse_arguments(binary, args)


@pytest.mark.parametrize(
    ("option", "target"),
    [
        ("unix:/run/a.qmp,server=on,wait=off", UnixTarget("/run/a.qmp")),
        ("unix:a.qmp,server,nowait", UnixTarget("a.qmp")),
        ("unix:/run/a,,b,server=on", UnixTarget("/run/a,b")),
        ("unix:vm,abstract=on,server=on", UnixTarget("@vm")),
        ("tcp:127.0.0.1:4444,server=on,wait=off", TcpTarget("127.0.0.1", 4444)),
        ("tcp::4444,server", TcpTarget("127.0.0.1", 4444)),
        ("tcp:0.0.0.0:4444,server", TcpTarget("127.0.0.1", 4444)),
        ("tcp:[::1]:4444,server=on", TcpTarget("::1", 4444)),
    ],
)
@pytest.mark.parametrize("name", ["-qmp", "--qmp", "-qmp-pretty"])
def test_qmp_options(name: str, option: str, target: UnixTarget | TcpTarget) -> None:
    (monitor,) = parsed(name, option).monitors
    assert monitor.mode is MonitorMode.CONTROL
    assert monitor.address == target


@pytest.mark.parametrize("option", ["stdio", "pty", "unix:/run/a", "tcp:h:1,server=off", "null"])
def test_monitors_that_nobody_can_connect_to(option: str) -> None:
    (monitor,) = parsed("-qmp", option).monitors
    assert monitor.address is None
    assert monitor.text.startswith(option.partition(",")[0])


def test_chardev_monitors_and_their_modes() -> None:
    line = parsed(
        *("-chardev", "socket,id=q,path=/run/q,server=on,wait=off"),
        *("-chardev", "socket,id=h,path=/run/h,server=on,wait=off"),
        *("-chardev", "socket,id=f,fd=26,server=on,wait=off"),
        *("-chardev", "socket,id=c,path=/run/c,server=off"),
        *("-chardev", "stdio,id=s"),
        *(
            "-chardev",
            JSON_CHARDEV,
        ),
        *("-mon", "chardev=q,mode=control,pretty=on"),
        *("-mon", "h"),
        *("-mon", "chardev=f,mode=control"),
        *("-mon", "chardev=c,mode=control"),
        *("-mon", "chardev=s,mode=control"),
        *("-mon", "chardev=j,mode=control"),
        *("-mon", "chardev=nowhere,mode=control"),
        *("-monitor", "unix:/run/m,server=on"),
        *("-monitor", "mon:chardev:h"),
    )
    got = [(m.mode.value, m.address, m.fd) for m in line.monitors]
    assert got == [
        ("readline", UnixTarget("/run/m"), None),
        ("readline", UnixTarget("/run/h"), None),
        ("control", UnixTarget("/run/q"), None),
        ("readline", UnixTarget("/run/h"), None),
        ("control", None, 26),
        ("control", None, None),
        ("control", None, None),
        ("control", UnixTarget("/run/j"), None),
        ("control", None, None),
    ]


@pytest.mark.parametrize(
    ("args", "machine", "accels", "accel"),
    [
        ((), None, (), None),
        (("-M", "q35"), "q35", (), None),
        (("-machine", "type=pc,accel=kvm:tcg,usb=off"), "pc", ("kvm", "tcg"), None),
        (("-M", "pc,accel=kvm"), "pc", ("kvm",), "kvm"),
        (("-machine", "q35", "-accel", "tcg,thread=single"), "q35", ("tcg",), "tcg"),
        (("-accel", "kvm", "-accel", "tcg"), None, ("kvm", "tcg"), None),
        (("-enable-kvm",), None, ("kvm",), "kvm"),
        (("-M", "pc", "-M", "dump-guest-core=off"), "pc", (), None),
    ],
)
def test_machine_and_accelerator(
    args: tuple[str, ...], machine: str | None, accels: tuple[str, ...], accel: str | None
) -> None:
    line = parsed(*args)
    assert (line.machine, line.accels, line.accel) == (machine, accels, accel)


def test_a_binary_called_kvm_leaves_the_accelerator_open() -> None:
    assert parsed(binary="/usr/libexec/qemu-kvm").accel is None


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("vm1", "vm1"),
        ("guest=vm1,debug-threads=on", "vm1"),
        ("vm,,1,process=x", "vm,1"),
        ("process=x", None),
    ],
)
def test_guest_name(option: str, name: str | None) -> None:
    assert parsed("-name", option).name == name


def test_log_options() -> None:
    line = parsed("-D", "/log/%d", "-d", "guest_errors,tid", "-msg", "timestamp=on", "-daemonize")
    assert (line.log_file, line.log_items) == ("/log/%d", "guest_errors,tid")
    assert (line.timestamps, line.daemonize, line.log_per_thread) == (True, True, True)
    assert line.uses_log
    plain = parsed("-msg", "timestamp=off")
    assert (plain.log_file, plain.timestamps, plain.daemonize) == (None, False, False)
    assert not plain.uses_log
    assert not plain.log_per_thread


def test_readconfig_is_noted() -> None:
    (note,) = parsed("-readconfig", "vm.cfg").notes
    assert "vm.cfg" in note


@pytest.mark.parametrize(
    "argv",
    [
        ("/lib64/ld-linux-x86-64.so.2", "--library-path", "/q/lib", QEMU, "-name", "vm"),
        ("/q/ld-linux-x86-64.so.2", "--argv0", "qemu", "--inhibit-cache", QEMU, "-name", "vm"),
        ("qemu-kvm", "-name", "vm"),
        ("kvm", "-name", "vm"),
        ("/x/qemu-system-x86_64-10.0", "-name", "vm"),
        ("/usr/bin/qemu-acme-system-x86_64", "-name", "vm"),
        ("/nix/store/x/.qemu-system-x86_64-wrapped", "-name", "vm"),
    ],
)
def test_started_otherwise(argv: tuple[str, ...]) -> None:
    at = program_index(argv)
    assert at is not None
    assert is_qemu_name(argv[at])
    assert parse_arguments(argv[at], argv[at + 1 :]).name == "vm"


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("",),
        ("bash", "-c", "qemu-system-x86_64 -qmp stdio"),
        ("sudo", "qemu-system-x86_64"),
        ("qemu-img", "info"),
        ("qemu-x86_64", "./a.out"),
        ("/lib64/ld-linux-x86-64.so.2", "/bin/ls"),
        ("/lib64/ld-linux-x86-64.so.2", "--library-path"),
    ],
)
def test_what_is_no_qemu(argv: tuple[str, ...]) -> None:
    at = program_index(argv)
    assert at is None or not is_qemu_name(argv[at])


@given(st.lists(st.text(alphabet="-qmponhacdevu:,={}[]/ 0s", max_size=12), max_size=12))
def test_no_command_line_raises(args: list[str]) -> None:
    parse_arguments(QEMU, args)


@given(
    st.dictionaries(
        st.text(alphabet="abcxyz", min_size=1, max_size=6),
        st.text(alphabet="ab,=/", max_size=8),
        max_size=5,
    )
)
def test_options_survive_escaping(options: dict[str, str]) -> None:
    text = ",".join(f"{k}={v.replace(',', ',,')}" for k, v in options.items())
    assert parse_options(text) == options
