# The smallest firmware that needs what an operating system needs of an accelerator: protected mode, paging, long
# mode. It ends QEMU through isa-debug-exit with 0x31 (exit status 99). Runs at F000:0000, below 4 GiB.
#   as long_mode.S -o long_mode.o && ld -Ttext 0 --oformat binary long_mode.o -o long_mode.bin
        .code16
        .globl _start
_start: cli
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    $0x1000, %di            # page tables at 0x1000, 0x2000, 0x3000
        movw    $0x3000, %cx
        cld
        rep stosb
        movl    $0x2003, 0x1000
        movl    $0x3003, 0x2000
        movl    $0x0083, 0x3000         # the first 2 MiB, one to one
        movl    $0xA0, %eax             # PAE, PGE
        movl    %eax, %cr4
        movl    $0x1000, %eax
        movl    %eax, %cr3
        movl    $0xC0000080, %ecx       # EFER.LME
        rdmsr
        orl     $0x100, %eax
        wrmsr
        movw    $0xF000, %ax
        movw    %ax, %ds
        lgdtl   gdtr
        movl    %cr0, %eax
        orl     $0x80000001, %eax
        movl    %eax, %cr0
        ljmpl   $0x08, $(0xF0000 + long)
        .code64
long:   movb    $0x31, %al
        movw    $0xF4, %dx
        outb    %al, %dx
        hlt
        .align 8
gdt:    .quad 0
        .quad 0x00209A0000000000
gdtr:   .word 15
        .long 0xF0000 + gdt
