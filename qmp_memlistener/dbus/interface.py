"""The D-Bus names of `dbus-serve`: introspection, errors, and the policy of a system bus.  Pure.

What a member means is told in docs/dbus.md.  Names carry the version 1: members are only added to
it, none is removed or gets other types.
"""

from __future__ import annotations

import re
from xml.sax.saxutils import quoteattr

from ..errors import InputError
from ..text import quoted

__all__ = [
    "BUS_NAME",
    "ERROR",
    "GUEST",
    "INTROSPECTABLE",
    "OBJECT_MANAGER",
    "PEER",
    "PROPERTIES",
    "ROOT",
    "guest_xml",
    "policy_text",
    "root_xml",
    "tree_xml",
]

BUS_NAME = "org.qmp_memlistener1"
ROOT = "/org/qmp_memlistener1"
GUEST = f"{BUS_NAME}.Guest"
ERROR = f"{BUS_NAME}.Error"
PROPERTIES = "org.freedesktop.DBus.Properties"
INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
PEER = "org.freedesktop.DBus.Peer"

_DOCTYPE = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)
_CHANGES = "org.freedesktop.DBus.Property.EmitsChangedSignal"

# name: type, and how a change is announced
_PROPERTIES = {
    "Name": ("s", "const"),
    "Pid": ("u", "const"),
    "Version": ("s", "const"),
    "Machine": ("s", "const"),
    "Monitors": ("as", "const"),
    "State": ("s", "true"),
    "Reason": ("s", "true"),
    "RunState": ("s", "true"),
    "Source": ("s", "true"),
    "Transitions": ("t", "true"),
    "Map": ("aa{sv}", "invalidates"),
    "Holes": ("aa{sv}", "invalidates"),
    "Slots": ("aa{sv}", "invalidates"),
}
_METHODS = {
    "Watch": (),
    "Unwatch": (),
    "Snapshot": (("snapshot", "a{sv}", "out"),),
}
_SIGNALS = {
    "TransitionSeen": (("seq", "t"), ("t_ns", "t"), ("details", "a{sv}")),
    "HolePunched": (
        *(("block", "s"), ("start", "t"), ("size", "t")),
        *(("covered_by", "s"), ("seq", "t")),
    ),
    "HoleFilled": (
        *(("block", "s"), ("start", "t"), ("size", "t")),
        *(("covered_by", "s"), ("seq", "t")),
    ),
    "StallSeen": (
        *(("kind", "s"), ("start_ns", "t"), ("at_least_ns", "t")),
        *(("at_most_ns", "t"), ("details", "a{sv}")),
    ),
    "Missed": (("what", "s"), ("count", "t")),
}

PROPERTY_TYPES = {name: signature for name, (signature, _) in _PROPERTIES.items()}
SIGNAL_TYPES = {
    name: "".join(signature for _, signature in arguments) for name, arguments in _SIGNALS.items()
}


def _argument(name: str, signature: str, direction: str = "") -> str:
    where = f' direction="{direction}"' if direction else ""
    return f'   <arg name="{name}" type="{signature}"{where}/>'


def _standard() -> list[str]:
    return [
        f' <interface name="{INTROSPECTABLE}">',
        '  <method name="Introspect">',
        _argument("xml_data", "s", "out"),
        "  </method>",
        " </interface>",
        f' <interface name="{PEER}">',
        '  <method name="Ping"/>',
        " </interface>",
    ]


def guest_xml() -> str:
    """Introspection data of a guest's object."""
    lines = ["<node>", *_standard(), f' <interface name="{PROPERTIES}">']
    for method, arguments in {
        "Get": (("interface", "s", "in"), ("name", "s", "in"), ("value", "v", "out")),
        "Set": (("interface", "s", "in"), ("name", "s", "in"), ("value", "v", "in")),
        "GetAll": (("interface", "s", "in"), ("values", "a{sv}", "out")),
    }.items():
        lines += [f'  <method name="{method}">', *(_argument(*a) for a in arguments), "  </method>"]
    lines.append('  <signal name="PropertiesChanged">')
    lines += [
        _argument("interface", "s"),
        _argument("changed", "a{sv}"),
        _argument("invalidated", "as"),
        "  </signal>",
        " </interface>",
        f' <interface name="{GUEST}">',
    ]
    for name, (signature, change) in _PROPERTIES.items():
        lines.append(f'  <property name="{name}" type="{signature}" access="read">')
        lines += [f'   <annotation name="{_CHANGES}" value="{change}"/>', "  </property>"]
    for name, returned in _METHODS.items():
        lines += [f'  <method name="{name}">', *(_argument(*a) for a in returned), "  </method>"]
    for name, parts in _SIGNALS.items():
        lines += [f'  <signal name="{name}">', *(_argument(*part) for part in parts), "  </signal>"]
    return _DOCTYPE + "\n".join([*lines, " </interface>", "</node>"]) + "\n"


def root_xml() -> str:
    """Introspection data of the object that manages the others."""
    lines = ["<node>", *_standard(), f' <interface name="{OBJECT_MANAGER}">']
    lines += [
        '  <method name="GetManagedObjects">',
        _argument("objects", "a{oa{sa{sv}}}", "out"),
        "  </method>",
        '  <signal name="InterfacesAdded">',
        _argument("object", "o"),
        _argument("interfaces", "a{sa{sv}}"),
        "  </signal>",
        '  <signal name="InterfacesRemoved">',
        _argument("object", "o"),
        _argument("interfaces", "as"),
        "  </signal>",
        " </interface>",
        ' <node name="guest"/>',
        "</node>",
    ]
    return _DOCTYPE + "\n".join(lines) + "\n"


def tree_xml(children: list[str]) -> str:
    """Introspection data of a path that has objects below it and is none."""
    lines = ["<node>", *_standard(), *(f" <node name={quoteattr(c)}/>" for c in children)]
    return _DOCTYPE + "\n".join([*lines, "</node>"]) + "\n"


_GROUP = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")


def policy_text(group: str | None) -> str:
    """The policy of a system bus: root may serve and ask; beside it only members of `group`.

    Raises InputError when that cannot be a group's name.
    """
    if group is not None and not _GROUP.fullmatch(group):
        raise InputError(f"not a group's name: {quoted(group)}", remedy="such as kvm-watch")
    allowed = ['  <policy user="root">', f'    <allow own="{BUS_NAME}"/>', *_use(), "  </policy>"]
    if group is not None:
        allowed += [f'  <policy group="{group}">', *_use(), "  </policy>"]
    return "\n".join(
        [
            '<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"',
            ' "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">',
            "<busconfig>",
            '  <policy context="default">',
            f'    <deny own="{BUS_NAME}"/>',
            f'    <deny send_destination="{BUS_NAME}"/>',
            f'    <deny receive_sender="{BUS_NAME}"/>',
            "  </policy>",
            *allowed,
            "</busconfig>\n",
        ]
    )


def _use() -> list[str]:
    return [
        f'    <allow send_destination="{BUS_NAME}"/>',
        f'    <allow receive_sender="{BUS_NAME}"/>',
    ]
