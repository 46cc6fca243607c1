"""Stopping a guest for a while, so that it runs again whatever happens.

paused, resuming       the pause itself, and how it ends
guard, guard_start     the process that resumes the guest if the agent cannot; no guest
                       is stopped that a migration has
guard_process, promise that process, and its rules
guard_notes            what it leaves when both were killed
"""

from .guard import ResumeGuard, Settled
from .paused import Pause, paused_guest, run_paused

__all__ = ["Pause", "ResumeGuard", "Settled", "paused_guest", "run_paused"]
