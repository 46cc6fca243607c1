"""`watch --mirror`: a mirror of the guest beside a watch, from its options to its record."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING

import rich_click as click

from ..errors import MemListenerError
from ..host.bounded import in_thread

if TYPE_CHECKING:
    from ..agent import Agent
    from ..kvmlab import KvmBackend
    from ..mirror.backend import SlotBackend
    from ..mirror.mirror import Mirror
    from ..records import MirrorRecord, Note

__all__ = ["MirrorOptions", "WatchedMirror", "mirror_options", "opened_mirror"]

_PATIENCE_S = 5.0  # with a mirror that cannot be compared at the end


@dataclass(frozen=True, slots=True)
class MirrorOptions:
    """What to mirror on (`kvm` or `model`), and how."""

    backend: str
    strategy: str
    vcpus: int
    guard_monitor: str | None

    @property
    def pauses(self) -> bool:
        """It stops the guest, and so needs a monitor for the guard."""
        return self.strategy == "pause"


def mirror_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options of a mirror; the verb gets them as `mirror`, None when there is to be none."""

    @wraps(function)
    def verb(
        mirror: str | None,
        strategy: str | None,
        mirror_vcpus: int | None,
        guard_monitor: str | None,
        **rest: object,
    ) -> None:
        if mirror is None:
            _refuse({"strategy": strategy, "mirror-vcpus": mirror_vcpus,
                     "guard-monitor": guard_monitor}, "--mirror")  # fmt: skip
            function(mirror=None, **rest)
            return
        if mirror != "kvm":
            _refuse({"mirror-vcpus": mirror_vcpus}, "--mirror kvm")
        if strategy != "pause":
            _refuse({"guard-monitor": guard_monitor}, "--strategy pause")
        options = MirrorOptions(mirror, strategy or "hole", mirror_vcpus or 0, guard_monitor)
        function(mirror=options, **rest)

    for option in (
        click.option("--guard-monitor", metavar="TARGET", help="With --strategy pause: another QMP "
                     "monitor of the same QEMU, for the guard that resumes the guest if we "
                     "cannot."),
        click.option("--mirror-vcpus", type=click.IntRange(0, 16), metavar="N", help="With "
                     "--mirror kvm: let N vCPUs of the lab VM run, because slot operations cost "
                     "more then; each takes a CPU of this host. Default: 0."),
        click.option("--strategy", type=click.Choice(["direct", "pause", "hole"]), help="How the "
                     "mirror is updated. direct: QEMU's operations alone. pause: the same while "
                     "the guest is paused. hole: slots stay and get holes. Default: hole."),
        click.option("--mirror", type=click.Choice(["kvm", "model"]), help="Keep slots of our own "
                     "in step with the guest's: those of a lab VM on /dev/kvm, or a model in "
                     "memory; compared at the end."),
    ):  # fmt: skip
        verb = option(verb)
    return verb


def _refuse(given: dict[str, object], only_with: str) -> None:
    for name, value in given.items():
        if value is not None:
            raise click.UsageError(f"--{name} goes with {only_with} only")


class WatchedMirror:
    """A mirror whose backend is there; it follows a guest inside `following`.

    `fault` says, after `record`, what is wrong with it.
    """

    def __init__(
        self, options: MirrorOptions, backend: SlotBackend, lab: KvmBackend | None
    ) -> None:
        self.options = options
        self.fault: str | None = None
        self._backend = backend
        self._lab = lab
        self._mirror: Mirror | None = None
        self._hurry: Callable[[], None] = _nothing
        self._given_up = self._cut_short = False
        self._fell = False  # before it was left

    @asynccontextmanager
    async def following(self, agent: Agent) -> AsyncIterator[None]:
        """In step inside the block, and compared when it is left.  Raises as `mirroring`.

        A mirror that is far behind, and a map that changes all the time, are not waited for
        longer than `_PATIENCE_S`.
        """
        import asyncio

        from ..mirror.mirroring import mirroring
        from ..updates.model import Strategy

        # what it has to say is in its report, and that is printed
        logging.getLogger("qmp_memlistener.mirror.mirror").addHandler(logging.NullHandler())
        options, clock = self.options, asyncio.get_running_loop().time
        patience = asyncio.timeout(None)
        try:
            async with (
                patience,
                mirroring(
                    agent,
                    self._backend,
                    Strategy(options.strategy),
                    guard_monitor=options.guard_monitor,
                ) as self._mirror,
            ):
                yield
                self._fell = not self._mirror.in_step
                self._hurry = lambda: patience.reschedule(clock())
                patience.reschedule(clock() + (0.0 if self._given_up else _PATIENCE_S))
        except TimeoutError:
            if self._mirror is None or not patience.expired():
                raise
            self._cut_short = True
            self._mirror.remark("not compared at the end: the wait was ended")
        finally:
            self._hurry = _nothing

    def give_up(self) -> None:
        """Do not compare at the end, or do not wait for that any longer."""
        self._given_up = True
        self._hurry()

    def note(self) -> Note:
        """That it follows, to be reported when it has begun."""
        from ..records import Note

        held = len(list(self._backend.slots()))
        where = "on /dev/kvm" if self._lab is not None else "in memory"
        return Note(
            t_ns=time.monotonic_ns(),
            text=f"mirror {where}, strategy {self.options.strategy}: "
            f"in step from now on, {held} slot{'s' if held != 1 else ''}",
        )

    async def record(self) -> MirrorRecord:
        """What became of it, once `following` was left; the lab is looked at for that."""
        assert self._mirror is not None, "it has followed"
        lab = None
        if self._lab is not None:
            try:
                lab = self._lab.facts(await in_thread(self._lab.verify))
            except MemListenerError as exc:
                self.fault = f"the lab could not be checked: {exc.message}"
                lab = self._lab.facts()
        record = self._mirror.report(self.options.backend, lab)
        if record.faults:
            places = f"{record.faults} place{'s' if record.faults > 1 else ''}"
            self.fault = f"the mirror differed from the guest's map in {places}"
        elif not record.in_step and (self._fell or not self._cut_short):
            self.fault = f"the mirror was not in step: {record.why_not}"
        return record


def _nothing() -> None:
    """Nobody waits."""


@contextmanager
def opened_mirror(options: MirrorOptions) -> Iterator[WatchedMirror]:
    """A mirror with its backend, which is gone after the block.

    Raises MissingPrerequisite when there is to be a lab and KVM cannot be used here.
    """
    from ..mirror.backend import ModelBackend

    with ExitStack() as stack:
        if options.backend == "model":
            yield WatchedMirror(options, ModelBackend(), None)
            return
        from ..kvmlab import KvmBackend
        from ..kvmlab.vm import Kvm

        kvm = stack.enter_context(Kvm())
        lab = stack.enter_context(KvmBackend(kvm, vcpus=options.vcpus))
        yield WatchedMirror(options, lab, lab)
