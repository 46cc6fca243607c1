"""A recording in the forms that other tools read: Perfetto, CSV, Parquet, OpenMetrics."""

from .export import Exported, Format, export

__all__ = ["Exported", "Format", "export"]
