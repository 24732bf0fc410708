# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Where a vCPU is while it has no snippet to run, and the way into a snippet and back.

	.include "contract.inc"
	.include "boot.inc"

	.equ ALIVE_SHIFT,	5		# 32 ticks between two lines that tell of a vCPU at home

	.macro load register, slot
	mov %gs:IN + \slot, %\register
	.endm

	.macro store register, slot
	mov %\register, %gs:OUT + \slot
	.endm

# RSP stays the guest's own.
	.macro general_registers do
	\do rax, RAX
	\do rbx, RBX
	\do rcx, RCX
	\do rdx, RDX
	\do rsi, RSI
	\do rdi, RDI
	\do rbp, RBP
	\do r8, R8
	\do r9, R9
	\do r10, R10
	\do r11, R11
	\do r12, R12
	\do r13, R13
	\do r14, R14
	\do r15, R15
	.endm

	.macro tick_each milliseconds
	mov $LAPIC, %eax
	movl $\milliseconds * TICKS_PER_MS, LAPIC_TIMER_COUNT(%eax)
	.endm

	.section .low, "ax"
	.code64
	.globl home, finish

home:
	mov %gs:GO, %rax
	cmp %rax, %gs:DONE
	jne run
	mov %gs:TICKS, %rax
	shr $ALIVE_SHIFT, %rax
	cmp %eax, %gs:ALIVE
	je 1f
	mov %eax, %gs:ALIVE
	mov %gs:SELF, %esi
	add $TOLD, %esi
	mov $line_alive, %ebx
	call say64
1:	hlt					# until the next tick
	jmp home

run:
	mov %rax, %gs:TAKEN
	mov %gs:SELF, %edi
	add $RESULTS, %edi
	mov $(OUT - RESULTS) / 8, %ecx
	xor %eax, %eax
	rep stosq
	movl $1, %gs:IN_SNIPPET
	tick_each IN_SNIPPET_MS
	general_registers load
	call *%gs:ENTRY
# A snippet ends here, by its RET or by a fault.
finish:
	general_registers store
	store rsp, RSP
	pushfq
	popq %gs:OUT + RFLAGS
	cld
	tick_each HOME_MS
	movl $0, %gs:IN_SNIPPET
	mov %gs:TAKEN, %rax
	mov %rax, %gs:DONE
	jmp home

	.globl say64
	serial 64, r

	.data
	serial_data "puppet: "
line_alive:
	.ascii "vcpu "
	.byte DECIMAL, INDEX - TOLD
	.ascii " alive "
	.byte DECIMAL, ALIVE - TOLD, END
