"""From the text of options to the typed values that QMP wants, as the running QEMU wants them.

Option text has no types, QMP has: `mq=on` must be `true`, `size=256M` a number.  QEMU knows, and
is asked: a device's properties with `device-list-properties`, before it is added; for everything
else it is tried, and QEMU's refusal names the one value and the type that it expects there.
Nothing else is asked (`query-qmp-schema` has it, and holds the BQL for tens of milliseconds).

Texts are read as QEMU reads its command line: qobject_input_type_*_keyval in
qapi/qobject-input-visitor.c, qapi_bool_parse in qapi/qapi-util.c, qemu_strtosz in util/cutils.c
(7.2 and 10.0), without the leading spaces and plus signs that they let pass.

`device_add` before 9.2 turned every value into text and back again, and dropped lists and objects
without a word; since be93fd5372 it takes typed values only.  Typed ones are right for both.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from ..errors import CommandFailed, DeadlineExceeded, InputError
from ..qmp import Monitor
from ..qmp.allowed import may_be_examined
from ..qmp.guest_devices import device_properties
from .model import Addition, Role, UpdateRefused, Value
from .options import shown

__all__ = ["add", "text_to", "type_arguments"]

_DEADLINE = 10.0
_MAX_ATTEMPTS = 100
_TYPED_DEVICE_ADD = (9, 2)

_PCI_ADDR_BEFORE_9_2 = "int32"
"""What QEMU calls the type of the PCI address, which as a number is a devfn and as a text, `2.1`,
slot and function in hexadecimal (set_pci_devfn of hw/core/qdev-properties-system.c; 7.2)."""

_ALIASES = {
    "ac97": "AC97",
    "ahci": "ich9-ahci",
    "e1000": "e1000-82540em",
    "es1370": "ES1370",
    "lsi": "lsi53c895a",
}
"""qdev_alias_table of system/qdev-monitor.c, of x86; and there `virtio-X` is `virtio-X-pci`."""

_NO_PROPERTIES = frozenset({"driver", "id", "bus"})
"""Of device_add itself (qdev_device_add_from_qdict in system/qdev-monitor.c)."""

_BACKEND_SIZES = frozenset({"size", "align", "offset"})
"""What is a size in every memory-backend-* that has it (MemoryBackendProperties and
MemoryBackendFileProperties, qapi/qom.json)."""

_REFUSED_TYPE = re.compile(r"Invalid parameter type for '(?P<path>[^']+)', expected: (?P<type>\w+)")
_REFUSED_UINT = re.compile(r"Parameter '(?P<path>[^']+)' expects (?P<type>uint64)")
"""qapi/qobject-input-visitor.c: its words for signed integers and all else, and for unsigned ones.
It says the second of numbers that are too large too."""
_STEP = re.compile(r"([^.\[\]]+)|\[([0-9]+)\]")

_BOOLEANS = {
    **dict.fromkeys(("on", "yes", "true", "y"), True),
    **dict.fromkeys(("off", "no", "false", "n"), False),
}
_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")
_INTEGER_TYPE = re.compile(r"(u?)int(8|16|32|64)")
_HEX = re.compile(r"0[xX][0-9a-fA-F]+")
_SIZE = re.compile(r"([0-9]+\.?|[0-9]*\.[0-9]+)([BKMGTPE]?)", re.IGNORECASE | re.ASCII)
_SUFFIXES = "BKMGTPE"
_FLOAT = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_RANGE = re.compile(r"([0-9]+)-([0-9]+)")
_MAX_RANGE = 65536
_MAX_DIGITS = 100


async def type_arguments(
    monitor: Monitor, addition: Addition, *, deadline: float = _DEADLINE
) -> Addition:
    """The addition with what can be known of its types without trying it.

    A device comes back typed in full, so that its `device_add` is right at once, and under its
    real name where it was given an alias; a driver that QEMU does not have is found out here.
    Of a memory backend the sizes become numbers, which says nothing of the rest: it is as typed
    as before, and `add` finds out the rest.  Other backends, and values that came as JSON, are
    returned as they are.

    One `device-list-properties` for a device (it makes an instance and drops it; under a
    millisecond), two when it is an alias; nothing is asked for others.

    Raises InputError (a text that is not what the option takes), CommandFailed (no such driver),
    UpdateRefused (a display device; a value that this QEMU would drop), and what
    `Monitor.execute` raises.
    """
    if addition.role is Role.DEVICE:
        driver, types = await _device_types(monitor, addition.type, deadline)
        if addition.typed:
            _check_kept(monitor, addition)
            return addition
        typed: dict[str, Value] = {
            key: text_to(types.get(key, "str"), value, key)
            if isinstance(value, str) and key not in _NO_PROPERTIES
            else value
            for key, value in addition.arguments.items()
        }
        return replace(addition, arguments={**typed, "driver": driver}, typed=True)
    if addition.typed or not addition.type.startswith("memory-backend-"):
        return addition
    sized = {
        key: text_to("size", value, key)
        if key in _BACKEND_SIZES and isinstance(value, str)
        else value
        for key, value in addition.arguments.items()
    }
    return replace(addition, arguments=sized)


async def add(monitor: Monitor, addition: Addition, deadline: float) -> Addition:
    """Add it, within `deadline` seconds; returns it with the values that QEMU took.

    Where QEMU refuses a text for its type, that value is converted and the command sent again: a
    refusal for a type has no effect, QEMU finds it before it makes anything.  Every attempt
    converts one value more, and there are at most 100.  What came typed is sent once.

    Raises as `type_arguments` does; CommandFailed with QEMU's last refusal.
    """
    end = asyncio.get_running_loop().time() + deadline
    given = addition.typed
    addition = await type_arguments(monitor, addition, deadline=deadline)
    command = addition.role.add_command
    for attempt in range(_MAX_ATTEMPTS):
        left = end - asyncio.get_running_loop().time()
        if left <= 0:
            raise DeadlineExceeded(
                f"{monitor.target} did not take {addition.role} {addition.id} within "
                f"{deadline:g} s; {attempt} attempts",
                remedy="QEMU's main loop is slow: allow more time",
            )
        try:
            await monitor.execute(command, addition.arguments, deadline=left)
        except CommandFailed as error:
            corrected = None if given else _corrected(addition, error.desc)
            if corrected is None:
                raise _explained(addition, error) from None
            addition = corrected
        else:
            return replace(addition, typed=True)
    raise UpdateRefused(
        f"{addition.role} {addition.id} has more than {_MAX_ATTEMPTS} values of unknown type; "
        "nothing was touched",
        remedy="give it as JSON, with typed values",
    )


# -- devices -------------------------------------------------------------------------------------


async def _device_types(
    monitor: Monitor, driver: str, deadline: float
) -> tuple[str, Mapping[str, str]]:
    """The driver's real name, and the types of its properties (`ObjectPropertyInfo.type`)."""
    if not may_be_examined(driver):
        raise UpdateRefused(
            f"{shown(driver)} cannot be plugged into a running guest, QEMU's display devices "
            "cannot; nothing was touched",
            remedy="start the guest with it",
        )
    alias = _ALIASES.get(driver, f"{driver}-pci" if driver.startswith("virtio-") else None)
    refusal: CommandFailed | None = None
    for name in (driver, alias) if alias else (driver,):
        try:
            types = await device_properties(monitor, name, deadline=deadline)
        except CommandFailed as error:
            refusal = refusal or error
            continue
        if types.get("addr") == _PCI_ADDR_BEFORE_9_2:
            types["addr"] = "str"
        return name, types
    assert refusal is not None
    raise CommandFailed(
        refusal.command, refusal.error_class, refusal.desc, remedy=_no_such_type(Role.DEVICE)
    )


