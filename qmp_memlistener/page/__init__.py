"""What was recorded or compared as one HTML page that needs nothing else."""

from .document import comparison_page, race_page, recording_page
from .lanes import Lanes

__all__ = ["Lanes", "comparison_page", "race_page", "recording_page"]
