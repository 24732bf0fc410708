# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Exceptions. Without virtualization below, the hypercall instruction is an undefined opcode: it is skipped, so that the
# guest walks on any machine. Every other exception is a fault of ours: the vCPU tells it and halts.
#
# Three tables: for real mode, for protected mode (virtual-8086 included), for long mode.

	.include "contract.inc"

	.equ HYPERCALL_SIZE,	3

	.equ STUB_SIZE,		4
	.equ DPL3,		0xee00

	.section .low, "ax"
	.globl idtr_real, idtr_32, idtr_64

# A short jump, in any mode.
	.macro jmp8 target
	.byte 0xeb, \target - . - 1
	.endm

# One stub for each vector, the same four bytes in any mode.
	.macro stubs target
	.set vector, 0
	.rept EXCEPTIONS
	mov $vector, %dl
	jmp8 \target
	.set vector, vector + 1
	.endr
	.endm

# With the vector in DL and the stack at the instruction pointer: leave a note in the record, say it, stop.
	.macro tell width, load_eip
	movzbl %dl, %edx
	mov %edx, EXCEPTION(%esi)
	\load_eip (%esp), %eax
	mov %eax, EXCEPTION_EIP(%esi)
	mov $line_exception, %ebx
	call say\width
1:	hlt
	jmp 1b
	.endm

# Real mode does not clear CS.D on the way to a handler, so it may be left from big real mode. What 16-bit code reads as
# TEST AX, 0 and a jump, 32-bit code reads as one TEST EAX, IMM32.
	.macro if_16_bit target
	.byte 0xa9, 0, 0
	jmp8 \target
	.endm

skip_real:
	if_16_bit 1f
	.code32
	addw $HYPERCALL_SIZE, (%esp)
	iretw
	.code16
1:	addw $HYPERCALL_SIZE, (%esp)
	iretw

stubs_real:
	stubs unexpected_real
unexpected_real:
	if_16_bit 2f
	.code32
	tell 32, movzwl
	.code16
2:	tell 16, movzwl

	.code32
skip_32:
	addl $HYPERCALL_SIZE, (%esp)
	iret

stubs_32:
	stubs unexpected_32
unexpected_32:
	mov $DATA32, %eax			# virtual-8086 mode leaves a null segment
	mov %eax, %ds
	movzbl %dl, %edx
	mov $HAVE_ERROR_CODE, %eax
	bt %edx, %eax
	jnc 2f
	add $4, %esp
2:	tell 32, movl

	.code64
skip_64:
	addq $HYPERCALL_SIZE, (%rsp)
	iretq

stubs_64:
	stubs unexpected_64
unexpected_64:
	movzbl %dl, %edx
	mov $HAVE_ERROR_CODE, %eax
	bt %edx, %eax
	jnc 2f
	add $8, %rsp
2:	tell 64, movl

line_exception:
	.ascii "vcpu "
	.byte DECIMAL, INDEX
	.ascii " exception "
	.byte DECIMAL, EXCEPTION
	.ascii " at "
	.byte HEX, EXCEPTION_EIP, END

	.macro gate_real handler
	.word \handler - CODE16_BASE, CODE16
	.endm

	.macro gate_32 handler, type=DPL0
	.word \handler, CODE32, \type, 0	# handlers are below 64 KiB
	.endm

	.macro gate_64 handler
	.word \handler, CODE64, DPL0, 0
	.long 0, 0
	.endm

# The gates of the exceptions: `gate` to the stubs, but for the opcode that is skipped.
	.macro exceptions gate, stubs, skip
	.set vector, 0
	.rept EXCEPTIONS
	.if vector == UNDEFINED_OPCODE
	\gate \skip
	.else
	\gate "\stubs + vector * STUB_SIZE"
	.endif
	.set vector, vector + 1
	.endr
	.endm

	.macro idtr table, end
	.word \end - \table - 1
	.long \table
	.endm

	.balign 8
idt_real:
	exceptions gate_real, stubs_real, skip_real
idt_real_end:

	.balign 8
idt_32:
	exceptions gate_32, stubs_32, skip_32
	gate_32 vm86_write_crs, DPL3
	gate_32 vm86_leave, DPL3
	gate_32 timer
	.rept SPURIOUS - TIMER
	gate_32 spurious
	.endr
idt_32_end:

	.balign 8
idt_64:
	exceptions gate_64, stubs_64, skip_64
idt_64_end:

idtr_real:
	idtr idt_real, idt_real_end
idtr_32:
	idtr idt_32, idt_32_end
idtr_64:
	idtr idt_64, idt_64_end
