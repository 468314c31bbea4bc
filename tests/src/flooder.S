# A boot sector that adds one to a word of every page from 1 to 192 MiB, over and over: a guest whose memory changes faster than
# anybody copies it. It needs 200 MiB of RAM.
#
#   as --32 flooder.S -o flooder.o && ld -m elf_i386 -Ttext 0x7c00 --oformat binary flooder.o -o flooder.bin
.code16
.globl _start
_start:
    jmp begin
    .balign 4
gdt:
    .quad 0
    .quad 0x00cf92000000ffff    # flat data
gdtr:
    .word gdtr - gdt - 1
    .long gdt
begin:
    cli
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %ss
    mov $0x7000, %sp
    in $0x92, %al               # A20
    or $2, %al
    out %al, $0x92
    lgdtl gdtr
    mov %cr0, %eax              # into protected mode and back: segments keep their limit of 4 GiB
    or $1, %al
    mov %eax, %cr0
    mov $8, %bx
    mov %bx, %es
    and $0xfe, %al
    mov %eax, %cr0
walk:
    mov $0x100000, %edi
page:
    incl %es:(%edi)
    add $0x1000, %edi
    cmp $0xc000000, %edi
    jb page
    jmp walk
    .org 510
    .word 0xaa55
