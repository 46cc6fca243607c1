"""The bytes of a file as plain UTF-8: unpacked, recoded, without a byte order mark; what it is.

gzip, bzip2 and xz are read as they are; UTF-16 is what PowerShell's `>` makes of any text.
Binary formats are refused by their name here, so no reader sees them.  `identify` says by its
beginning what a text is, so that a verb which cannot use it says so by name.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, cast

from ..errors import InputError
from .traces import SLOT_EVENT

__all__ = ["HEADING", "Identity", "identify", "identify_file", "open_input", "refusal"]


_SNIFF = 4096
_PIECE = 1 << 18

# First bytes to what it is, and what to do with it.
_BINARY: tuple[tuple[bytes, str, str], ...] = (
    (
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xa4\x29\xb4\x0a\xcb\x77\xb2\xf2",
        "a binary trace of QEMU's `simple` backend",
        "make text of it with QEMU's scripts/simpletrace.py: simpletrace.py TRACE-EVENTS-ALL FILE",
    ),
    (
        b"\x17\x08Dtracing",
        "a binary trace of trace-cmd",
        "make text of it: trace-cmd report -i FILE",
    ),
    (b"PERFILE2", "a binary profile of perf", "make text of it: perf script -i FILE"),
    (b"\xc1\x1f\xfc\xc1", "a binary CTF trace", "make text of it: babeltrace2 DIRECTORY"),
    (b"\x75\xd1\x1d\x57", "CTF metadata", "give the text that babeltrace2 prints for the trace"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd", "unpack it first: zstd -d FILE"),
    (b"\x04\x22\x4d\x18", "packed with lz4", "unpack it first: lz4 -d FILE"),
    (b"PK\x03\x04", "a zip archive", "unpack it first and give the file in it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first and give the file in it"),
    (b"LPKSHHRH", "a binary journal", "print its text: journalctl --file FILE -o cat"),
    (b"\x7fELF", "an ELF file or a core dump", "give text that QEMU printed, or a recording"),
    (b"QFI\xfb", "a qcow2 image", "give text that QEMU printed, or a recording"),
    (b"%PDF-", "a PDF", "give text that QEMU printed, or a recording"),
    (b"\x89PNG", "an image", "give text that QEMU printed, or a recording"),
    (b"\xff\xd8\xff", "an image", "give text that QEMU printed, or a recording"),
)
_TAR = b"ustar"
_PACKED: tuple[bytes, ...] = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@contextmanager
def open_input(path: str, *, skip: int = 0) -> Iterator[BinaryIO]:
    """A file (`-` is stdin) as plain UTF-8, from byte `skip` of that on.

    Raises InputError when it cannot be read, then or later inside the `with`, and when it is a
    binary format that has a name.
    """
    # a small Python has none of them, and whoever opens no file needs none
    import gzip
    import lzma
    import zlib

    try:
        with _open(path) as raw:
            yield _plain(path, raw, skip)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as exc:
        raise InputError(
            f"{path} is damaged: it cannot be unpacked ({exc})", remedy="give the whole file"
        ) from exc
    except OSError as exc:
        raise InputError(
            f"{path or 'the empty file name'} cannot be read: {exc.strerror or exc}",
            remedy="name an existing file that you may read",
        ) from exc


def _open(path: str) -> BinaryIO:
    """Opened without waiting: a FIFO without a writer is empty."""
    if path == "-":
        return cast("BinaryIO", io.BufferedReader(_Unclosed(sys.stdin.buffer), _PIECE))
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        if kind == stat.S_IFDIR:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if kind not in (stat.S_IFREG, stat.S_IFIFO):
            raise InputError(
                f"{path} is a device or a socket, not a file", remedy="name a file; - is stdin"
            )
        os.set_blocking(fd, True)
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def _plain(path: str, raw: BinaryIO, skip: int) -> BinaryIO:
    buffered = cast("io.BufferedReader", raw)
    head = _peek(buffered)
    if head.startswith(_PACKED):
        buffered = io.BufferedReader(cast("io.RawIOBase", _unpacked(head, buffered)), _PIECE)
        head = _peek(buffered)
    _refuse_binary(path, head)
    encoding, mark = _encoding(head)
    if encoding.startswith("utf-16"):
        buffered.read(mark)
        buffered = io.BufferedReader(_Recoded(buffered, encoding), _PIECE)
    elif mark:
        buffered.read(mark)
    if not skip:
        pass
    elif buffered.seekable():
        buffered.seek(skip + mark)
    else:
        while skip and (piece := buffered.read(min(skip, _PIECE))):
            skip -= len(piece)
    return cast("BinaryIO", buffered)


def _unpacked(head: bytes, file: io.BufferedReader) -> object:
    import bz2
    import gzip
    import lzma

    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    return bz2.BZ2File(file) if head.startswith(b"BZh") else lzma.LZMAFile(file)


def _peek(file: io.BufferedReader) -> bytes:
    """What it begins with; a pipe may give less than there will be."""
    return file.peek(_SNIFF)[:_SNIFF]


def _refuse_binary(path: str, head: bytes) -> None:
    for magic, what, remedy in _BINARY:
        if head.startswith(magic):
            raise InputError(f"{path} is {what}", remedy=remedy.replace("FILE", path))
    if head[257:262] == _TAR:
        raise InputError(
            f"{path} is a tar archive", remedy="unpack it first and give the file in it"
        )


def _encoding(head: bytes) -> tuple[str, int]:
    """The encoding of a text, and how long its byte order mark is."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding, len(mark)
    # no mark: of ASCII in UTF-16 every other byte is 0
    pairs = len(head) // 2
    if pairs >= 8:
        if head[1 : 2 * pairs : 2].count(0) * 10 > pairs * 9 and 0 not in head[0 : 2 * pairs : 2]:
            return "utf-16-le", 0
        if head[0 : 2 * pairs : 2].count(0) * 10 > pairs * 9 and 0 not in head[1 : 2 * pairs : 2]:
            return "utf-16-be", 0
    return "utf-8", 0


class _Recoded(io.RawIOBase):
    """A UTF-16 stream as UTF-8."""

    def __init__(self, file: io.BufferedReader, encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)("replace")
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]  # typeshed has no Buffer in 3.11
        while not self._left:
            data = self._file.read(_PIECE)
            text = self._decoder.decode(data, final=not data)
            if not data and not text:
                return 0
            self._left = text.encode("utf-8", "replace")
        piece, self._left = self._left[: len(view)], self._left[len(view) :]
        view[: len(piece)] = piece
        return len(piece)


class _Unclosed(io.RawIOBase):
    """Standard input, which stays open when we are done with it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]  # typeshed has no Buffer in 3.11
        data = self._file.read(len(view))
        view[: len(data)] = data
        return len(data)


# -- what a text is ----------------------------------------------------------------------------


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
    """What a file that begins with `head` is; None when that is unknown."""
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

    `otherwise` when that is unknown, or when the text is what was wanted but of no use.
    """
    identity = identify_file(path)
    if identity is None or identity.what in ("empty", *wanted):
        return otherwise
    return InputError(
        f"{path} is {identity.what}, not {' or '.join(wanted)}", remedy=identity.remedy
    )
