# Commands of CPU 0.  A handler returns its status in eax and its result in MB_RESULT.

.set CONFIG_ADDRESS, 0xcf8
.set CONFIG_DATA, 0xcfc
.set PCI_COMMAND, 4
.set PCI_COMMAND_MEMORY, 2
.set PCI_BAR0, 0x10

# r12d = sequence number; r8d = placement to take after the answer, or -1.
# r10, r11 = TSC around the last port write, or around the whole command when it wrote none.
mailbox:
    movl MB_SEQ(%rbp), %r12d
    movq $0, MB_RESULT(%rbp)
    call stamp
    movq %rax, %r10
    xorl %r11d, %r11d
    movl $-1, %r8d
    movl MB_COMMAND(%rbp), %ecx
    movl $STATUS_UNKNOWN, %eax
    cmpl $CMD_RESET, %ecx
    ja 1f
    leaq commands(%rip), %rdx
    movslq (%rdx, %rcx, 4), %rcx
    addq %rcx, %rdx
    callq *%rdx
1:  movl %eax, MB_STATUS(%rbp)
    testq %r11, %r11
    jnz 2f
    call stamp
    movq %rax, %r11
2:  movq %r10, MB_BEGIN_TSC(%rbp)
    movq %r11, MB_END_TSC(%rbp)
    movl %r12d, %r13d
    movl %r12d, MB_ACK(%rbp)
    cmpl $-1, %r8d
    jne move
    jmp loop_first

.balign 4
commands:
    .long cmd_nop - commands
    .long cmd_read_config - commands
    .long cmd_write_config - commands
    .long cmd_in - commands
    .long cmd_out - commands
    .long cmd_peek - commands
    .long cmd_poke - commands
    .long cmd_map_bar - commands
    .long cmd_unmap_bar - commands
    .long cmd_toggle - commands
    .long cmd_place - commands
    .long cmd_reset - commands

cmd_nop:
    xorl %eax, %eax
    ret

# arg0 bus << 8 | device << 3 | function, arg1 register, arg2 width 1, 2, 4 or 8.
cmd_read_config:
    call config_arguments
    jc bad_argument
    call config_read
    movq %rax, MB_RESULT(%rbp)
    xorl %eax, %eax
    ret

# The same, arg3 the value.
cmd_write_config:
    call config_arguments
    jc bad_argument
    movq MB_ARG3(%rbp), %rax
    call config_write
    xorl %eax, %eax
    ret

# arg0 port, arg1 width 1, 2 or 4, arg2 value (CMD_OUT).
cmd_in:
    call port_arguments
    jc bad_argument
    call port_read
    movq %rax, MB_RESULT(%rbp)
    xorl %eax, %eax
    ret
cmd_out:
    call port_arguments
    jc bad_argument
    movl MB_ARG2(%rbp), %eax
    call port_write
    xorl %eax, %eax
    ret

# arg0 guest-physical address below 4 GiB, arg1 width, arg2 value (CMD_POKE).
cmd_peek:
    call memory_arguments
    jc bad_argument
    xorl %eax, %eax
    cmpl $8, %ecx
    je 8f
    cmpl $4, %ecx
    je 4f
    cmpl $2, %ecx
    je 2f
    movb (%rsi), %al
    jmp 9f
2:  movw (%rsi), %ax
    jmp 9f
4:  movl (%rsi), %eax
    jmp 9f
8:  movq (%rsi), %rax
9:  movq %rax, MB_RESULT(%rbp)
    xorl %eax, %eax
    ret
cmd_poke:
    call memory_arguments
    jc bad_argument
    movq MB_ARG2(%rbp), %rax
    cmpl $8, %ecx
    je 8f
    cmpl $4, %ecx
    je 4f
    cmpl $2, %ecx
    je 2f
    movb %al, (%rsi)
    jmp 9f
2:  movw %ax, (%rsi)
    jmp 9f
4:  movl %eax, (%rsi)
    jmp 9f
