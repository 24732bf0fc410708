# SPDX-License-Identifier: LGPL-2.1-or-later
#
# The snippets, as functions: they are called with the registers that the host has put into the mailbox, and may change
# all of them. The instruction that a snippet is about is its first one, so that the snippet's address is the RIP of what
# happens there.

	.include "contract.inc"
	.include "boot.inc"

	.equ MSR_LSTAR,		0xc0000082
	.equ HYPERCALL,		34
	.equ HYPERCALL_EVENT,	24
	.equ MARK,		0x600d		# what code in a page of its own leaves in EAX
	.equ RFLAGS_TF,		1 << 8

	.macro snippet name
	.globl do_\name
do_\name:
	.endm

# A snippet of one instruction.
	.macro one name, instruction:vararg
	snippet \name
	\instruction
	ret
	.endm

# A snippet that makes an instruction R15 times, if the host does not say stop before; `swap`: what gives it another
# operand each time.
	.macro loop_of name, instruction, swap:vararg
	snippet loop_\name
1:	\instruction
	\swap
	incq %gs:PROGRESS
	dec %r15
	jz 2f
	cmpq $0, %gs:STOP
	je 1b
2:	ret
	.endm

	.section .snippets, "ax"
	.code64

	one nop, nop
	one ud2, ud2
	one divide, div %ecx
	one int3, int3
	one int_3, .byte 0xcd, BREAKPOINT	# the same vector in two bytes
	one int_n, int $INTERRUPTS
	one vmcall, vmcall
	one vmmcall, vmmcall
	one cpuid, cpuid
	one hlt, hlt
	one out, out %al, %dx

	one wrmsr, wrmsr
	one rdmsr, rdmsr
	one xsetbv, xsetbv
	one xgetbv, xgetbv
	one mov_to_cr0, mov %rax, %cr0
	one mov_to_cr3, mov %rax, %cr3
	one mov_to_cr4, mov %rax, %cr4
	one mov_from_cr0, mov %cr0, %rax
	one mov_from_cr3, mov %cr3, %rax
	one mov_from_cr4, mov %cr4, %rax

	one lidt, lidt (%rsi)
	one lgdt, lgdt (%rsi)
	one lldt, lldt %ax
	one ltr, ltr %ax
	one sidt, sidt (%rsi)
	one sgdt, sgdt (%rsi)
	one sldt, sldt %eax
	one str, str %eax
	one load_ds, mov %eax, %ds

	one read8, mov (%rsi), %al
	one read64, mov (%rsi), %rax
	one write8, mov %al, (%rsi)
	one write64, mov %rax, (%rsi)
	one lock_add, lock addq %rax, (%rsi)
	one lock_cmpxchg, lock cmpxchg %rcx, (%rsi)
	one xchg, xchg %rax, (%rsi)
	one rep_movsb, rep movsb
	one rep_stosq, rep stosq
	one read_sse, movdqu (%rsi), %xmm0
	one write_sse, movdqu %xmm0, (%rsi)
	one read_avx, vmovdqu (%rsi), %ymm0
	one write_avx, vmovdqu %ymm0, (%rsi)
	one read_x87, fldl (%rsi)
	one fninit, fninit
	one call, call *%rsi
	one invlpg, invlpg (%rsi)

# Nothing of its own wakes it up: its timer has stopped, and interrupts are off.
	.globl asleep
	snippet sleep
	cli
	mov $LAPIC, %eax
	movl $0, LAPIC_TIMER_COUNT(%eax)
	hlt
asleep:	ret

# RFLAGS, as the guest sees it.
	snippet pushf
	pushfq
	pop %rax
	ret

# With AX into SS comes the shadow in which the next instruction takes no trap.
	snippet mov_ss
	mov %eax, %ss
	nop
	nop
	ret

# Eight instructions in a row.
	snippet nops
	.rept 8
	nop
	.endr
	ret

# The guest steps itself. The trap comes after each instruction that begins with TF set: all from the first NOP on to the
# second POPF.
	.globl STEPS
	.equ STEPS,		8 + 3
	snippet step
	pushfq
	orl $RFLAGS_TF, (%rsp)
	popfq
	.rept 8
	nop
	.endr
	pushfq
	andl $~RFLAGS_TF, (%rsp)
	popfq
	ret

# The KVMI hypercall, whose event tells the host that what R14 points to is about to begin; then that.
	snippet announced
	push %rax
	push %rdi
	mov $HYPERCALL, %eax
	mov $HYPERCALL_EVENT, %edi
	call hypercall
	pop %rdi
	pop %rax
	jmp *%r14

hypercall:
	cmpl $0, %gs:USES_VMMCALL
	jne 1f
	vmcall
	ret
1:	vmmcall
	ret

# Until the host says stop.
	snippet spin
1:	incq %gs:PROGRESS
	pause
	cmpq $0, %gs:STOP
	je 1b
	ret

# Every kind of event in turn, until the host says stop. The host gives in RSI a byte to write to; CPUs without XSAVE are
# not for this. XCR0 is written three times: the same value, x87 alone, and what it was.
	snippet storm
	xor %ecx, %ecx
	xgetbv
	mov %eax, %r8d
	mov %cr3, %r9
	xor %ebx, %ebx
1:	xor $PAGE_SIZE, %r9
	mov %r9, %cr3
	inc %ebx
	mov %ebx, %eax
	xor %edx, %edx
	mov $MSR_LSTAR, %ecx
	wrmsr
	mov $HYPERCALL, %eax
	mov $HYPERCALL_EVENT, %edi
	call hypercall
	int3
	xor %ecx, %ecx
	xor %edx, %edx
	mov %r8d, %eax
	xsetbv
	mov $1, %eax
	xsetbv
	mov %r8d, %eax
	xsetbv
	mov %bl, (%rsi)
	incq %gs:PROGRESS
	cmpq $0, %gs:STOP
	je 1b
	mov $root, %eax
	mov %rax, %cr3
	ret

	loop_of nop, nop
	loop_of int3, int3
	loop_of vmcall, "mov $HYPERCALL, %eax; vmcall"
	loop_of vmmcall, "mov $HYPERCALL, %eax; vmmcall"
	loop_of cpuid, cpuid
	loop_of out, "out %al, %dx"
	loop_of wrmsr, wrmsr, xchg %rax, %rbx
	loop_of xsetbv, xsetbv, xchg %rax, %rbx
	loop_of mov_to_cr3, "mov %rax, %cr3", xchg %rax, %rbx
	loop_of lidt, "lidt (%rsi)", xchg %rsi, %rdi
	loop_of write64, "mov %rax, (%rsi)"
	loop_of read64, "mov (%rsi), %rax"

# Code in a page of its own.
	.globl own_page
	.balign PAGE_SIZE
own_page:
	mov $MARK, %eax
	ret

# An instruction of ten bytes of which three are in the first of two pages.
	.balign PAGE_SIZE
	.skip PAGE_SIZE - 3
	snippet straddle
	movabs $0x1122334455667788, %rax
	ret
	.balign PAGE_SIZE
