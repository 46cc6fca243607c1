"""Random sequences of what QEMU, the agent and KVM do to the interposer (see the harness)."""

from __future__ import annotations

import platform
import shutil

import pytest

from tools.soak_interposer import soak

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
