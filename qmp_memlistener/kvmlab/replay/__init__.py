"""Transitions of a real guest, read from a recording or a log of QEMU, and run on the lab."""
