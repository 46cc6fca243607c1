"""What the verb `demo` runs."""

from .running import Screen, run_demo

__all__ = ["Screen", "run_demo"]