def _check_kept(monitor: Monitor, device: Addition) -> None:
    """Refuse what qemu_opts_from_qdict_entry (util/qemu-option.c) drops without a word."""
    if monitor.version.release >= _TYPED_DEVICE_ADD:
        return
    for key, value in device.arguments.items():
        if value is None or isinstance(value, list | dict):
            raise UpdateRefused(
                f"QEMU {monitor.version} would drop {shown(key)} of {device.id}: its device_add "
                "takes text, numbers and booleans only; nothing was touched",
                remedy="use QEMU 9.2 or later",
            )


# -- what QEMU's refusals say --------------------------------------------------------------------


def _corrected(addition: Addition, refusal: str) -> Addition | None:
    """The addition with the one value converted that QEMU named; None when that is not it."""
    found = _REFUSED_TYPE.fullmatch(refusal) or _REFUSED_UINT.fullmatch(refusal)
    if found is None:
        return None
    path = [name or int(index) for name, index in _STEP.findall(found["path"])]
    key = ".".join(map(str, path))

    def convert(value: Value) -> Value:
        if not isinstance(value, str):
            return value
        match found["type"]:
            case "array":
                return _list_of(addition, value)
            case "object" if addition.role is Role.NETDEV and isinstance(path[-1], int):
                # `String` of qapi/common.json, of which hostfwd= and others are lists.
                return {"str": value}
            case "integer" | "uint64":
                return _integer_or_size(value, key, signed=found["type"] == "integer")
            case "boolean":
                return text_to("bool", value, key)
            case "number":
                return text_to("number", value, key)
        return value

    arguments = _replaced(dict(addition.arguments), path, convert)
    if not isinstance(arguments, dict) or arguments == addition.arguments:
        return None
    return replace(addition, arguments=arguments)


def _replaced(value: Value, path: Sequence[str | int], convert: Callable[[Value], Value]) -> Value:
    """The same tree with the value at `path` converted; the tree itself when there is none."""
    if not path:
        return convert(value)
    step, *rest = path
    if isinstance(value, dict) and isinstance(step, str) and step in value:
        return {**value, step: _replaced(value[step], rest, convert)}
    if isinstance(value, list) and isinstance(step, int) and step < len(value):
        return [_replaced(v, rest, convert) if i == step else v for i, v in enumerate(value)]
    return value


