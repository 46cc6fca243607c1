"""The first record of an attachment, and the rules that fit the QEMU at the other end."""

from __future__ import annotations

import os
import time

from ..host.files import find_text, open_foreign
from ..memslots import Rules
from ..qmp import GuestFacts
from ..records import Header
from .tracing import STAMP_BOUND_NS

__all__ = ["header_of", "rules_of"]

_INHIBIT_SYMBOL = b"\0accel_ioctl_inhibit_begin\0"
"""From QEMU's line to our time stamp: 75 us (p50) to 150 us (p90) on tmpfs with inotify."""


def rules_of(version: str, pid: int | None) -> Rules:
    """The order of slot operations: by what the binary has, else by its version.

    Distributors backport the atomic update (QEMU 8.0, commit f39b7d2b96), so the symbol counts.
    """
    page_size = os.sysconf("SC_PAGE_SIZE")
    rules = Rules.parse(version, page_size)
    if pid is None or rules.queued:
        return rules
    try:
        handle = open_foreign(f"/proc/{pid}/exe")
    except OSError:
        return rules  # another user's process: the version is all there is
    try:
        backported = find_text(handle, _INHIBIT_SYMBOL) is not None
    except OSError:
        return rules
    finally:
        os.close(handle)
    return Rules.parse("8.0", page_size) if backported else rules


def header_of(
    target: str, facts: GuestFacts, pid: int | None, *, traced: bool, why_not: str | None
) -> Header:
    """The header; `why_not` says why the guest is not traced."""
    from .. import __version__

    if traced:
        source = "trace events: every slot operation and topology change"
    else:
        source = f"snapshots only, short-lived holes may be missed ({why_not})"
    return Header(
        tool_version=__version__,
        monotonic_ns=time.monotonic_ns(),
        realtime_ns=time.time_ns(),
        host_kernel=os.uname().release,
        target=target,
        qemu_version=facts.version,
        qemu_package=facts.package or None,
        machine=facts.machine,
        accel=facts.accel,
        guest_name=facts.name,
        pid=pid,
        source=source,
        stamp_bound_ns=STAMP_BOUND_NS if traced else None,
    )
