"""Strategies against each other on one guest: rounds, the guest that is put back, statistics."""

from .rounds import (
    CONTROL,
    INTERRUPTED,
    ORDER,
    CompareOptions,
    Comparison,
    Skipped,
    compare,
    compare_rounds,
)
from .stats import Difference, Round, Summary

__all__ = [
    "CONTROL",
    "INTERRUPTED",
    "ORDER",
    "CompareOptions",
    "Comparison",
    "Difference",
    "Round",
    "Skipped",
    "Summary",
    "compare",
    "compare_rounds",
]