def _list_of(addition: Addition, text: str) -> Value:
    """A list with one member; of objects a range, `host-nodes=0-3` (qapi/opts-visitor.c)."""
    found = _RANGE.fullmatch(text) if addition.role is Role.OBJECT else None
    if found is not None and len(text) < _MAX_DIGITS:
        first, last = int(found[1]), int(found[2])
        if first <= last < first + _MAX_RANGE:
            return list(range(first, last + 1))
    return [text]


def _explained(addition: Addition, error: CommandFailed) -> CommandFailed:
    """The error, with a remedy where QEMU has no such type."""
    if f"{addition.role.type_key}' does not accept value" not in error.desc:
        return error
    remedy = _no_such_type(addition.role)
    return CommandFailed(error.command, error.error_class, error.desc, remedy=remedy)


def _no_such_type(role: Role) -> str:
    return (
        f"`qemu-system-x86_64 -{role} help` lists what this QEMU has; "
        "distributors put some into packages of their own"
    )


# -- texts ---------------------------------------------------------------------------------------


def text_to(type_name: str, text: str, key: str) -> Value:
    """The value of an option's text, for a type as QEMU names it.

    `bool`; `int8` … `uint64` and `usize` (hexadecimal and octal as in C); `size` (with a suffix
    B K M G T P E, binary, and a fraction); `int` and `uint`, which may be either, such as the
    `label-size` of an nvdimm (hw/mem/nvdimm.c); `number`, `double`.  Whatever else there is (`str`,
    links, enumerations such as OnOffAuto, and "") is text in QMP too.

    `key` is what messages call it.  Raises InputError.
    """
    value: int | float | None
    if type_name == "bool":
        value, expected = _BOOLEANS.get(text), "on or off"
    elif type_name == "size":
        value, expected = _size(text), "a size below 16E, such as 256M"
    elif type_name in ("int", "uint"):
        return _integer_or_size(text, key, signed=type_name == "int")
    elif integer := _INTEGER_TYPE.fullmatch("uint64" if type_name == "usize" else type_name):
        low, high = _limits(signed=not integer[1], bits=int(integer[2]))
        value, expected = _integer(text, low, high), f"a whole number from {low} to {high - 1}"
    elif type_name in ("number", "double"):
        value, expected = _number(text), "a number"
    elif type_name == "list" or type_name.endswith("List"):
        raise InputError(
            f"{key}={shown(text)}: {key} is a list, which option syntax cannot express",
            remedy="give the device as JSON",
        )
    else:
        return text
    if value is None:
        raise _not(key, text, expected)
    return value


def _limits(*, signed: bool, bits: int) -> tuple[int, int]:
    return (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)


def _integer(text: str, low: int, high: int) -> int | None:
    """qemu_strtoi64 or qemu_strtou64 with base 0; the latter takes -1 for the largest number."""
    if len(text) > _MAX_DIGITS or not _INTEGER.fullmatch(text):
        return None
    octal = re.fullmatch(r"(-?)0([0-7]+)", text)
    value = int(octal[1] + octal[2], 8) if octal else int(text, 0)
    if not low and -(1 << 64) < value < 0:
        value += 1 << 64
    return value if low <= value < high else None


def _size(text: str) -> int | None:
    """qemu_strtosz: decimal with fraction and suffix, or hexadecimal without; halves go up."""
    if len(text) > _MAX_DIGITS:
        return None
    if _HEX.fullmatch(text):
        value = int(text, 16)
    else:
        found = _SIZE.fullmatch(text)
        if found is None:
            return None
        number, suffix = found[1], found[2].upper() or "B"
        exact = Fraction(f"0{number}0" if number.endswith(".") else f"0{number}")
        if exact.denominator != 1 and suffix == "B":
            return None
        value = math.floor(exact * (1 << 10 * _SUFFIXES.index(suffix)) + Fraction(1, 2))
    return value if value < 1 << 64 else None


def _number(text: str) -> float | None:
    value = float(text) if _FLOAT.fullmatch(text) else math.nan
    return value if math.isfinite(value) else None


def _integer_or_size(text: str, key: str, *, signed: bool) -> int:
    """Where QEMU does not say whether it is a size: 010 is 8, but as a size it is 10."""
    readings = {_integer(text, *_limits(signed=signed, bits=64)), _size(text)}
    match sorted(v for v in readings if v is not None):
        case []:
            raise _not(key, text, "a whole number, or a size such as 256M")
        case [one]:
            return one
        case several:
            raise InputError(
                f"{key}={shown(text)} can be {' or '.join(map(str, several))}",
                remedy="write it without a leading 0",
            )


def _not(key: str, text: str, what: str) -> InputError:
    return InputError(f"{key}={shown(text)}: QEMU expects {what}", remedy="correct the value")
