"""The lab where KVM is AMD's: what must hold of strategies there as well, in a short form.

Times in that guest are emulation's; counts and return codes are those of real SVM.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from qmp_memlistener.errors import MissingPrerequisite
from tests.support.svm import SvmImage, SvmResult, run_python_in_svm

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

HELD = ("pause", "inhibit")
HOLES = ("hole", "hole-munmap")
RACES = {
    "data": ("race", "--strategy", "naive,pause,inhibit,hole,hole-munmap", "--updates", "20"),
    "code": ("race", "--strategy", "naive,inhibit,hole", "--updates", "20", "--guest", "code"),
    "pagetable": (
        *("race", "--strategy", "naive,pause,hole", "--updates", "20"),
        *("--guest", "pagetable"),
    ),
    "writer": (
        *("race", "--strategy", "naive,pause+sync,hole", "--updates", "12"),
        *("--guest", "writer"),
    ),
    "touch": ("race", "--strategy", "pause,hole", "--updates", "8", "--touch-hole"),
}

PROGRAM = """
import sys
from qmp_memlistener.kvmlab.__main__ import main
for arguments in {races!r}:
    code = main([*arguments, "--slot-size", "1048576", "--json"])
    sys.stdout.flush()
    if code:
        sys.exit(code)
"""

Strategies = dict[str, dict[str, Any]]


@pytest.fixture(scope="module", params=["6.1", "6.12"])
def nested(request: pytest.FixtureRequest) -> dict[str, Strategies]:
    """All races in one boot of the guest, by name."""
    label: str = request.param
    try:
        image = SvmImage.find(label)
    except MissingPrerequisite as exc:
        pytest.skip(f"{exc.message}: {exc.remedy}")
    program = PROGRAM.format(races=list(RACES.values()))
    ran: SvmResult = asyncio.run(run_python_in_svm(image, ("-c", program), timeout=800))
    assert ran.exit_code == 0, ran.stderr
    documents = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [d["host"]["kvm"] for d in documents] == ["svm"] * len(RACES)
    assert all(d["host"]["kernel"].startswith(f"{label}.") for d in documents)
    return {
        name: {s["name"]: s for s in document["strategies"] if s["skipped"] is None}
        for name, document in zip(RACES, documents, strict=True)
    }


def test_ram_that_stays_is_missed_by_naive_alone(nested: dict[str, Strategies]) -> None:
    data = nested["data"]
    assert data["naive"]["updates_hit"] > 0
    for name in ("control", *HELD, *HOLES):
        assert (data[name]["updates_hit"], data[name]["internal_errors"]) == (0, 0), name
    for name in HOLES:
        assert (data[name]["slot_ids_kept"], data[name]["bitmap_kept"]) == (True, True), name
    assert not data["naive"]["bitmap_kept"]


def test_code_and_page_tables_in_the_slot(nested: dict[str, Strategies]) -> None:
    """Code that is gone kills; missing page tables do so only when they stay missing until KVM's
    emulator has looked for them as well, which here is seldom."""
    for guest in ("code", "pagetable"):
        for name, found in nested[guest].items():
            if name != "naive":
                assert (found["updates_hit"], found["internal_errors"]) == (0, 0), (guest, name)
    assert nested["code"]["naive"]["internal_errors"] > 0


def test_dirty_pages(nested: dict[str, Strategies]) -> None:
    writer = nested["writer"]
    assert writer["naive"]["dirty_pages_lost"] > 0
    for name in ("pause+sync", "hole"):
        assert writer[name]["dirty_pages_changed"] > 0
        assert writer[name]["dirty_pages_lost"] == 0, name


def test_an_access_to_a_host_mapping_hole_is_understood_as_one(
    nested: dict[str, Strategies],
) -> None:
    """KVM_RUN fails with -EFAULT and no exit reason: no harm, and the vCPU goes on when filled."""
    touch = nested["touch"]
    for name in ("pause", "hole"):
        assert touch[name]["hole_exits"] >= 4, name
        assert touch[name]["updates_hit"] == 0, name
        assert touch[name]["updates"] == 8, name
