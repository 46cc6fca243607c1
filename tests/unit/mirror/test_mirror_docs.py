"""The backend in docs/mirror.md does what the page says."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path

import pytest

from qmp_memlistener.mirror.backend import SlotBackend
from qmp_memlistener.mirror.mirror import Mirror
from qmp_memlistener.topology import FlatView, diff
from qmp_memlistener.updates.model import Strategy
from tests.unit.memslots.memslots_model import PAGE, ram, rom

PAGE_OF_DOCS = Path(__file__).parents[3] / "docs" / "mirror.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE_OF_DOCS.read_text(), re.DOTALL)
WHOLE = FlatView([ram(0, 8 * PAGE)])
HOLED = FlatView([ram(0, 2 * PAGE), rom(2 * PAGE, PAGE), ram(3 * PAGE, 5 * PAGE)])


def test_every_example_compiles_and_imports() -> None:
    assert len(BLOCKS) == 2
    for block in BLOCKS:
        exec(compile(block, str(PAGE_OF_DOCS), "exec"), {})


@pytest.mark.parametrize("strategy", [Strategy.DIRECT, Strategy.HOLE])
@pytest.mark.asyncio
async def test_the_backend_reads_what_the_map_shows(strategy: Strategy, tmp_path: Path) -> None:
    names: dict[str, type] = {}
    exec(BLOCKS[1], names)
    (tmp_path / "ram").write_bytes(bytes(n // PAGE for n in range(8 * PAGE)))
    main = os.open(tmp_path / "ram", os.O_RDONLY)
    memory = names["GuestMemory"]({None: main})
    methods = {name for name, _ in inspect.getmembers(SlotBackend, inspect.isfunction)}
    assert {name for name in methods if not name.startswith("_")} <= {*dir(memory)}
    mirror = Mirror(memory, strategy)
    before = FlatView(())
    for view, there in ((WHOLE, b"\x02"), (HOLED, b"\x00"), (WHOLE, b"\x02")):
        mirror.begin()
        await mirror.commit(diff(before, view))
        before = view
        assert memory.read(2 * PAGE, 1) == there
        assert memory.read(5 * PAGE, 2) == b"\x05\x05"
        assert await mirror.check(view) == ()
    os.close(main)
