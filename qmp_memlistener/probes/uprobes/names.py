"""What a thread of QEMU is called: `main`, `CPU 0`, a name of its own, `tid 1234`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from ...qmp.guest import GuestVcpu

__all__ = ["ThreadNames"]

_VCPU = re.compile(r"CPU (\d+)/\w+")  # with -name debug-threads=on


class ThreadNames:
    """Names by thread id as the host counts; QEMU in a container counts otherwise."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._vcpus: dict[int, str] = {}
        self._others: dict[int, str] = {}

    def learn_vcpus(self, vcpus: Iterable[GuestVcpu]) -> None:
        """These are the threads of the vCPUs."""
        threads: dict[int, list[int]] = {}
        for cpu in vcpus:
            threads.setdefault(cpu.thread_id, []).append(cpu.cpu_index)
        inner = {self._inner(tid): tid for tid in self._tids()}
        # TCG with one thread for all: it is named after all of them
        self._vcpus = {
            inner.get(tid, tid): "CPU " + ",".join(map(str, sorted(cpus)))
            for tid, cpus in threads.items()
        }

    def __getitem__(self, tid: int) -> str:
        if tid == self._pid:
            return "main"
        name = self._vcpus.get(tid) or self._others.get(tid)
        if name is None:
            name = self._others[tid] = self._own(tid)
        return name

    def forget(self, tid: int) -> None:
        """Its id is another thread's now, or its name may have changed."""
        self._others.pop(tid, None)

    def _own(self, tid: int) -> str:
        """The name it gave itself; one that it merely has from the process is none."""
        name, process = self._comm(tid), self._comm(self._pid)
        vcpu = _VCPU.fullmatch(name)
        if vcpu is not None:
            return f"CPU {vcpu[1]}"
        return name if name and name != process else f"tid {tid}"

    def _comm(self, tid: int) -> str:
        try:
            with open(f"/proc/{self._pid}/task/{tid}/comm", encoding="utf-8") as file:
                return file.read().strip()
        except (OSError, UnicodeDecodeError):
            return ""

    def _tids(self) -> list[int]:
        try:
            return [int(name) for name in os.listdir(f"/proc/{self._pid}/task")]
        except OSError:
            return []

    def _inner(self, tid: int) -> int:
        """The id by which QEMU itself knows its thread (NSpid, Linux 4.1)."""
        try:
            with open(f"/proc/{self._pid}/task/{tid}/status", encoding="utf-8") as file:
                for line in file:
                    if line.startswith("NSpid:"):
                        return int(line.split()[-1])
        except (OSError, ValueError):
            pass
        return tid