8:  movq %rax, (%rsi)
9:  xorl %eax, %eax
    ret

bad_argument:
    movl $STATUS_ARGUMENT, %eax
    ret
no_device:
    movl $STATUS_NO_DEVICE, %eax
    ret
busy:
    movl $STATUS_BUSY, %eax
    ret

# arg0 function, arg1 BAR 0-5, arg2 address.  Decoding goes off, the BAR is written (both halves
# of a 64-bit one), decoding goes on; the result is the COMMAND register as it was.
cmd_map_bar:
    call find_function
    jc 9f
    movq MB_ARG1(%rbp), %rsi
    cmpq $5, %rsi
    ja bad_argument
    leal PCI_BAR0(, %rsi, 4), %esi
    movl $4, %ecx
    call config_read                # the BAR's low bits tell its kind
    movl %eax, %r9d
    testl $1, %r9d
    jnz bad_argument                # an I/O BAR
    movl %r9d, %edx
    andl $6, %edx
    cmpl $4, %edx                   # 64-bit
    je 1f
    cmpl $0, MB_ARG2 + 4(%rbp)
    jne bad_argument
    jmp 2f
1:  cmpl $(PCI_BAR0 + 20), %esi     # the last BAR has no upper half
    je bad_argument
2:  pushq %rsi
    call decode_off
    popq %rsi
    movl $4, %ecx
    movl MB_ARG2(%rbp), %eax
    call config_write
    andl $6, %r9d
    cmpl $4, %r9d
    jne 3f
    addl $4, %esi
    movl MB_ARG2 + 4(%rbp), %eax
    call config_write
3:  movq MB_RESULT(%rbp), %rax
    orl $PCI_COMMAND_MEMORY, %eax
    movl $PCI_COMMAND, %esi
    movl $2, %ecx
    call config_write
    xorl %eax, %eax
9:  ret

# arg0 function.  Memory decoding goes off; the result is the COMMAND register as it was.
cmd_unmap_bar:
    call find_function
    jc 9f
    call decode_off
    xorl %eax, %eax
9:  ret

# edi = arg0 if a device answers there; else carry and the status in eax.
find_function:
    movq MB_ARG0(%rbp), %rdi
    cmpq $0xffff, %rdi
    ja 8f
    xorl %esi, %esi
    movl $2, %ecx
    call config_read
    cmpl $0xffff, %eax
    je 9f
    clc
    ret
8:  movl $STATUS_ARGUMENT, %eax
    stc
    ret
9:  movl $STATUS_NO_DEVICE, %eax
    stc
    ret

# COMMAND of function edi to MB_RESULT, then without memory decoding.
decode_off:
    movl $PCI_COMMAND, %esi
    movl $2, %ecx
    call config_read
    movq %rax, MB_RESULT(%rbp)
    andl $~PCI_COMMAND_MEMORY, %eax
    jmp config_write

# arg0-arg2 as in CMD_WRITE_CONFIG (width 1, 2 or 4), arg3 first value | second value << 32,
# arg4 how many writes (0 stops a toggle under way), arg5 period << 1 | unit.
# The result is how many writes the toggle before did.
cmd_toggle:
    movq TG_DONE(%rbp), %rax
    movq %rax, MB_RESULT(%rbp)
    cmpq $0, MB_ARG4(%rbp)
    jne 1f
    movq $0, TG_LEFT(%rbp)
    xorl %eax, %eax
    ret
