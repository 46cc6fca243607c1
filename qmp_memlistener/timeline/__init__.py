"""One timeline: what all probes saw, merged into stalls with witnesses and causes.  Pure."""

from __future__ import annotations

from .timeline import Timeline

__all__ = ["Timeline"]
