"""PURE: what a text is, by its beginning, so that a verb which cannot use it says so by name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import InputError
from .opening import open_input
from .traces import SLOT_EVENT

__all__ = ["HEADING", "Identity", "identify", "identify_file", "refusal"]

_HEAD = 1 << 20
HEADING = re.compile(r"(?:address-space|memory-region): |FlatView #\d+")
"""How a section of `info mtree` output begins."""

_HMP = re.compile(r"^\(qemu\) ?(info [a-z-]+[^\r\n]*)", re.MULTILINE)
_QMP_ERROR = re.compile(r'"error": ?\{[^}]{0,400}"desc": ?"([^"]{0,200})"')
_ERROR = re.compile(r"^(?:error|Error): ([^\r\n]{1,200})", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a file is, in words that follow "is", and what to do with it."""

    what: str
    remedy: str


_MAP = Identity(
    "`info mtree` output",
    "`show --from FILE` shows it; `plan --before FILE --after FILE` plans a transition",
)
_RECORDING = Identity(
    "a recording", "`report FILE` shows what it holds; `plan FILE` and `lab replay FILE` take it"
)
_TRACE = Identity(
    "a trace log of QEMU", "`plan FILE` and `lab replay FILE` take it, it does not hold a map"
)


def identify(head: bytes) -> Identity | None:
    """What a file that begins with `head` is; None when nobody knows."""
    if not head.strip():
        return Identity("empty", "give the file that has something in it")
    if b'"type":"header"' in head[:4096].partition(b"\n")[0]:
        return _RECORDING
    text = head.decode("utf-8", "replace")
    if HEADING.search(text) and "(prio " in text:
        return _MAP
    if SLOT_EVENT in head:
        return _TRACE
    if text.lstrip().startswith("{") and '"schema":1' in text.replace(" ", "")[:4096]:
        return Identity(
            "the JSON output of one of our own verbs",
            "give the `info mtree` output, the log or the recording that it was made from",
        )
    if error := _QMP_ERROR.search(text):
        return Identity(f"an error reply of QMP: {error[1]}", "ask again for `info mtree`")
    if error := _ERROR.search(text):
        return Identity(f"an error message: {error[1]}", "ask again for `info mtree`")
    if commands := _HMP.findall(text):
        said = ", ".join(dict.fromkeys(c.strip() for c in commands[:8]))
        return Identity(
            f"a monitor session with {said}", "give the output of `info mtree`, best with -o -D"
        )
    if '"QMP"' in text or '"return"' in text or "'return'" in text:
        return Identity(
            "a QMP session without a whole reply that is `info mtree` output",
            "give the whole reply to human-monitor-command with command-line `info mtree -o -D`",
        )
    return None


def identify_file(path: str) -> Identity | None:
    """The same of a file, with its name in the remedy.  Raises InputError as `open_input`."""
    with open_input(path) as file:
        identity = identify(file.read(_HEAD))
    if identity is None:
        return None
    return Identity(identity.what, identity.remedy.replace("FILE", path))


def refusal(path: str, *wanted: str, otherwise: InputError) -> InputError:
    """An error that says what `path` is, not `wanted`.

    `otherwise` when nobody knows, or when the text is what was wanted but of no use.
    """
    identity = identify_file(path)
    if identity is None or identity.what in ("empty", *wanted):
        return otherwise
    return InputError(
        f"{path} is {identity.what}, not {' or '.join(wanted)}", remedy=identity.remedy
    )
