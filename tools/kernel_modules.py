"""Kernel modules of a Debian package: by the kernel's own names, each after those it needs.

Reads files below the package's directory of modules and nothing else.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from tools.releases import Broken

__all__ = ["Modules", "built_in", "in_order"]


class Modules(dict[str, bytes]):
    """Code of the modules below a directory, by name, read and unpacked when asked for.

    Raises Broken for one that is not there.
    """

    def __init__(self, top: Path) -> None:
        super().__init__()
        self._files = {module_name(p): p for p in top.rglob("*.ko*")}

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __missing__(self, name: str) -> bytes:
        if name not in self._files:
            raise Broken(f"the package has no module {name}")
        data = self._files[name].read_bytes()
        code = self[name] = lzma.decompress(data) if self._files[name].suffix == ".xz" else data
        return code


def module_name(path: Path) -> str:
    """As the kernel calls it: `virtio-rng.ko.xz` is virtio_rng."""
    return path.name.split(".ko")[0].replace("-", "_")


def built_in(top: Path) -> set[str]:
    """Names of the modules that are part of the kernel itself."""
    return {module_name(Path(p)) for p in (top / "modules.builtin").read_text().split()}


def needs_of(code: bytes) -> list[str]:
    """Modules that a module needs: `depends=a,b` in its .modinfo, where every entry ends in NUL."""
    found = re.search(rb"\0depends=([^\0]*)\0", code)
    if found is None:
        raise Broken("a module does not tell what it depends on")
    return [name for name in found[1].decode().replace("-", "_").split(",") if name]


def in_order(wanted: Iterable[str], available: Mapping[str, bytes]) -> list[str]:
    """`wanted` and all that they need, each after what it needs.  Raises Broken."""
    order: dict[str, None] = {}

    def add(name: str) -> None:
        if name not in order:
            for need in needs_of(available[name]):
                add(need)
            order[name] = None

    for name in wanted:
        add(name)
    return list(order)
