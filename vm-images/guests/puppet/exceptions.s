# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Exceptions and INT n: each is counted, and the last exception described, in the mailbox. Traps and INT n go on where
# they came; a fault ends the snippet. At home there are none: one that comes there is told, and the vCPU halts.

	.include "contract.inc"

	.equ TRAPS,		1 << 1 | 1 << BREAKPOINT | 1 << 4	# #DB, #BP, #OF
	.equ STUB_SIZE,		16
	.equ RFLAGS_TF,		8		# these two are numbers of bits
	.equ RFLAGS_IF,		9
	.equ DR6_AT_REST,	0xffff0ff0

	# The stack of a handler: two registers, what the stub pushed, what the CPU pushed.
	.equ SAVED,		16
	.equ FRAME_VECTOR,	SAVED
	.equ FRAME_ERROR,	SAVED + 8
	.equ FRAME_RIP,		SAVED + 16
	.equ FRAME_RFLAGS,	SAVED + 32
	.equ FRAME_RSP,		SAVED + 40

	.macro tell_of from, slot
	mov \from, %rcx
	mov %rcx, %gs:\slot
	.endm

	.section .low, "ax"
	.code64
	.balign STUB_SIZE
stubs:
	.set vector, 0
	.rept VECTORS
	.balign STUB_SIZE
	.if vector >= EXCEPTIONS || !(HAVE_ERROR_CODE >> vector & 1)
	push $0
	.endif
	push $vector
	jmp handle
	.set vector, vector + 1
	.endr

handle:
	push %rax
	push %rcx
	mov FRAME_VECTOR(%rsp), %eax
	incl %gs:COUNTS(, %eax, 4)
	cmp $EXCEPTIONS, %eax
	jae 2f
	incq %gs:EXCEPTIONS_SEEN
	mov %rax, %gs:VECTOR
	tell_of FRAME_ERROR(%rsp), ERROR_CODE
	tell_of FRAME_RIP(%rsp), FAULT_RIP
	tell_of %cr2, FAULT_CR2
	tell_of %dr6, FAULT_DR6
	mov $DR6_AT_REST, %ecx
	mov %rcx, %dr6
	cmpl $0, %gs:IN_SNIPPET
	je fatal
	mov $TRAPS, %ecx
	bt %eax, %ecx
	jc 2f
	mov $finish, %ecx
	mov %rcx, FRAME_RIP(%rsp)
	mov %gs:SELF, %ecx
	add $STACKS - MAILBOXES + PAGE_SIZE, %ecx
	mov %rcx, FRAME_RSP(%rsp)
	btrl $RFLAGS_TF, FRAME_RFLAGS(%rsp)
	btsl $RFLAGS_IF, FRAME_RFLAGS(%rsp)
2:	pop %rcx
	pop %rax
	add $16, %rsp
	iretq

fatal:
	mov %gs:SELF, %esi
	add $TOLD, %esi
	mov $line_fatal, %ebx
	call say64
	jmp halt

	.data
line_fatal:
	.ascii "fatal: vcpu "
	.byte DECIMAL, INDEX - TOLD
	.ascii " exception "
	.byte DECIMAL, VECTOR - TOLD
	.ascii " at "
	.byte HEX, FAULT_RIP - TOLD, END

	.macro gate handler
	.word \handler, CODE64, DPL0, 0	# handlers are below 64 KiB
	.long 0, 0
	.endm

	.balign 8
	.globl idt, idtr, other_idtr
idt:
	.set vector, 0
	.rept VECTORS
	.if vector == TIMER
	gate timer
	.elseif vector == SPURIOUS
	gate spurious
	.else
	gate "stubs + vector * STUB_SIZE"
	.endif
	.set vector, vector + 1
	.endr
idt_end:

# The second has another limit, of which no vector makes use.
idtr:
	.word idt_end - idt - 1
	.long idt, 0
	.balign 8
other_idtr:
	.word idt_end - idt + SYSTEM_DESCRIPTOR - 1
	.long idt, 0
	.skip SYSTEM_DESCRIPTOR
