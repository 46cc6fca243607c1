"""Every command that may be sent to a QEMU, with what shows that it does no harm.  Pure.

`check` is called where commands leave a process: in `Monitor`, in the ping probe's own link, and by
the resume guard with the names that it is given from here (`names`).  What is not listed is not
sent, and nothing whose name begins with `x-` is: QEMU promises nothing about those, and one of them
ended guests (`x-query-virtio-status`, 11.1.3: an assertion of its visitor).

"seen" at the end stands for: sent to QEMU 7.2.22, 10.0.2 and 11.1.3 by the verbs, and the guest
lived; tests/live/test_allowed.py fails where one is not.  Files are those of QEMU's source tree,
tests those that send the command.  What one of these versions does not bear is listed for none.  A
QEMU outside `TRIED` gets the same commands: all but the human-monitor ones are stable interface,
and what it does not have it refuses.  The user is told (`untried`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from ..errors import CommandNotAllowed
from ..text import quoted

__all__ = ["HMP", "QMP", "TRIED", "Hmp", "Permit", "Qmp", "check", "is_listed", "names"]
__all__ += ["may_be_examined", "untried"]

TRIED = ((7, 2), (11, 1))
"""The oldest and the newest QEMU that these commands were sent to."""

Arguments = Mapping[str, object]


class Permit(StrEnum):
    """What a user may ask for although it does harm."""

    FLAT_VIEW = "--unsafe-flatview"


@dataclass(frozen=True, slots=True)
class Qmp:
    """A QMP command.  `only` says with which arguments, None: with any; `why` is the evidence."""

    name: str
    why: str
    only: Callable[[Arguments], bool] | None = None


@dataclass(frozen=True, slots=True)
class Hmp:
    """A human-monitor command: `form` is a pattern of the whole line, its blanks made single."""

    form: re.Pattern[str]
    why: str
    permit: Permit | None = None


_DEVICE = re.compile(r"/machine/peripheral/[^/]+")
_READ = re.compile(
    r"type|memory|nvdimm"  # of the machine
    r"|drive|memdev|netdev|hotplug|parent_bus|addr|size"  # of devices and of memory regions
    r"|port|channel|scsi-id|lun|unit|nr|slot|devno|address|iobase|node"  # of places on a bus
    r"|(?:socket|die|cluster|core|thread)-id"
    r"|hotplug-handler|child\[\d+\]"  # of buses
)


def _is_read(arguments: Arguments) -> bool:
    return _READ.fullmatch(str(arguments.get("property"))) is not None


def _is_resized(arguments: Arguments) -> bool:
    path = str(arguments.get("path"))
    return arguments.get("property") == "requested-size" and _DEVICE.fullmatch(path) is not None


_GPU = re.compile(r"(?:virtio|vhost-user)-(?:gpu|vga)")


def may_be_examined(driver: str) -> bool:
    """`device-list-properties` may be asked about this type: it makes an instance and drops it.

    tools/record/record_introspection.py asked for every type of 7.2, 10.0 and 11.1 on several
    machines, and again with each module of devices as the only one; what became of it is in
    tests/conformance/introspection.  What ended guests, on each of the three, were display devices
    whose parts lie in another module: QEMU aborts or exits where that is not installed (`missing
    object type 'virtio-gpu-gl-device'`).  Distributors cut modules as they like, so no QEMU is
    asked about those.  None of them can be hotplugged (hw/display/virtio-gpu-pci.c and others).
    """
    return _GPU.match(driver) is None


def _is_examinable(arguments: Arguments) -> bool:
    return may_be_examined(str(arguments.get("typename")))


QMP = (
    # the session
    Qmp("qmp_capabilities", "monitor/qmp-cmds-control.c; the session begins with it"),
    Qmp("query-yank", "util/yank.c: lists instances, no BQL; seen"),
    # reading: state
    Qmp("query-status", "returns two fields of the run state; seen"),
    Qmp("query-name", "returns a string of the command line; seen"),
    Qmp(
        "query-uuid",
        "returns a string of the command line; where QEMU's process is not visible; "
        "tests/live/test_wrong_guest.py",
    ),
    Qmp("query-kvm", "returns two flags; the cheapest there is, 0.2 ms; seen"),
    Qmp("query-accelerators", "10.2 and later; reads QOM classes; seen"),
    Qmp("query-migrate", "migration/migration.c, fill_source_migration_info: reads; seen"),
    Qmp("query-block-jobs", "blockdev.c: reads the list of jobs; seen"),
    Qmp("query-cpus-fast", "hw/core/machine-qmp-cmds.c: no vCPU is stopped; seen"),
    Qmp("query-stats-schemas", "stats/stats-qmp-cmds.c: reads the schema; seen"),
    Qmp(
        "query-stats",
        "accel/kvm/kvm-all.c: reads KVM's statistics, a call on each vCPU, 0.8 to 1.6 ms; seen",
    ),
    # reading: the machine
    Qmp("query-memory-devices", "hw/mem/memory-device.c: reads the list; seen"),
    Qmp("query-memdev", "hw/core/machine-qmp-cmds.c: reads the backends; seen"),
    Qmp("query-named-block-nodes", "block.c, flat: reads the graph; seen"),
    Qmp("query-acpi-ospm-status", "hw/acpi: reads the status words of slots; seen"),
    Qmp("query-chardev", "chardev/char.c: reads labels and file names; seen"),
    Qmp("query-pci", "hw/pci/pci-qmp-cmds.c: reads configuration space, changes nothing; seen"),
    Qmp("qom-get", "getters that copy a field or resolve a link; only those; seen", _is_read),
    Qmp("qom-list", "qom/qom-qmp-cmds.c: names and types, runs no getter; seen"),
    Qmp(
        "device-list-properties",
        "makes an instance: tests/conformance/introspection, every type of 7.2, 10.0, 11.1",
        _is_examinable,
    ),
    # tracing
    Qmp(
        "getfd",
        "monitor/fds.c: keeps a descriptor under a name; our log for a QEMU; "
        "tests/live/test_monitor_trace_lending.py",
    ),
    Qmp("closefd", "monitor/fds.c: drops that descriptor; sent after the former"),
    Qmp("trace-event-get-state", "trace/qmp.c: reads; seen"),
    Qmp("trace-event-set-state", "trace/qmp.c: sets the flag of an event; seen"),
    # what a user asks for
    Qmp("stop", "system/cpus.c, vm_stop; seen"),
    Qmp("cont", "monitor/qmp-cmds.c: refuses where it must; seen"),
    Qmp("device_add", "the verb itself; seen"),
    Qmp("device_del", "the verb itself; seen"),
    Qmp("object-add", "a backend of what is plugged; seen"),
    Qmp("object-del", "a backend: refused while in use (user_creatable_del); seen"),
    Qmp("netdev_add", "a backend of what is plugged; seen"),
    Qmp("netdev_del", "a backend; seen"),
    Qmp("blockdev-add", "a backend of what is plugged; seen"),
    Qmp("blockdev-del", "a backend: refused while in use; seen"),
    Qmp("qom-set", "requested-size of virtio-mem: the resize itself; seen", _is_resized),
)


def _form(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


HMP = (
    Hmp(_form("info mtree -o -D"), "prints the region tree, takes no FlatView reference; seen"),
    Hmp(
        _form("info mtree -f -o"),
        "leaks a FlatView reference per view (7.2, 10.0): no device in one is ever freed again",
        Permit.FLAT_VIEW,
    ),
    Hmp(_form("info ramblock"), "system/physmem.c, ram_block_format: reads under RCU; seen"),
    Hmp(_form("info network"), "net/net.c: reads the list of clients; seen"),
    Hmp(
        _form("info registers -a"),
        "each vCPU's state is read and dumped; sent to guests that an error has stopped; observed "
        "on 7.2.22, 10.0.2 and 11.1.3 (tests/live/test_guest_failures.py)",
    ),
    Hmp(_form("gva2gpa 0x[0-9a-f]+"), "target/i386: walks page tables; sent with the former"),
    Hmp(
        _form("print 0x[0-9a-f]+"), "evaluates a number; its line in the log is what we want; seen"
    ),
    Hmp(
        _form("logfile .+"),
        "util/log.c: opens a file of ours, or what was there before; "
        "tests/live/test_monitor_trace.py",
    ),
    Hmp(_form("info sync-profile 0x[0-9a-f]+"), "util/qsp.c: sorts counters, 0.1 ms; seen"),
    Hmp(_form("sync-profile(?: on| off)?"), "util/qsp.c: exchanges the functions that lock; seen"),
)

_BY_NAME = {command.name: command for command in QMP}
_HMP = "human-monitor-command"


def untried(release: tuple[int, int]) -> str | None:
    """What to tell the user of a QEMU that is older or newer than those of `TRIED`."""
    oldest, newest = TRIED
    if oldest <= release <= newest:
        return None
    first, last, this = (f"{major}.{minor}" for major, minor in (oldest, newest, release))
    return (
        f"QEMU {this} is {'older' if release < oldest else 'newer'} than those that our commands "
        f"were tried on ({first} to {last}): whether they do harm there is unknown"
    )


def is_listed(
    name: str,
    arguments: Arguments | None = None,
    permits: frozenset[Permit] = frozenset(),
) -> bool:
    """It may be sent to a QEMU."""
    given = arguments or {}
    if name == _HMP:
        line = " ".join(str(given.get("command-line")).split())
        return any(
            hmp.form.fullmatch(line) and (hmp.permit is None or hmp.permit in permits)
            for hmp in HMP
        )
    command = _BY_NAME.get(name)
    return command is not None and (command.only is None or command.only(given))


def check(
    name: str,
    arguments: Arguments | None = None,
    permits: frozenset[Permit] = frozenset(),
) -> None:
    """Raises CommandNotAllowed for what may not be sent."""
    if is_listed(name, arguments, permits):
        return
    shown = str((arguments or {}).get("command-line")) if name == _HMP else name
    if name != _HMP and name in _BY_NAME:
        shown += f" with {quoted(dict(arguments or {}))}"
    raise CommandNotAllowed(
        f"{shown:.200} was not sent: it is not among the commands that are known to be harmless",
        remedy="qmp/allowed.py lists them; please report what led here",
    )


def names(*wanted: str) -> list[str]:
    """The same names, for a process that cannot import this list; raises as `check` does."""
    for name in wanted:
        check(name)
    return list(wanted)
