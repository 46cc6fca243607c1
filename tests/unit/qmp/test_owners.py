"""Who manages a guest, from command lines and control groups as managers make them."""

from __future__ import annotations

import pytest

from qmp_memlistener.qmp import Manager, Owner
from qmp_memlistener.qmp.owners import containers_in, manager_in

LIBVIRT = (
    *("/usr/bin/qemu-system-x86_64", "-name", "guest={name},debug-threads=on", "-S", "-object"),
    '{{"qom-type":"secret","id":"masterKey0","format":"raw","file":"{key}"}}',
    *("-chardev", "socket,id=charmonitor,fd=23,server=on,wait=off"),
    *("-mon", "chardev=charmonitor,id=monitor,mode=control"),
)
OLD_KEY = "secret,id=masterKey0,format=raw,file=/var/lib/libvirt/qemu/domain-1-web/master-key.aes"
POD = "3c4b1f8e-2e63-4a6e-9f0a-0d6a5c1b2d3e"
ID = "9" * 64


def libvirt(name: str, key: str) -> list[str]:
    return [argument.format(name=name, key=key) for argument in LIBVIRT]


@pytest.mark.parametrize(
    ("directory", "uri"),
    [
        ("/var/lib/libvirt/qemu", "qemu:///system"),
        ("/home/u/.config/libvirt/qemu/lib", "qemu:///session"),
        ("/tmp/root/lib/qemu", "qemu:///embed?root=/tmp/root"),
        ("/elsewhere", None),
    ],
)
def test_libvirt_and_its_driver(directory: str, uri: str | None) -> None:
    argv = libvirt("web 1", f"{directory}/domain-1-web 1/master-key.aes")
    assert manager_in(argv) == Owner(Manager.LIBVIRT, "web 1", uri)


def test_libvirt_of_before_json_and_a_comma_in_the_name() -> None:
    argv = [*libvirt("a,,b", ""), "-object", OLD_KEY]
    assert manager_in(argv) == Owner(Manager.LIBVIRT, "a,b", "qemu:///system")


def test_proxmox_by_id_and_pid_file() -> None:
    argv = ["/usr/bin/kvm", "-id", "100", "-name", "web,debug-threads=on"]
    assert manager_in(argv) is None
    argv += ["-pidfile", "/var/run/qemu-server/100.pid", "-daemonize"]
    assert manager_in(argv) == Owner(Manager.PROXMOX, "100")


@pytest.mark.parametrize("argv", [[], ["qemu"], ["qemu", "-mon"], ["-object", "file=/" * 9999]])
def test_nobody(argv: list[str]) -> None:
    assert manager_in(argv) is None


@pytest.mark.parametrize(
    ("cgroup", "owners"),
    [
        (f"0::/system.slice/docker-{ID}.scope", [Owner(Manager.CONTAINER, ID)]),
        (f"4:memory:/docker/{ID}\n0::/", [Owner(Manager.CONTAINER, ID)]),
        (f"0::/machine.slice/libpod-{ID}.scope/container", [Owner(Manager.CONTAINER, ID)]),
        ("0::/lxc.payload.web/system.slice", [Owner(Manager.CONTAINER, "web")]),
        (
            f"0::/kubepods.slice/kubepods-pod{POD.replace('-', '_')}.slice/crio-{ID}.scope",
            [Owner(Manager.CONTAINER, ID), Owner(Manager.POD, POD)],
        ),
        (
            f"0::/kubepods/besteffort/pod{POD}/{ID}",
            [Owner(Manager.CONTAINER, ID), Owner(Manager.POD, POD)],
        ),
        ("0::/user.slice/user-0.slice/session-1.scope", []),
        ("0::/machine.slice/machine-qemu\\x2d1\\x2dweb.scope/libvirt/emulator", []),
        ("", []),
    ],
)
def test_containers(cgroup: str, owners: list[Owner]) -> None:
    assert list(containers_in(cgroup)) == owners
