"""All probes, in the order of what they demand of the user, and which of them to take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from ..errors import InputError
from ..text import quoted
from .model import Context, Probe, ProbeInfo, Verdict

__all__ = ["PROBES", "Choice", "choose", "known_names", "make", "on_host"]

# name -> module and class; least privilege first
PROBES = {
    "runstate": ("runstate", "RunStateProbe"),
    "trace": ("trace", "TraceProbe"),
    "interposer": ("interposer", "InterposerProbe"),
    "pulse": ("pulse", "PulseProbe"),
    "threads": ("threads", "ThreadsProbe"),
    "ping": ("ping", "PingProbe"),
    "kvmstats": ("kvmstats", "KvmStatsProbe"),
    "lockprofile": ("lockprofile", "LockProfileProbe"),
    "uprobes": ("uprobes", "UprobesProbe"),
}
_SPARE = {"lockprofile": "uprobes", "ping": "threads"}
"""A probe that is left out by default when a better one works, for all that it measures."""

_BETTER = {
    "uprobes": "uprobes sees more",
    "threads": "threads sees the same and costs QEMU nothing",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """A probe and whether it is taken, or why not; `wanted`: the guest alone is in the way."""

    probe: Probe
    verdict: Verdict
    wanted: bool = True

    @property
    def info(self) -> ProbeInfo:
        return self.probe.info


def known_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names in our order.  Raises InputError for one that is no probe."""
    for name in names:
        if name not in PROBES:
            raise InputError(
                f"there is no probe {quoted(name)}", remedy=f"the probes are {', '.join(PROBES)}"
            )
    return tuple(name for name in PROBES if name in names)


def make(name: str, context: Context) -> Probe:
    """The probe of that name for a guest."""
    module, attribute = PROBES[name]
    build: Callable[[Context], Probe] = getattr(import_module(f".{module}", __package__), attribute)
    return build(context)


def on_host() -> list[tuple[ProbeInfo, Verdict]]:
    """Every probe with what can be said of it without a guest.

    A probe's module may have a function `host_verdict`; without one the guest alone decides.
    """
    found = []
    for module_name, attribute in PROBES.values():
        module = import_module(f".{module_name}", __package__)
        info: ProbeInfo = getattr(module, attribute).info
        host_verdict: Callable[[], Verdict] = getattr(module, "host_verdict", _for_all_we_know)
        found.append((info, host_verdict()))
    return found


def _for_all_we_know() -> Verdict:
    return Verdict(True)


async def choose(context: Context, names: Sequence[str] | None) -> list[Choice]:
    """Every probe with a verdict: those of `names`, or by default the best that work.

    A probe whose declared share of a CPU exceeds `context.max_share` is left out, and so is one
    that adds nothing to another that works.
    """
    found: dict[str, Choice] = {}
    for name in PROBES:
        probe = make(name, context)
        wanted = False
        if names is not None and name not in names:
            verdict = Verdict.no("it was not requested")
        elif context.max_share is not None and probe.info.share > context.max_share:
            verdict = Verdict.no(
                f"it takes {probe.info.share:.1%} of a CPU from QEMU, "
                f"more than the {context.max_share:.1%} allowed",
                "allow more with --max-overhead",
            )
        else:
            verdict, wanted = await probe.check(), True
        found[name] = Choice(probe, verdict, wanted)
    if names is None:
        for name, better in _SPARE.items():
            if name == "ping" and context.must_ping:
                continue
            lacks = found[better].verdict.lacks & frozenset(found[name].info.measures)
            if found[better].verdict.usable and not lacks and found[name].verdict.usable:
                verdict = Verdict.no(_BETTER[better], f"name it with --probes {name}")
                found[name] = Choice(found[name].probe, verdict)
    return list(found.values())
