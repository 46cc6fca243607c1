"""Fixtures of the tests on /dev/kvm: skip where it cannot be used, and leave nothing behind."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import pytest

from qmp_memlistener.errors import MissingPrerequisite
from qmp_memlistener.kvmlab import Kvm, KvmBackend
from tests.support.host import patience


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    """An open /dev/kvm; skips with the reason where there is none."""
    try:
        opened = Kvm()
    except MissingPrerequisite as exc:
        pytest.skip(f"{exc.message}: {exc.remedy}")
    with opened:
        yield opened


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Every test ends with as many threads and file descriptors as it began with."""
    gc.collect()
    threads, fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("asyncio-waitpid"):  # asyncio's, of a process that has ended
            thread.join(patience(2.0))
    assert threading.active_count() == threads, "a thread is left behind"
    assert len(os.listdir("/proc/self/fd")) <= fds, "a file descriptor is left behind"


@pytest.fixture
def lab(kvm: Kvm) -> Iterator[KvmBackend]:
    """A mirror's backend without running vCPUs."""
    with KvmBackend(kvm) as backend:
        yield backend


@pytest.fixture
def running(kvm: Kvm) -> Iterator[KvmBackend]:
    """A mirror's backend with two vCPUs that beat."""
    with KvmBackend(kvm, vcpus=2) as backend:
        yield backend