1:  cmpq $0, TG_LEFT(%rbp)
    jne busy
    call config_arguments
    jc bad_argument
    cmpl $8, %ecx
    je bad_argument
    movl %ecx, TG_WIDTH(%rbp)
    call config_port
    movl %eax, TG_SELECT(%rbp)
    movl %edx, TG_PORT(%rbp)
    movl MB_ARG3(%rbp), %eax
    movl %eax, TG_VALUE_A(%rbp)
    movl MB_ARG3 + 4(%rbp), %eax
    movl %eax, TG_VALUE_B(%rbp)
    movq MB_ARG5(%rbp), %rax
    movl %eax, %edx
    andl $1, %edx
    movq %rdx, TG_UNIT(%rbp)
    shrq $1, %rax
    movq %rax, TG_PERIOD(%rbp)
    movq %rax, TG_TURNS(%rbp)
    movq $0, TG_DONE(%rbp)
    call stamp
    movq %rax, TG_LAST_TSC(%rbp)
    movq MB_ARG4(%rbp), %rax
    movq %rax, TG_GOAL(%rbp)
    movq %rax, TG_LEFT(%rbp)
    xorl %eax, %eax
    ret

# One turn of CPU 0's loop with a toggle under way; rbx = TSC of this beat.  A period runs from
# the end of one write to the begin of the next, so a slow write never bunches the others.
toggle:
    cmpq $UNIT_TURNS, TG_UNIT(%rbp)
    je 1f
    movq %rbx, %rax
    subq TG_LAST_TSC(%rbp), %rax
    cmpq TG_PERIOD(%rbp), %rax
    jb loop_first
    jmp 2f
1:  cmpq $0, TG_TURNS(%rbp)
    je 2f
    decq TG_TURNS(%rbp)
    jmp loop_first
2:  movq TG_PERIOD(%rbp), %rax
    movq %rax, TG_TURNS(%rbp)
    movl $CONFIG_ADDRESS, %edx
    movl TG_SELECT(%rbp), %eax
    outl %eax, %dx
    movl TG_VALUE_A(%rbp), %eax
    testb $1, TG_DONE(%rbp)
    jz 3f
    movl TG_VALUE_B(%rbp), %eax
3:  movl %eax, %r8d
    movl TG_PORT(%rbp), %edx
    movl TG_WIDTH(%rbp), %ecx
    call port_write
    movq %r11, TG_LAST_TSC(%rbp)
    movq TG_DONE(%rbp), %rdx
    movl %edx, %edi
    andl $(TOGGLE_ENTRIES - 1), %edi
    shll $4, %edi
    addq %rbp, %rdi
    movq %r10, TOGGLE_RING(%rdi)
    subq %r10, %r11
    movq %r11, %rax
    shrq $32, %rax
    jz 4f
    movl $-1, %r11d                 # longer than 32 bits can say
4:  movl %r11d, TOGGLE_RING + 8(%rdi)
    movl %r8d, TOGGLE_RING + 12(%rdi)
    incq %rdx
    movq %rdx, TG_DONE(%rbp)
    decq TG_LEFT(%rbp)
    jmp loop_first

# arg0 CPU, arg1 placement.  CPU 0 moves after the answer; another CPU is asked to.
cmd_place:
    movq MB_ARG1(%rbp), %rcx
    cmpq $PLACE_MASK, %rcx
    ja bad_argument
    movq MB_ARG0(%rbp), %rax
    testq %rax, %rax
    jnz 1f
    cmpq $0, TG_LEFT(%rbp)
    jne busy
    movl %ecx, %r8d
    ret
1:  movl $REQUEST_PLACE, %edx
    jmp hand_over

# arg0 CPU, arg1 threshold in ticks.
cmd_reset:
    movq MB_ARG1(%rbp), %rcx
    movq MB_ARG0(%rbp), %rax
    testq %rax, %rax
    jnz 1f
    movq %rcx, %rsi
    call reset_statistics
    movq %r14, HEADER + H_CPU
    xorl %eax, %eax
    ret
1:  movl $REQUEST_RESET, %edx

# Request edx with argument rcx to CPU rax, in the block where it beats now.
hand_over:
    cmpq $MAX_CPUS, %rax
    jae bad_argument
    movq HEADER + H_CPU(, %rax, 8), %rsi
    testl $CPU_ALIVE, %esi
    jz no_device
    imull $BLOCK_SIZE, %eax
    addl $BLOCKS, %eax
    testl $PLACE_DATA, %esi
    jz 1f
    addl $HIGH_OFFSET, %eax
