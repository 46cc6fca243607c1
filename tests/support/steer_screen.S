/* A BIOS of 64 KiB for `-machine pc -device VGA`: CPU 0 opens and closes SMRAM over the window of VGA
 * for ever, CPU 1 writes one pixel of each page of the screen, once in each pass.  The screen is 256 by
 * 256 pixels of 8 bits: the 16 pages of the window.  Colours 0 to 63 are shades of grey.
 *
 * At 0x9000: flips done; at 0x9004: passes done, at 0x9008: passes wanted.  At 0x900c: CPU 0 is to
 * stand, with SMRAM closed; at 0x9010: it does, and from 0x9100 on are the pixels of the 16 pages.
 */
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
        movl $modes, %esi               /* docs/specs/standard-vga.rst, the Bochs interface */
1:      movw $0x1ce, %dx
        movw (%esi), %ax
        outw %ax, %dx
        incw %dx
        movw 2(%esi), %ax
        outw %ax, %dx
        addl $4, %esi
        cmpl $modes_end, %esi
        jb 1b
        movw $0x3c8, %dx
        xorl %eax, %eax
        outb %al, %dx
        incw %dx
1:      outb %al, %dx
        outb %al, %dx
        outb %al, %dx
        incl %eax
        cmpl $64, %eax
        jb 1b
        movw $0x3c0, %dx                /* the screen is on */
        movb $0x20, %al
        outb %al, %dx
        movl $0xc4500, 0xfee00300       /* INIT to all but this one */
        movl $100000, %ecx
1:      loop 1b
        movl $0xc4608, 0xfee00300       /* SIPI: 0x8000 */
flip:
        movb $0x4a, %al
        call smram
        movb $0x0a, %al
        call smram
        incl 0x9000
        cmpl $0, 0x900c
        je flip
        movl $0xa0000, %esi
        movl $0x9100, %edi
1:      movb (%esi), %al
        movb %al, (%edi)
        addl $4096, %esi
        incl %edi
        cmpl $0xb0000, %esi
        jb 1b
        movl $1, 0x9010
1:      pause
        cmpl $0, 0x900c
        jne 1b
        movl $0, 0x9010
        jmp flip
smram:
        movb %al, %bl
        movw $0xcf8, %dx
        movl $0x80000070, %eax
        outl %eax, %dx
        movw $0xcfe, %dx
        movb %bl, %al
        outb %al, %dx
        movl $50, %ecx
1:      loop 1b
        ret

writer:
        movw $16, %ax
        movw %ax, %ds
pass:
        pause
        movl 0x9004, %ebx
        cmpl 0x9008, %ebx
        je pass
        incl %ebx
        movl %ebx, %eax
        andb $63, %al
        movl $0xa0000, %edi
1:      movb %al, (%edi)
        movl $10000, %ecx
2:      loop 2b
        addl $4096, %edi
        cmpl $0xb0000, %edi
        jb 1b
        movl %ebx, 0x9004
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
gdt:    /* with their accessed bits: the processor cannot write them here */
        .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_at:
        .word 23
        .long gdt
modes:
        .word 4, 0, 1, 256, 2, 256, 3, 8, 4, 0x41
modes_end:
        .org 0xfff0
        jmp start
        .org 0x10000
