# The pulse guest: beats on every CPU, obeys a mailbox on CPU 0.  README.md has the layout.
#
#   boot.s     the two ways in: boot sector (disk) and reset vector (firmware-less)
#   entry.s    real mode to long mode, start of the other CPUs
#   beat.s     heartbeat loops, gaps, placement
#   mailbox.s  the commands of CPU 0
#
# Plain integer instructions only: under a KVM without hardware virtualisation every one of them
# goes through the instruction emulator, so short loops are also what makes the pulse fast.
# Everything from entry.s on is position independent after the switch to long mode, because it
# runs from two copies.

.include "layout.inc"
.include "boot.s"
.include "entry.s"
.include "beat.s"
.include "mailbox.s"
