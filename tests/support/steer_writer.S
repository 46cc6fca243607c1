/* A BIOS of 64 KiB for `-machine pc`: CPU 0 opens and closes RAM at 0xf0000 for ever, all others write
 * one word of each page from 1 MiB to END.  It runs in the ROM below 4 GiB, which is always there.
 *
 * The descriptors have their accessed bits: the processor cannot write them there.
 *
 * At 0x9000: toggles done; at 0x9004: passes over the memory.
 */
#define BASE 0xffff0000
        .code16
        .globl start
start:
        cli
        cs lgdtl (gdt_at - start)
        movl %cr0, %eax
        orl $1, %eax
        movl %eax, %cr0
        ljmpl $8, $first

        .code32
first:
        movw $16, %ax
        movw %ax, %ds
        movw %ax, %es
        movw %ax, %ss
        movl $0x7000, %esp
        movl $trampoline, %esi
        movl $0x8000, %edi
        movl $(trampoline_end - trampoline), %ecx
        cld
        rep movsb
        movl $0xc4500, 0xfee00300       /* INIT to all but this one */
        movl $100000, %ecx
1:      loop 1b
        movl $0xc4608, 0xfee00300       /* SIPI: 0x8000 */
toggle:
        movb $0x30, %al
        call pam
        xorb %al, %al
        call pam
        incl 0x9000
        jmp toggle
pam:
        movb %al, %bl
        movw $0xcf8, %dx
        movl $0x80000058, %eax
        outl %eax, %dx
        movw $0xcfd, %dx
        movb %bl, %al
        outb %al, %dx
        movl $50, %ecx
1:      loop 1b
        ret

writer:
        movw $16, %ax
        movw %ax, %ds
pass:
        movl $0x100000, %edi
1:      incl (%edi)
        addl $4096, %edi
        cmpl $END, %edi
        jb 1b
        lock incl 0x9004
        jmp pass

        .code16
trampoline:
        cli
        xorw %ax, %ax
        movw %ax, %ds
        lgdtl 0x8000 + gdt_copy - trampoline
        movl %cr0, %eax
        orl $1, %eax
        movl %eax, %cr0
        ljmpl $8, $writer
gdt_copy:
        .word 23
        .long gdt
trampoline_end:
        .balign 8
gdt:
        .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_at:
        .word 23
        .long gdt
        .org 0xfff0
        jmp start
        .org 0x10000
