"""What is added to the SVM guest's image when it is booted: our package and the command to run.

From files here to the bytes of a second initramfs archive; nothing is written.  The image itself is
built without them (vm-images/svm), so that a change of our code needs no new image.
"""

from __future__ import annotations

import importlib.util
import marshal
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import qmp_memlistener
from tools.cpio import Entry, cpio, directories

__all__ = ["added_files"]

_PACKAGE = Path(qmp_memlistener.__file__).resolve().parent
_SITE = "site"
"""Where the guest's Python looks for packages; init says so."""


def added_files(arguments: Sequence[str], magic: bytes) -> bytes:
    """An archive that adds our package and a command: `python3` with these arguments.

    `magic` is what the compiled files of the guest's Python begin with.  When ours begin so too,
    the package is compiled here, which halves the time of its imports.  Blocks for some 0.3 s.
    """
    command = f"exec python3 {shlex.join(arguments)}\n".encode()
    files = [Entry("command", 0o100644, command), *_package(magic)]
    return cpio([*directories(f.name for f in files), *files])


def _package(magic: bytes) -> Iterator[Entry]:
    for name, path in _files():
        data = path.read_bytes()
        yield Entry(str(name), 0o100644, data)
        if path.suffix == ".py" and magic == importlib.util.MAGIC_NUMBER:
            compiled = _compiled(name, data)
            if compiled is not None:
                yield compiled


def _files() -> Iterator[tuple[PurePosixPath, Path]]:
    """The files of the package, and where they go; the images that it has when it is installed."""
    top = PurePosixPath(_SITE) / _PACKAGE.name
    for path in sorted(_PACKAGE.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield top / path.relative_to(_PACKAGE), path
    for path in sorted(_PACKAGE.parent.glob("vm-images/*/*.img")):
        yield top / "_images" / path.name, path


def _compiled(name: PurePosixPath, source: bytes) -> Entry | None:
    """A compiled file that Python takes as it is (PEP 552, unchecked), None for broken source.

    Broken source is for the guest to complain about, should it be needed at all.
    """
    try:
        code = compile(source, f"/{name}", "exec", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError):
        return None
    flags = (1).to_bytes(4, "little")
    head = importlib.util.MAGIC_NUMBER + flags + importlib.util.source_hash(source)
    # As cache_from_source has it, for a Python run without -O.
    cached = importlib.util.cache_from_source(name.name, optimization="")
    return Entry(str(name.parent / cached), 0o100644, head + marshal.dumps(code))
