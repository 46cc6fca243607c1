"""Reports from records, live or recorded."""

from .terminal import Narrator

__all__ = ["Narrator"]
