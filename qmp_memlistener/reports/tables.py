"""Tables of plain text: a title, wrapped at 80 columns, and columns under their names."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Table"]


@dataclass(frozen=True, slots=True)
class Table:
    """A title, the names of columns, and rows of as many cells; the first `words` of each are
    words or labels, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1

    def lines(self) -> Iterator[str]:
        """The title, an empty line, and columns under their names."""
        yield from textwrap.wrap(self.title, 80, break_on_hyphens=False)
        yield ""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        for row in (self.columns, *self.rows):
            cells = [
                cell.ljust(width) if i < self.words else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            yield "  ".join(cells).rstrip()
