"""Carrying out an update: check, prepare, change the map under a strategy, wait, report what came.

    outcome = await perform(agent, Plug(device), Strategy.PAUSE, UpdateOptions())

Everything that was made for an update that fails is taken back, whatever the reason, a
cancellation too.  Where the answer to the change itself never came, QEMU is asked: a change that it
has made stays, with its backends, since to force a device out would be worse.

What to send is in `plans`, the pause in `pause`, the promise that no guest stays paused in `guard`,
and what the guest does about it in `guest_response`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Protocol

import msgspec

from ..errors import (
    CommandFailed,
    GuestMigrating,
    InputError,
    MemListenerError,
    OperationFailed,
    TargetError,
)
from ..probes import StallKind
from ..qmp import Companions, Monitor, Reply
from ..qmp.guest import count_ram_blocks, read_status
from ..qmp.guest_devices import Window, read_windows
from ..records import Header, ProbeState, Record, SlotOp, StallRecord, TransitionRecord
from .guest_response import GuestAnswer, GuestResponse
from .guest_view import Seen, look_at, read_facts, read_guest
from .journal import Journal, count_memory_backends, noted, remove, wait_freed
from .managed import managed
from .model import (
    Awaited,
    GuestStates,
    Intent,
    Outcome,
    Plug,
    Result,
    Role,
    Strategy,
    UpdatePlan,
    UpdateStep,
)
from .pause.guard import ResumeGuard, refuse_if_migrating
from .pause.guard_start import guard_targets
from .pause.paused import run_paused
from .phases import Marks, phases_of
from .plans import plan_update
from .property_types import add, type_arguments
from .settings import UpdateOptions, Waiting

__all__ = ["Host", "Measured", "perform"]

UPDATE_DEADLINE = 60.0
"""A backend that is preallocated is cleared while its command runs."""
_UNKNOWN = "unknown"


class Measured(Protocol):
    """A guest whose changes and stalls are recorded; each is as in `Agent`."""

    def subscribe(self, callback: Callable[[Record], None]) -> Callable[[], None]: ...
    def burst(self) -> AbstractAsyncContextManager[None]: ...
    async def settle(self) -> None: ...
    def probes(self) -> list[ProbeState]: ...
    def measured(self, start_ns: int, end_ns: int) -> frozenset[StallKind]: ...
    async def probes_ready(self, timeout_s: float) -> tuple[str, ...]: ...


class Host(Measured, Protocol):
    """An attached guest: what `perform` needs of the agent."""

    @property
    def monitor(self) -> Monitor: ...
    @property
    def companions(self) -> Companions: ...
    @property
    def header(self) -> Header: ...
    def operating(self) -> AbstractAsyncContextManager[Monitor]: ...
    async def probes_started(self) -> None: ...
    def driver_taken(self, device: str) -> tuple[int | None, int] | None: ...


async def perform(
    host: Host, intent: Intent, strategy: Strategy, options: UpdateOptions | None = None
) -> Outcome:
    """Carry out `intent` and return what came of it; a refusal is an Outcome, too.

    Raises TargetError when the guest is lost, InputError for what no QEMU could do.
    """
    options = options or UpdateOptions()
    waiting = options.waiting or Waiting()
    operation = _Operation(host, strategy, options, waiting)
    waiting.start()
    try:
        waiting.outcome = await operation.run(intent)
    except asyncio.CancelledError:
        waiting.outcome = operation.cut_short()
        raise
    finally:
        waiting.answered()
    return waiting.outcome


class _Ended(OperationFailed):
    """A signal has ended the update before its devices were changed."""


class _Operation:
    """One update on its way."""

    def __init__(
        self, host: Host, strategy: Strategy, options: UpdateOptions, waiting: Waiting
    ) -> None:
        self._host = host
        self._strategy = strategy
        self._options = options
        self._waiting = waiting
        self._marks = Marks(time.monotonic_ns())
        self._records: list[Record] = []
        self._notes: list[str] = []
        self._before = _UNKNOWN
        self._journal = Journal(self._notes, waiting)
        self._devices: tuple[str, ...] = ()
        self._windows: dict[str, tuple[Window, Window]] = {}
        self._migrated: GuestMigrating | None = None

    async def run(self, intent: Intent) -> Outcome:
        async with AsyncExitStack() as stack:
            stack.callback(self._host.subscribe(self._records.append))
            try:
                self._before = (await read_status(self._host.monitor)).status
                plan = await self._plan(intent)
                guard = await self._start_guard(stack, plan)
                self._go_on("nothing was touched")
            except OperationFailed as exc:
                refused = await self._outcome(Result.REFUSED, exc)
                # what happens to the guest meanwhile, a migration's say, is none of our doing
                return msgspec.structs.replace(refused, stalls=[], slot_ops=[], transitions=0)
            await self._host.probes_started()
            ops = await stack.enter_async_context(self._host.operating())
            await stack.enter_async_context(self._host.burst())
            return await self._carry_out(plan, ops, guard)

    # -- before anything is touched ----------------------------------------------------------

    async def _plan(self, intent: Intent) -> UpdatePlan:
        """Ask the guest what there is, find out types, make the plan."""
        monitor = self._host.monitor
        view = await read_guest(monitor)
        if isinstance(intent, Plug):
            backends = [await type_arguments(monitor, b) for b in intent.backends]
            device = await type_arguments(monitor, intent.device)
            intent = replace(intent, backends=tuple(backends), device=device)
        if self._strategy is Strategy.HOLE:
            self._windows = await read_windows(monitor)
        facts = await read_facts(monitor, intent)
        plan = plan_update(intent, self._strategy, view, facts)
        taken = facts.ids(Role.DEVICE)
        plan = managed(plan, self._strategy, monitor, self._host.companions, taken)
        self._devices = plan.devices
        return plan

    def _go_on(self, so_far: str) -> None:
        if self._waiting.enough.is_set():
            raise _Ended(f"interrupted: {so_far}")

    async def _start_guard(self, stack: AsyncExitStack, plan: UpdatePlan) -> ResumeGuard | None:
        if self._strategy is not Strategy.PAUSE or not plan.update:
            return None
        monitor, options = self._host.monitor, self._options
        manager = bool(monitor.abilities.manager)
        targets = await guard_targets(
            self._host.companions, monitor.target, options.guard_monitor, managed=manager
        )
        guard = await ResumeGuard.start(targets, monitor.identity, max_pause_s=options.max_pause_s)
        return await stack.enter_async_context(guard)

    # -- doing it ----------------------------------------------------------------------------

    async def _carry_out(
        self, plan: UpdatePlan, ops: Monitor, guard: ResumeGuard | None
    ) -> Outcome:
        response = GuestResponse(
            plan, self._marks, self._host.monitor, self._host.driver_taken, self._waiting
        )
        async with AsyncExitStack() as stack:
            stack.callback(self._host.subscribe(response.record))
            stack.callback(self._host.monitor.subscribe(response.event))
            if plan.awaited is Awaited.GONE:
                response.look(await self._look())
            try:
                async with noted(ops, plan), self._undone_on_failure(ops):
                    await self._prepare(plan, ops)
                    await self._update(plan.update, ops, guard)
            except _Ended:
                left = self._journal.left
                what = f"left over: {', '.join(left)}" if left else self._journal.removed
                ended = _Ended(f"interrupted before the device was touched; {what}")
                return await self._outcome(Result.PARTIAL if left else Result.FAILED, ended)
            except OperationFailed as exc:
                stands = self._journal.stands
                return await self._outcome(Result.PARTIAL if stands else Result.FAILED, exc)
            self._notes += plan.notes
            if plan.awaited is not Awaited.GONE:
                response.look(await self._look())
            answer = await self._wait(response)
            if (gone := self._migrated) is not None:
                answer = replace(answer, done=False, reason=gone.message, remedy=gone.remedy)
        self._notes += answer.notes
        if answer.done:
            answer = await self._finish(plan, ops, answer)
        if self._strategy is Strategy.HOLE and plan.awaited is Awaited.REACTION:
            self._notes.append(await self._moved_windows())
        if answer.done:
            return await self._outcome(Result.DONE, answer)
        return await self._outcome(Result.REFUSED if answer.refused else Result.PARTIAL, answer)

    async def _moved_windows(self) -> str:
        """Whether the guest moved a bridge window, which takes away what is behind it meanwhile."""
        now = await read_windows(self._host.monitor)
        moved = [name for name, windows in now.items() if self._windows.get(name) != windows]
        return f"bridge windows moved: {', '.join(moved)}" if moved else "no bridge window moved"

    async def _wait(self, response: GuestResponse) -> GuestAnswer:
        """A guest that does not run does nothing."""
        try:
            if (await read_status(self._host.monitor)).running:
                answer = await response.wait(self._options.wait_s)
                await self._settle()  # late transitions are attributed as well
                return answer
        except CommandFailed as exc:
            why = f"it was changed, but what the guest does about it is unknown: {exc.message}"
            return GuestAnswer(False, reason=why, remedy=exc.remedy)
        await self._settle()
        answer = await response.still()
        note = "the guest does not run: it sees the change when it runs"
        return replace(answer, notes=(*answer.notes, note))

    async def _prepare(self, plan: UpdatePlan, ops: Monitor) -> None:
        self._marks.begun = time.monotonic_ns()
        for step in plan.prepare:
            assert step.addition is not None, "only additions are prepared"
            await refuse_if_migrating(ops, f"{step.what} was not made")
            self._go_on("the rest was not begun")
            self._journal.ask(step)
            try:
                await add(ops, step.addition, UPDATE_DEADLINE)
            except (OperationFailed, InputError):
                self._journal.answered(())  # QEMU said no, or was not asked
                raise
            self._journal.answered((step,))
        if plan.prepare:
            self._marks.prepared = time.monotonic_ns()
        self._go_on("the device was not touched")

    async def _update(
        self, steps: Sequence[UpdateStep], ops: Monitor, guard: ResumeGuard | None
    ) -> None:
        commands = [step.command for step in steps]
        if not commands:
            return
        run = None
        sending = partial(self._journal.ask, *steps)
        if guard is not None:
            run = await run_paused(
                ops,
                guard,
                commands,
                deadline=UPDATE_DEADLINE,
                pipelined=self._options.pipelined,
                sending=sending,
            )
            replies = run.replies
            if run.note:
                self._notes.append(run.note)
            self._migrated = run.migrated
        else:
            sending()
            replies = await ops.pipeline(commands, deadline=UPDATE_DEADLINE)
        answered = [r for r in replies if isinstance(r, Reply)]
        if answered:
            self._marks.sent = answered[0].t_start_ns
            self._marks.accepted = answered[-1].t_end_ns
            resumed = run.end_ns if run is not None else answered[-1].t_end_ns
            self._marks.own_until = resumed + (self._host.header.stamp_bound_ns or 0)
        failed = [r for r in replies if isinstance(r, CommandFailed)]
        done = [step for step, r in zip(steps, replies, strict=True) if isinstance(r, Reply)]
        self._journal.answered(done)
        if failed:
            stand = [step.what for step in done if step.undo is None]
            self._journal.stands = bool(stand)
            self._notes += [f"{what}: this was done, and is not taken back" for what in stand]
            raise failed[0]

    @asynccontextmanager
    async def _undone_on_failure(self, ops: Monitor) -> AsyncIterator[None]:
        known = len(self._notes)
        try:
            yield
        except TargetError as exc:
            await self._journal.take_back(ops)
            said = (exc.message, *self._notes[known:])
            raise type(exc)("; ".join(said), remedy=exc.remedy) from exc
        except BaseException:
            await self._journal.take_back(ops)
            raise

    async def _look(self) -> list[Seen]:
        found = [await look_at(self._host.monitor, name) for name in self._devices]
        return [seen for seen in found if seen is not None]

    async def _finish(self, plan: UpdatePlan, ops: Monitor, answer: GuestAnswer) -> GuestAnswer:
        """What is left to do once the guest has done its part: backends of what was unplugged."""
        backends = await count_memory_backends(ops, [step.command for step in plan.finish])
        blocks = await count_ram_blocks(ops) if backends else None
        for step in plan.finish:
            try:
                await remove(ops, step.command)
            except CommandFailed as exc:
                return GuestAnswer(
                    False,
                    reason=f"{step.what} could not be removed: {exc.desc}",
                    remedy="is something else using it?",
                )
        if blocks is not None and not await wait_freed(ops, blocks - backends):
            self._notes.append("QEMU has not freed that memory yet: wait before it is used again")
        return answer

    # -- what came of it ---------------------------------------------------------------------

    async def _outcome(self, outcome: Result, why: GuestAnswer | MemListenerError) -> Outcome:
        await self._settle()
        self._marks.settled = time.monotonic_ns()
        after = await self._status()
        reason = why.message if isinstance(why, MemListenerError) else why.reason
        begun = self._marks.begun
        # what happens in a guest that was not touched is none of ours
        seen = self._records if self._marks.touched else []
        stalls = [r for r in seen if isinstance(r, StallRecord) and r.end_ns > begun]
        changes = [r for r in seen if isinstance(r, TransitionRecord) and r.t_ns >= begun]
        done = outcome is Result.DONE
        return msgspec.structs.replace(
            self._outline(outcome, None if done else reason, None if done else why.remedy, after),
            phases=phases_of(self._marks, changes, stalls),
            stalls=stalls,
            slot_ops=[r for r in seen if isinstance(r, SlotOp) and r.t_ns >= begun],
            transitions=sum(t.merged for t in changes),
            placed=[s.placed for s in await self._look()] if self._marks.touched else [],
        )

    def cut_short(self) -> Outcome:
        """What is known of an update that was cancelled."""
        journal = self._journal
        why, remedy = journal.removed, None
        if journal.left:
            why = "; ".join(journal.left)
            remedy = "`show` lists what the guest has; `unplug ID --backends` takes a device out"
        outcome = Result.FAILED if self._marks.touched else Result.REFUSED
        if journal.left:
            outcome = Result.PARTIAL
        outline = self._outline(outcome, f"interrupted: {why}", remedy, _UNKNOWN)
        return msgspec.structs.replace(outline, interrupted=True)

    def _outline(
        self, outcome: Result, reason: str | None, remedy: str | None, after: str
    ) -> Outcome:
        """The outcome without what was seen."""
        return Outcome(
            outcome=outcome,
            reason=reason,
            remedy=remedy,
            strategy=self._strategy,
            guest_state=GuestStates(self._before, after),
            notes=self._notes,
            probes=self._host.probes(),
            interrupted=self._waiting.enough.is_set(),
        )

    async def _settle(self) -> None:
        try:
            await self._host.settle()
        except CommandFailed as exc:
            self._notes.append(f"the last changes of the map may be missing: {exc.message}")

    async def _status(self) -> str:
        try:
            return (await read_status(self._host.monitor)).status
        except CommandFailed:
            return _UNKNOWN