1:  cmpq $REQUEST_NONE, HB_REQUEST(%rax)
    jne busy
    movq %rcx, HB_ARGUMENT(%rax)
    movq %rdx, HB_REQUEST(%rax)
    xorl %eax, %eax
    ret

# edi = function, esi = register, ecx = width from arg0-arg2; carry if they make no sense.
config_arguments:
    movq MB_ARG0(%rbp), %rdi
    cmpq $0xffff, %rdi
    ja 9f
    movq MB_ARG1(%rbp), %rsi
    cmpq $0xff, %rsi
    ja 9f
    movq MB_ARG2(%rbp), %rcx

# Carry unless rcx is 1, 2, 4 or 8 and rsi a multiple of it.
check_width:
    cmpq $8, %rcx
    ja 9f
    je 1f
    cmpl $4, %ecx
    je 1f
    testl %ecx, %ecx
    jz 9f
    cmpl $2, %ecx
    ja 9f
1:  leal -1(%rcx), %eax
    testl %esi, %eax
    jnz 9f
    clc
    ret
9:  stc
    ret

# edx = port, ecx = width from arg0, arg1.
port_arguments:
    movq MB_ARG0(%rbp), %rdx
    cmpq $0xffff, %rdx
    ja 9b
    xorl %esi, %esi
    movq MB_ARG1(%rbp), %rcx
    cmpq $4, %rcx
    ja 9b
    jmp check_width

# rsi = address, ecx = width from arg0, arg1.
memory_arguments:
    movq MB_ARG0(%rbp), %rsi
    movq %rsi, %rax
    shrq $32, %rax
    jnz 9b
    movq MB_ARG1(%rbp), %rcx
    jmp check_width

# eax = CONFIG_ADDRESS and edx = data port for register esi of function edi.
config_port:
    movl %esi, %eax
    andl $3, %eax
    leal CONFIG_DATA(%rax), %edx
    movl %edi, %eax
    shll $8, %eax
    orl %esi, %eax
    andl $~3, %eax
    orl $0x80000000, %eax
    ret

config_select:
    call config_port
    pushq %rdx
    movl $CONFIG_ADDRESS, %edx
    outl %eax, %dx
    popq %rdx
    ret

# rax = register esi of function edi, ecx wide.  Keeps edi, esi, ecx.
config_read:
    cmpl $8, %ecx
    je 1f
    call config_select
    jmp port_read
1:  movl $4, %ecx
    addl $4, %esi
    call config_read
    pushq %rax
    subl $4, %esi
    call config_read
    popq %rdx
    shlq $32, %rdx
    orq %rdx, %rax
    movl $8, %ecx
    ret

# Register esi of function edi, ecx wide, becomes rax; of 8 bytes the upper half goes first,
# because the enable bits of PCIEXBAR are in the lower.  Keeps edi, esi, ecx.
config_write:
    cmpl $8, %ecx
    je 1f
    pushq %rax
    call config_select
    popq %rax
    jmp port_write
1:  movl $4, %ecx
    pushq %rax
    shrq $32, %rax
    addl $4, %esi
    call config_write
    subl $4, %esi
    popq %rax
    call config_write
    movl $8, %ecx
    ret

# rax = port edx, ecx (1, 2, 4) wide.
port_read:
    xorl %eax, %eax
    cmpl $2, %ecx
    je 2f
    ja 4f
    inb %dx, %al
    ret
2:  inw %dx, %ax
    ret
4:  inl %dx, %eax
    ret

# Port edx, ecx wide, gets eax; r10 and r11 = TSC before and after.
port_write:
    pushq %rdx
    pushq %rax
    call stamp
    movq %rax, %r10
    popq %rax
    popq %rdx
    cmpl $2, %ecx
    je 2f
    ja 4f
    outb %al, %dx
    jmp 9f
2:  outw %ax, %dx
    jmp 9f
4:  outl %eax, %dx
9:  call stamp
    movq %rax, %r11
    ret
