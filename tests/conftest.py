"""Shared by all tiers: a summary that says how many tests ran in each and why some did not."""

from __future__ import annotations

import gc
import signal
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings

# what the tiers share asserts too, and whichever of them is first imports it
pytest.register_assert_rewrite("tests.support")

TIERS = ("unit", "conformance", "kvm", "live", "fuzz")

# the machines are slow and noisy: a deadline for one example would test them, not us
settings.register_profile(
    "default", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")


# What is ignored here stays so in the verbs that the tests start and send it to: the one is ignored
# under nohup, the other in the background of a shell without job control.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What was collected stays to the end: no search for garbage goes through it again."""
    gc.collect()
    gc.freeze()


def tier_of(nodeid: str) -> str:
    """`tests/live/test_x.py::test_y` is of the tier `live`."""
    parts = nodeid.split("/")
    return parts[1] if len(parts) > 2 and parts[0] == "tests" else "other"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A row a tier, and the reasons for what was skipped."""
    counts: dict[str, Counter[str]] = {tier: Counter() for tier in TIERS}
    reasons: Counter[tuple[str, str]] = Counter()
    for outcome in ("passed", "failed", "error", "skipped", "xfailed"):
        for report in terminalreporter.stats.get(outcome, []):
            tier = tier_of(report.nodeid)
            counts.setdefault(tier, Counter())[outcome] += 1
            if outcome == "skipped" and isinstance(report.longrepr, tuple):
                reasons[tier, report.longrepr[2].removeprefix("Skipped: ")] += 1
    terminalreporter.section("tests by tier")
    for tier, count in counts.items():
        bad = count["failed"] + count["error"]
        terminalreporter.line(
            f"{tier:<12} {count['passed']:>5} passed {bad:>4} failed {count['skipped']:>5} skipped"
        )
    for (tier, reason), n in sorted(reasons.items()):
        terminalreporter.line(f"  {tier}: {n} skipped: {reason}")
