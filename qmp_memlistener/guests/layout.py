"""The pulse guest's layout, number by number as vm-images/pulse/layout.inc has it.

That file is the source and says what each number means; README.md beside it explains the whole.
A unit test holds the two to the same names and values.  Meaning and access are in `pulse`.
"""

from __future__ import annotations

from typing import Final

LAYOUT_VERSION: Final = 1
MAX_CPUS: Final = 8

CODE_BASE: Final = 0x10000
HEADER: Final = 0x20000
BLOCKS: Final = 0x30000
BLOCK_SIZE: Final = 0x8000
TABLES: Final = 0x70000
HIGH_OFFSET: Final = 0x200000
RAM_NEEDED: Final = 0x400000

H_MAGIC: Final = 0x00
H_VERSION: Final = 0x08
H_STATE: Final = 0x0C
H_EXPECTED: Final = 0x10
H_LIVE: Final = 0x14
H_BOOTS: Final = 0x18
H_BOOTED_BY: Final = 0x1C
H_ENTRY_TSC: Final = 0x20
H_READY_TSC: Final = 0x28
H_NEXT_INDEX: Final = 0x30
H_CPU: Final = 0x40

STATE_BOOTING: Final = 1
STATE_READY: Final = 2
BY_DISK: Final = 1
BY_ROM: Final = 2

PLACE_CODE: Final = 1
PLACE_DATA: Final = 2
PLACE_TABLES: Final = 4
PLACE_MASK: Final = 7
CPU_ALIVE: Final = 0x80000000

HB_COUNT: Final = 0x00
HB_LAST_TSC: Final = 0x08
HB_MAX_GAP: Final = 0x10
HB_MAX_GAP_TSC: Final = 0x18
HB_THRESHOLD: Final = 0x20
HB_BAR: Final = 0x28
HB_GAPS: Final = 0x30
HB_REQUEST: Final = 0x38
HB_ARGUMENT: Final = 0x40
HB_RESET_TSC: Final = 0x48
DEFAULT_THRESHOLD: Final = 0x100000

GAP_RING: Final = 0x1000
GAP_ENTRIES: Final = 128

MAILBOX: Final = 0x2000
MB_SEQ: Final = 0x2000
MB_ACK: Final = 0x2004
MB_COMMAND: Final = 0x2008
MB_STATUS: Final = 0x200C
MB_ARG0: Final = 0x2010
MB_ARG1: Final = 0x2018
MB_ARG2: Final = 0x2020
MB_ARG3: Final = 0x2028
MB_ARG4: Final = 0x2030
MB_ARG5: Final = 0x2038
MB_RESULT: Final = 0x2040
MB_BEGIN_TSC: Final = 0x2048
MB_END_TSC: Final = 0x2050

TG_GOAL: Final = 0x2080
TG_DONE: Final = 0x2088
TG_LEFT: Final = 0x2090
TG_PERIOD: Final = 0x2098
TG_UNIT: Final = 0x20A0
TG_TURNS: Final = 0x20A8
TG_LAST_TSC: Final = 0x20B0
TG_SELECT: Final = 0x20B8
TG_PORT: Final = 0x20BC
TG_WIDTH: Final = 0x20C0
TG_VALUE_A: Final = 0x20C4
TG_VALUE_B: Final = 0x20C8

STACK_END: Final = 0x4000

TOGGLE_RING: Final = 0x4000
TOGGLE_ENTRIES: Final = 1024

CMD_NOP: Final = 0
CMD_READ_CONFIG: Final = 1
CMD_WRITE_CONFIG: Final = 2
CMD_IN: Final = 3
CMD_OUT: Final = 4
CMD_PEEK: Final = 5
CMD_POKE: Final = 6
CMD_MAP_BAR: Final = 7
CMD_UNMAP_BAR: Final = 8
CMD_TOGGLE: Final = 9
CMD_PLACE: Final = 10
CMD_RESET: Final = 11

UNIT_TICKS: Final = 0
UNIT_TURNS: Final = 1

STATUS_OK: Final = 0
STATUS_UNKNOWN: Final = 1
STATUS_ARGUMENT: Final = 2
STATUS_BUSY: Final = 3
STATUS_NO_DEVICE: Final = 4

REQUEST_NONE: Final = 0
REQUEST_PLACE: Final = 1
REQUEST_RESET: Final = 2
