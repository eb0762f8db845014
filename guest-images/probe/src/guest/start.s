# From the PVH entry (32-bit, paging off) and from the SIPI (16-bit) to ring 3.
#
# Everything here runs at ring 0, which some hosts emulate instruction by instruction and not completely: so the
# tables are laid out by the assembler, and the code only loads them and leaves.

.set SELECTOR_CODE32, 0x08
.set SELECTOR_DATA,   0x10
.set SELECTOR_CODE64, 0x18
.set SELECTOR_USER_DATA, 0x23
.set SELECTOR_USER_CODE, 0x2b
.set SELECTOR_TSS,    0x30
.set MAX_CPUS, 64
# The I/O bitmap: 65536 bits and one byte of ones.
.set TSS_BYTES, 0x68 + 8193
# Present, writable, user, and already accessed and dirty, so that the processor never writes to the tables.
.set TABLE_FLAGS, 0x67
.set LARGE_PAGE_FLAGS, 0xe7

.section .note.Xen, "a", @note
.balign 4
    .long 4, 8, 18              # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_start

.section .text.start, "ax"
.code32
.global pvh_start
pvh_start:
    cli
    cld
    mov dword ptr [start_info], ebx
    lgdt [gdt_pointer]
    xor ebp, ebp
    jmp enter_code32

# ebp holds the number of the vCPU from here on.
enter_code32:
    ljmp SELECTOR_CODE32, offset code32
code32:
    mov eax, SELECTOR_DATA
    mov ds, eax
    mov es, eax
    mov ss, eax

    # No interrupt is ever enabled, and an exception is meant to be a triple fault.
    lidt [idt_pointer]

    mov eax, cr4
    or eax, 0x620               # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xc0000080         # EFER.LME
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffff3         # not CD, NW, EM, TS
    or eax, 0x80010023          # PG, WP, NE, MP, PE
    mov cr0, eax
    ljmp SELECTOR_CODE64, offset code64

.code64
code64:
    # One TSS serves all: nothing ever comes back to ring 0 to use its stacks. Only the descriptors are each vCPU's own,
    # because loading one marks it busy.
    mov ecx, ebp
    shl ecx, 4
    mov eax, offset tss
    mov word ptr [rcx + gdt_tss + 2], ax
    shr eax, 16
    mov byte ptr [rcx + gdt_tss + 4], al
    mov byte ptr [rcx + gdt_tss + 7], ah
    lea eax, [rcx + SELECTOR_TSS]
    ltr ax

    mov eax, SELECTOR_USER_DATA
    mov ds, eax
    mov es, eax
    mov rdx, qword ptr [next_stack]
    mov rsp, rdx
    push SELECTOR_USER_DATA
    push rdx
    push 0x3002                 # IOPL 3 where it takes; elsewhere the I/O bitmap lets ports through
    push SELECTOR_USER_CODE
    mov eax, offset ring3
    push rax
    iretq

ring3:
    mov edi, ebp
    xor ebp, ebp
    call ring3_main
    ud2

# Copied below 1 MiB, where a vCPU wakes up in real mode with this as offset 0 of its code segment.
.code16
.global ap_trampoline
ap_trampoline:
    cli
    cld
    .byte 0x2e, 0x66, 0x0f, 0x01, 0x16      # lgdt cs:[...], 32-bit base
    .word ap_gdt_pointer - ap_trampoline
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea                        # far jump with a 32-bit offset
    .long ap_code32
    .word SELECTOR_CODE32
ap_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
.global ap_trampoline_end
ap_trampoline_end:

.code32
ap_code32:
    mov eax, SELECTOR_DATA
    mov ds, eax
    mov ebp, dword ptr [next_cpu]
    jmp code32

.code64

.section .data.start, "aw"
.balign 4096
# The first GiB, one to one; the Rust code maps the rest of the memory before it uses it.
.global boot_pml4
boot_pml4:
    .quad boot_pdpt + TABLE_FLAGS
    .fill 511, 8, 0
.global boot_pdpt
boot_pdpt:
    .quad boot_pd + TABLE_FLAGS
    .fill 511, 8, 0
boot_pd:
    .set address, 0
    .rept 512
    .quad address + LARGE_PAGE_FLAGS
    .set address, address + 0x200000
    .endr

.balign 16
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff    # 0x08 code, 32 bit
    .quad 0x00cf93000000ffff    # 0x10 data
    .quad 0x00af9b000000ffff    # 0x18 code, 64 bit
    .quad 0x00cff3000000ffff    # 0x20 user data
    .quad 0x00affb000000ffff    # 0x28 user code, 64 bit
gdt_tss:
    .rept MAX_CPUS
    .word TSS_BYTES - 1
    .word 0
    .byte 0, 0x89, 0, 0
    .quad 0
    .endr
gdt_end:

gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
idt_pointer:
    .word 0
    .long 0

.balign 16
tss:
    .fill 0x66, 1, 0
    .word 0x68                  # the I/O bitmap begins here
    .fill 8192, 1, 0
    .byte 0xff

.balign 8
.global start_info
start_info:
    .quad 0
.global next_stack
next_stack:
    .quad boot_stack_top
.global next_cpu
next_cpu:
    .quad 0

.section .bss.start, "aw", @nobits
.balign 16
    .skip 65536
boot_stack_top:
