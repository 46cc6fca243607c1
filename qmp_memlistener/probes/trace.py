"""The `trace` probe: slot operations and topology events that QEMU itself logs.

The lines are read by the agent anyway, for the transitions; the timeline turns them into windows
(`timeline.windows.trace_windows`).  So there is nothing to start here, and nothing to pay.
"""

from __future__ import annotations

from .model import Context, ProbeInfo, Sink, StallKind, Verdict

__all__ = ["TraceProbe"]


class TraceProbe:
    """Declares what trace lines show; the agent's own source delivers them."""

    info = ProbeInfo(
        name="trace",
        measures=(StallKind.SLOT_UPDATE, StallKind.MISSING),
        needs="QEMU's `log` trace backend and a file that QEMU and we both reach",
        resolution_ns=200_000,
        cost="one line of log for each slot operation and map change; nothing when idle",
        share=0.0,
    )

    def __init__(self, context: Context) -> None:
        self._context = context

    async def check(self) -> Verdict:
        """Usable when the attachment is traced."""
        untraced = self._context.untraced
        if untraced is None:
            return Verdict(True)
        return Verdict.no(untraced.message, untraced.remedy)

    async def start(self, sink: Sink) -> None:
        """Nothing to do."""

    async def burst(self, on: bool) -> None:
        """Nothing to do: no line is ever missed."""

    async def flush(self) -> None:
        """The agent says how far it is."""

    async def stop(self) -> None:
        """Nothing to undo."""
