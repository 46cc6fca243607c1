# From real mode to long mode.  Every CPU takes this road: CPU 0 from boot.s, the others from the
# start-up IPI, whose vector makes CS:IP the first byte of the payload too.

.set SELECT_CODE32, 8
.set SELECT_DATA, 16
.set SELECT_CODE64, 24
.set SIPI_VECTOR, CODE_BASE >> 12

.set MSR_APIC_BASE, 0x1b
.set APIC_BASE_BSP, 0x100
.set MSR_EFER, 0xc0000080
.set EFER_LME, 0x100

.set PTE_TABLE, 0x23                # present, writable, accessed
.set PTE_2M, 0xe3                   # present, writable, accessed, dirty, large
.set PD_COUNT, 4                    # 4 GiB

.set APIC_SVR, 0xfee000f0
.set APIC_ICR, 0xfee00300
.set ICR_INIT_OTHERS, 0xc4500
.set ICR_SIPI_OTHERS, 0xc4600 | SIPI_VECTOR
.set INIT_TICKS, 1 << 25            # >= 8 ms up to 4 GHz: INIT to SIPI
.set SIPI_TICKS, 1 << 30            # >= 0.25 s: until the second SIPI
.set GIVE_UP_TICKS, 1 << 34         # >= 4 s: until we go on with the CPUs that came

.set FW_CFG_SELECT, 0x510
.set FW_CFG_DATA, 0x511
.set FW_CFG_NB_CPUS, 5

.section .payload, "ax"
.code16
entry:
    cli
    cld
    movw %cs, %ax
    movw %ax, %ds
    inb $0x92, %al                  # A20 on, without touching the fast reset in bit 0
    orb $2, %al
    andb $0xfe, %al
    outb %al, $0x92
    lgdtl gdt_pointer - CODE_BASE
    movl %cr0, %eax
    andl $0x9fffffff, %eax          # caches on: CD and NW are set after reset
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $SELECT_CODE32, $entry32

.code32
entry32:
    movl $SELECT_DATA, %eax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $MSR_APIC_BASE, %ecx
    rdmsr
    movl %eax, %esi
    andl $APIC_BASE_BSP, %esi       # esi != 0: CPU 0
    jz 1f
    movl $(BLOCKS + STACK_END), %esp
    movl $TABLES, %edi
    call build_tables
    movl $(TABLES + HIGH_OFFSET), %edi
    call build_tables
1:  movl %cr4, %eax
    orl $0x20, %eax                 # PAE
    movl %eax, %cr4
    movl $TABLES, %eax
    movl %eax, %cr3
    movl $MSR_EFER, %ecx
    rdmsr
    orl $EFER_LME, %eax
    wrmsr
    movl %cr0, %eax
    orl $0x80000000, %eax
    movl %eax, %cr0
    ljmp $SELECT_CODE64, $entry64

# Identity map of the first 4 GiB by 2 MiB pages at edi: PML4, PDPT, PD_COUNT PDs.  Flags that the
# CPU would set (accessed, dirty) are set already, so that it never writes to the tables.
build_tables:
    movl %edi, %edx
    movl $(0x2000 / 4), %ecx
    xorl %eax, %eax
    rep stosl
    leal 0x1000 + PTE_TABLE(%edx), %eax
    movl %eax, (%edx)
    leal 0x2000 + PTE_TABLE(%edx), %eax
    xorl %ecx, %ecx
1:  movl %eax, 0x1000(%edx, %ecx, 8)
    addl $0x1000, %eax
    incl %ecx
    cmpl $PD_COUNT, %ecx
    jb 1b
    movl $PTE_2M, %eax
2:  movl %eax, (%edi)
    movl $0, 4(%edi)
    addl $8, %edi
    addl $0x200000, %eax
    jnc 2b                          # carry: 4 GiB are mapped
    ret

.code64
entry64:
    testl %esi, %esi
    jz start_other

    # CPU 0.  The second copy of the code, then the header: `boots` counts on over a reset.
    movzwl %bx, %ebx
    movl $CODE_BASE, %esi
    movl $(CODE_BASE + HIGH_OFFSET), %edi
    movl $payload_quads, %ecx
    rep movsq
    xorl %r12d, %r12d
    movq magic(%rip), %rax
    cmpq %rax, HEADER + H_MAGIC
    jne 1f
    movl HEADER + H_BOOTS, %r12d
