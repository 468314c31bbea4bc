# A boot sector that writes pseudo-random words to pseudo-random pages from 1 to 15 MiB, 64 of them with every timer
# tick, and now and then fills a whole page with zeros. No operating system, a second to boot, and memory that differs
# at any two instants.
#
#   as --32 scribbler.S -o scribbler.o && ld -m elf_i386 -Ttext 0x7c00 --oformat binary scribbler.o -o scribbler.bin
.code16
.globl _start
_start:
    jmp begin
    .balign 4
seed:                           # at byte 4: the test puts its own here
    .long 1
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
    mov %bx, %ds
    mov %bx, %es
    and $0xfe, %al
    mov %eax, %cr0
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %es
    cld
    mov seed, %ebx
    sti
tick:
    hlt
    mov $64, %dx
write:
    imul $1664525, %ebx, %ebx
    add $1013904223, %ebx
    mov %ebx, %edi
    shr $8, %edi
    and $0xfffffc, %edi
    cmp $0x100000, %edi
    jb next
    cmp $0xeff000, %edi
    jae next
    test $0x1f, %bl
    jz zeros
    mov %ebx, %es:(%edi)
    jmp next
zeros:
    and $0xfff000, %edi
    xor %eax, %eax
    mov $1024, %ecx
    addr32 rep stosl
next:
    dec %dx
    jnz write
    jmp tick
    .org 510
    .word 0xaa55
