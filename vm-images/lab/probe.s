# The programs of the lab's guests.  64-bit, flat, no interrupts, position independent: the host
# copies the image wherever the code is to lie.  qmp_memlistener/kvmlab/programs.py has the other
# half of the contract; a test compares the numbers.  `make` builds probe.img with binutils only.
#
# Registers at the start:
#   rdi          report page of this vCPU
#   r8..r11      writer: first page, first page of the hole, first page behind it, end
#
# Report page, u64 each:
.set COUNT, 0x00        # beats
.set LAST_TSC, 0x08     # of the last beat
.set MAX_GAP, 0x10      # longest time between two beats, in ticks; the host sets it to 0
.set MAX_GAP_TSC, 0x18  # the beat that ended it
.set TABLE, 0x20        # data: address of the table to go through next; the host sets it
.set IN_USE, 0x28       # data: the table that is being gone through
.set GENERATION, 0x30   # writer: what is being written into each page

.set GAP, 0x000         # where the programs begin
.set DATA, 0x080
.set WRITER, 0x100
.set SIZE, 0x200

.code64

# A beat: how long since the last one?  Uses rax, rdx, rcx.
.macro beat
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    mov %rax, %rcx
    sub LAST_TSC(%rdi), %rcx
    mov %rax, LAST_TSC(%rdi)
    cmp MAX_GAP(%rdi), %rcx
    jbe 9f
    mov %rcx, MAX_GAP(%rdi)
    mov %rax, MAX_GAP_TSC(%rdi)
9:  incq COUNT(%rdi)
.endm

# gap: beats, and touches nothing else
.org GAP
gap:
    beat
    jmp gap

# data: adds one to each word of a table, a beat for each.  An odd entry is only read (at the
# even address below it), 0 ends the table.
.org DATA
data:
    mov TABLE(%rdi), %rbx
    mov %rbx, IN_USE(%rdi)
1:  mov (%rbx), %rsi
    test %rsi, %rsi
    jz data
    add $8, %rbx
    test $1, %sil
    jnz 2f
    mov (%rsi), %rax
    inc %rax
    mov %rax, (%rsi)
    jmp 3f
2:  mov -1(%rsi), %rax
3:  beat
    jmp 1b

# writer: writes its generation into the first word of each page, over and over
.org WRITER
writer:
    incq GENERATION(%rdi)
    mov %r8, %rsi
1:  cmp %r9, %rsi
    jne 2f
    mov %r10, %rsi
2:  cmp %r11, %rsi
    jae writer
    mov GENERATION(%rdi), %rax
    mov %rax, (%rsi)
    add $4096, %rsi
    beat
    jmp 1b

.org SIZE
