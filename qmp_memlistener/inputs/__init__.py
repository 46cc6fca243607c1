"""Files that people have: opened, unpacked, recognised, and read or refused by name.

`opening` gives the bytes of a file as UTF-8, whatever they were packed in, and says what a file is;
`maps` finds the `info mtree` output in monitor sessions and QMP replies; `traces` reads
lines of slot operations in the forms that QEMU's trace backends and log collectors give them.
"""

from .maps import read_dump
from .opening import Identity, identify, identify_file, open_input, refusal
from .traces import TraceLine, read_trace_line

__all__ = [
    "Identity",
    "TraceLine",
    "identify",
    "identify_file",
    "open_input",
    "read_dump",
    "read_trace_line",
    "refusal",
]
