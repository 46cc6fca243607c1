# The two ways in.  Both bring the payload to CODE_BASE and jump to its first byte in real mode
# with CS = CODE_BASE >> 4 and BX = how we came.

.section .boot, "ax"
.code16

# Boot sector, loaded by the BIOS at 0:7c00, DL = drive.  Interrupts stay on for INT 13h.
.globl boot
boot:
    ljmp $0, $1f                    # some firmware enters at 07c0:0000
1:  xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %ss
    movw $0x7c00, %sp
    movw $disk_packet, %si
    movb $0x42, %ah                 # extended read: payload to CODE_BASE
    int $0x13
    jc failed
    movw $BY_DISK, %bx
    ljmp $(CODE_BASE >> 4), $0
failed:
    cli
    hlt
    jmp failed

.balign 4
disk_packet:
    .byte 16, 0
    .word payload_sectors
    .word 0, CODE_BASE >> 4
    .quad 1
.org 510
    .word 0xaa55

# Reset vector.  CS base is 0xffff0000 and IP = offset in the image, the image being the last
# 64 KiB below 4 GiB.  No memory below is used before the copy.
.section .rom, "ax"
.code16
rom_entry:
    cli
    cld
    movw $(CODE_BASE >> 4), %ax
    movw %ax, %es
    xorw %di, %di
    movw $0x200, %si
    movw $payload_size, %cx
    rep movsb %cs:(%si), %es:(%di)
    movw $BY_ROM, %bx
    ljmp $(CODE_BASE >> 4), $0
.org 0xf0
    jmp rom_entry
.org 0x100
