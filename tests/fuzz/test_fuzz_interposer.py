"""Random sequences of what QEMU, the agent and KVM do to the interposer (see the harness)."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from tools.soak_interposer import Harness, build, soak

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the interposer is for x86-64"),
]


@pytest.mark.parametrize(
    ("sanitizer", "count"),
    [
        pytest.param("address", 1200),
        pytest.param("thread", 500, marks=pytest.mark.full),
    ],
)
def test_kvm_has_what_qemu_asked_for(sanitizer: str, count: int) -> None:
    soak(sanitizer, count, seed=1)


def test_what_is_asked_for_while_it_is_off_is_not_known_when_it_is_on_again(tmp_path: Path) -> None:
    """An operation that itself found `off` to be wanted was remembered; slots that came unseen
    meanwhile were taken for pieces of it, and deleted with it (found by 40,000 sequences)."""
    with Harness(build(tmp_path, "none")) as harness:
        assert harness.run([0, 172, 105, 336, 28, 1504, 0]) == ""