1:  movl $HEADER, %edi
    movl $(0x1000 / 8), %ecx
    xorl %eax, %eax
    rep stosq
    incl %r12d
    movl %r12d, HEADER + H_BOOTS
    movl %ebx, HEADER + H_BOOTED_BY
    movl $LAYOUT_VERSION, HEADER + H_VERSION
    movl $STATE_BOOTING, HEADER + H_STATE
    movl $1, HEADER + H_NEXT_INDEX
    call stamp
    movq %rax, HEADER + H_ENTRY_TSC

    movw $FW_CFG_SELECT, %dx
    movw $FW_CFG_NB_CPUS, %ax
    outw %ax, %dx
    movw $FW_CFG_DATA, %dx
    xorl %eax, %eax
    inb %dx, %al
    movl %eax, %ecx
    inb %dx, %al
    shll $8, %eax
    orl %ecx, %eax
    cmpl $MAX_CPUS, %eax
    jbe 1f
    movl $MAX_CPUS, %eax
1:  movl %eax, HEADER + H_EXPECTED

    xorl %r15d, %r15d
    call start_cpu
    movl $1, HEADER + H_LIVE
    cmpl $1, HEADER + H_EXPECTED
    jbe 1f

    # INIT, start-up IPI, and a second one for CPUs that missed it.  One that is already up
    # ignores the second.
    movl $APIC_SVR, %edi
    movl $0x1ff, (%rdi)
    movl $APIC_ICR, %edi
    movl $ICR_INIT_OTHERS, (%rdi)
    movl $INIT_TICKS, %ecx
    call wait_for_others
    movl $ICR_SIPI_OTHERS, (%rdi)
    movl $SIPI_TICKS, %ecx
    call wait_for_others
    movl HEADER + H_LIVE, %eax
    cmpl HEADER + H_EXPECTED, %eax
    jae 1f
    movl $ICR_SIPI_OTHERS, (%rdi)
    movq $GIVE_UP_TICKS, %rcx
    call wait_for_others

1:  movq magic(%rip), %rax
    movq %rax, HEADER + H_MAGIC
    call stamp
    movq %rax, HEADER + H_READY_TSC
    movl $STATE_READY, HEADER + H_STATE
    movq %rax, %rbx
    jmp loop_first

# Another CPU takes the next index; more than there are blocks for sleep for good.
start_other:
    movl $1, %r15d
    lock xaddl %r15d, HEADER + H_NEXT_INDEX
    cmpl $MAX_CPUS, %r15d
    jb 1f
0:  hlt
    jmp 0b
1:  movl %r15d, %ebp
    imull $BLOCK_SIZE, %ebp
    leaq BLOCKS + STACK_END(%rbp), %rsp
    call start_cpu
    lock incl HEADER + H_LIVE
    call stamp
    movq %rax, %rbx
    jmp loop_other

# The registers and the block of CPU r15d, everything placed low.
start_cpu:
    popq %r8
    movl %r15d, %ebp
    imull $BLOCK_SIZE, %ebp
    addl $BLOCKS, %ebp
    leaq STACK_END(%rbp), %rsp
    xorl %r13d, %r13d
    movl $CPU_ALIVE, %r14d
    call clear_block
    movl $DEFAULT_THRESHOLD, %esi
    call reset_statistics
    movq %r14, HEADER + H_CPU(, %r15, 8)
    jmpq *%r8

# Until every expected CPU is live or rcx ticks have passed.
wait_for_others:
    call stamp
    leaq (%rax, %rcx), %r8
1:  movl HEADER + H_LIVE, %eax
    cmpl HEADER + H_EXPECTED, %eax
    jae 2f
    call stamp
    cmpq %r8, %rax
    jb 1b
2:  ret

.balign 8
magic:
    .ascii "QMPPULSE"
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        # 32-bit code
    .quad 0x00cf93000000ffff        # data
    .quad 0x00af9b000000ffff        # 64-bit code
gdt_pointer:
    .word . - gdt - 1
    .long gdt
