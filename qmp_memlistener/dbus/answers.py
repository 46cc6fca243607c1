"""Answers to calls on a guest's object, as messages.  Pure, but for the types of dbus-fast."""

from __future__ import annotations

from dbus_fast import Message, Variant

from ..errors import MemListenerError
from .guest import ServedGuest, Watching
from .interface import ERROR, GUEST

__all__ = ["LARGE", "error", "failed", "interfaces", "properties"]

LARGE = frozenset({"Map", "Holes", "Slots"})
"""Properties that are told when they are asked for, and not when they change."""


def interfaces(served: ServedGuest) -> dict[str, dict[str, Variant]]:
    """What the object manager tells of a guest: not its map, which may be large."""
    known = served.properties()
    small = {name: value for name, value in known.items() if name not in LARGE}
    return {GUEST: small}


def properties(msg: Message, served: ServedGuest) -> Message:
    if msg.member == "GetAll" and msg.signature == "s":
        values = served.properties() if msg.body[0] == GUEST else {}
        return Message.new_method_return(msg, "a{sv}", [values])
    if msg.member == "Set":
        return error(msg, "PropertyReadOnly", "all properties are read-only")
    if msg.signature != "ss":
        return error(msg, "InvalidArgs", f"{msg.member} takes other arguments")
    interface, name = msg.body
    try:
        value = served.value(name) if interface == GUEST else None
    except KeyError:
        return error(msg, "UnknownProperty", "there is no such property")
    if interface != GUEST:
        return error(msg, "UnknownInterface", "there is no such interface")
    if value is None:
        why = (
            "not known" if served.state is Watching.WATCHING else "known while the guest is watched"
        )
        return Message.new_error(msg, f"{ERROR}.NotKnown", f"{name} is {why}")
    return Message.new_method_return(msg, "v", [value])


def failed(msg: Message, exc: MemListenerError) -> Message:
    more = f" ({exc.remedy})" if exc.remedy else ""
    return Message.new_error(msg, f"{ERROR}.{type(exc).__name__}", f"{exc.message}{more}")


def error(msg: Message, name: str, why: str) -> Message:
    return Message.new_error(msg, f"org.freedesktop.DBus.Error.{name}", why)
