"""attach() -> Agent: snapshots, transitions, listeners, recording; one clock, one timeline."""

from .agent import Agent, attach
from .publisher import RecordStream

__all__ = ["Agent", "RecordStream", "attach"]
