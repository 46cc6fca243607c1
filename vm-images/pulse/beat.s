# Heartbeat, gaps, placement.
#
# Registers of a beating CPU:
#   rbp  its block, low or high         r13d  mailbox sequence number answered last (CPU 0)
#   rsp  stack inside the block         r14   its word in the header: placement, alive, generation
#   rbx  TSC of the last beat           r15   its index

# One beat.  The compare is with HB_BAR, the smaller of threshold and largest gap so far, so a
# beat has one compare for both.
.macro BEAT
    rdtsc
    shlq $32, %rdx
    orq %rdx, %rax
    movq %rax, %rcx
    subq %rbx, %rcx
    movq %rax, %rbx
    movq %rax, HB_LAST_TSC(%rbp)
    incq HB_COUNT(%rbp)
    cmpq HB_BAR(%rbp), %rcx
    jbe 1f
    call note_gap
1:
.endm

# CPU 0
.balign 16
loop_first:
    BEAT
    cmpl MB_SEQ(%rbp), %r13d
    jne mailbox
    cmpq $0, TG_LEFT(%rbp)
    je loop_first
    jmp toggle

# The others
.balign 16
loop_other:
    BEAT
    cmpq $REQUEST_NONE, HB_REQUEST(%rbp)
    je loop_other
    cmpq $REQUEST_PLACE, HB_REQUEST(%rbp)
    jne 1f
    movl HB_ARGUMENT(%rbp), %r8d
    jmp move
1:  movq HB_ARGUMENT(%rbp), %rsi
    call reset_statistics
    movq %r14, HEADER + H_CPU(, %r15, 8)
    movq $REQUEST_NONE, HB_REQUEST(%rbp)
    jmp loop_other

# A gap of rcx ticks that ended at TSC rax.  The ring entry is complete before HB_GAPS counts it.
note_gap:
    testq %rcx, %rcx
    js 3f                           # the TSC was set back: not a gap
    cmpq HB_MAX_GAP(%rbp), %rcx
    jbe 1f
    movq %rax, HB_MAX_GAP_TSC(%rbp)
    movq %rcx, HB_MAX_GAP(%rbp)
1:  movq HB_THRESHOLD(%rbp), %rsi
    cmpq %rsi, %rcx
    jbe 2f
    movq HB_GAPS(%rbp), %rdx
    movl %edx, %edi
    andl $(GAP_ENTRIES - 1), %edi
    shll $5, %edi
    addq %rbp, %rdi
    incq %rdx
    movq %rax, GAP_RING(%rdi)
    movq %rcx, GAP_RING + 8(%rdi)
    movq HB_COUNT(%rbp), %rax
    movq %rax, GAP_RING + 16(%rdi)
    movq %rdx, GAP_RING + 24(%rdi)
    movq %rdx, HB_GAPS(%rbp)
2:  movq HB_MAX_GAP(%rbp), %rdx
    cmpq %rsi, %rdx
    jbe 4f
    movq %rsi, %rdx
4:  movq %rdx, HB_BAR(%rbp)
3:  ret

# New statistics with threshold rsi; counts a generation in r14, which the caller publishes.
reset_statistics:
    xorl %eax, %eax
    movq %rax, HB_GAPS(%rbp)
    movq %rax, HB_MAX_GAP(%rbp)
    movq %rax, HB_MAX_GAP_TSC(%rbp)
    movq %rax, HB_BAR(%rbp)
    movq %rsi, HB_THRESHOLD(%rbp)
    movq $(1 << 32), %rax
    addq %rax, %r14
    call stamp
    movq %rax, HB_RESET_TSC(%rbp)
    movq %rax, %rbx
    ret

# This CPU's places become r8d.  Its count and threshold, and on CPU 0 the sequence number, go
# along; statistics start anew.  Does not return: ends in the loop of the chosen copy.
move:
    movq %rbp, %r9
    movl %r15d, %ebp
    imull $BLOCK_SIZE, %ebp
    addl $BLOCKS, %ebp
    testl $PLACE_DATA, %r8d
    jz 1f
    addl $HIGH_OFFSET, %ebp
1:  movq HB_COUNT(%r9), %r10
    movq HB_THRESHOLD(%r9), %rsi
    leaq STACK_END(%rbp), %rsp
    cmpq %r9, %rbp
    je 2f
    call clear_block
    movq %r10, HB_COUNT(%rbp)
    movl %r13d, MB_ACK(%rbp)
    movl %r13d, MB_SEQ(%rbp)
2:  movl $TABLES, %eax
    testl $PLACE_TABLES, %r8d
    jz 3f
    addl $HIGH_OFFSET, %eax
3:  movq %rax, %cr3
    call reset_statistics
    andl $PLACE_MASK, %r8d
    movl $PLACE_MASK, %eax
    notq %rax
    andq %rax, %r14
    orq %r8, %r14
    movq %r14, HEADER + H_CPU(, %r15, 8)
    movq $REQUEST_NONE, HB_REQUEST(%r9)
    movl $loop_other, %eax
    testl %r15d, %r15d
    jnz 4f
    movl $loop_first, %eax
4:  testl $PLACE_CODE, %r8d
    jz 5f
    addl $HIGH_OFFSET, %eax
5:  jmpq *%rax

# Heartbeat and mailbox page of block rbp to zero.  Keeps rsi.
clear_block:
    xorl %eax, %eax
    movq %rbp, %rdi
    movl $(0x1000 / 8), %ecx
    rep stosq
    leaq MAILBOX(%rbp), %rdi
    movl $(0x1000 / 8), %ecx
    rep stosq
    ret

# rax = TSC.  Changes rdx.
stamp:
    rdtsc
    shlq $32, %rdx
    orq %rdx, %rax
    ret
