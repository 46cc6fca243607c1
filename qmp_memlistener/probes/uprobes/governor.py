"""How much of a CPU the probes may take, and when that was too much for too long."""

from __future__ import annotations

__all__ = ["Governor"]

_INTERVAL_NS = 250_000_000
_PATIENCE_NS = 1_000_000_000


class Governor:
    """Watches hits per second times the cost of one, as a share of one CPU.

    Pure.  `limit` is that share, `hit_ns` what a hit costs.  A peak is borne: only a share above
    the limit for more than a second is too much.
    """

    def __init__(self, limit: float, hit_ns: int, start_ns: int) -> None:
        self.limit = limit
        self.share = 0.0
        """Over the last interval."""
        self._hit_ns = hit_ns
        self._since_ns = start_ns
        self._good_ns = start_ns
        self._hits = 0

    def add(self, t_ns: int, hits: int) -> bool:
        """There were `hits` until now; true when it is too much.  Begins anew after that."""
        self._hits += hits
        elapsed = t_ns - self._since_ns
        if elapsed < _INTERVAL_NS:
            return False
        self.share = self._hits * self._hit_ns / elapsed
        self._since_ns, self._hits = t_ns, 0
        if self.share <= self.limit:
            self._good_ns = t_ns
        if t_ns - self._good_ns <= _PATIENCE_NS:
            return False
        self._good_ns = t_ns
        return True
