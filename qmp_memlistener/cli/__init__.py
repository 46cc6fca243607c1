"""The command line: one verb per module.  The only place that prints."""
