"""Runs a command, and ends whatever it has started when it ends or is told to (SIGTERM).

    python reaping.py COMMAND...

Processes that become daemons are adopted here and reaped at once, as an init does; libvirt waits
for its QEMUs to be gone.  Exits with the command's status.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # include/uapi/linux/prctl.h


def main() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        command = subprocess.Popen(sys.argv[1:]).pid
        while True:
            pid, status = os.wait()
            if pid == command:
                return os.waitstatus_to_exitcode(status)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_children()


def end_children() -> None:
    """Until none is left: those that are killed leave theirs to us."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            for pid in map(int, file.read().split()):
                os.kill(pid, signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return


if __name__ == "__main__":
    sys.exit(main())
