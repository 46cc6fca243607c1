"""Which CPUs are for whoever changes slots, and which for vCPUs.

Where there are CPUs enough, whoever changes slots has one to himself.  Else the scheduler likes to
wake him where a vCPU runs, and an update of slots whose vCPUs do not run right then is a cheap one:
they are no readers that it must wait for (SRCU), because KVM_RUN lets go of slots before it lets
others run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

__all__ = ["Cpus"]


@dataclass(frozen=True, slots=True)
class Cpus:
    """Which CPUs are for whoever changes slots, and which for vCPUs; the same with one CPU only."""

    own: frozenset[int]
    vcpus: frozenset[int]

    @classmethod
    def split(cls) -> Self:
        """The first CPU that the caller may use is his own."""
        allowed = frozenset(os.sched_getaffinity(0))
        if len(allowed) == 1:
            return cls(allowed, allowed)
        own = frozenset({min(allowed)})
        return cls(own, allowed - own)

    @classmethod
    def for_vcpus(cls, vcpus: int) -> Self:
        """The same where each of so many vCPUs then has a CPU; else all for all."""
        found = cls.split()
        if vcpus <= len(found.vcpus):
            return found
        every = found.own | found.vcpus
        return cls(every, every)

    @property
    def apart(self) -> bool:
        return self.own != self.vcpus

    @staticmethod
    @contextmanager
    def on(cpus: frozenset[int]) -> Iterator[None]:
        """The calling thread, and those that it begins, run on these; afterwards as before."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)
