# SPDX-License-Identifier: LGPL-2.1-or-later
#
# What a vCPU does at a station, without leaving its mode: the iterations, the pauses between them, the serial lines.
# It is written once and assembled for 16, 32 and 64-bit code: 32-bit operands, addresses without an index into a
# segment and near calls mean the same in all three, as long as the upper halves of the registers are zero.
#
# ESI is the vCPU's record and EBP the number of the station; both stay. All other registers may change.

	.include "contract.inc"

	.equ HELD_LINE,		512		# iterations for each serial line of a held vCPU

# Two writes that change the register, the second of which restores it.
	.macro toggle action, register, mask, r
	testb $\action, ACTIONS(%esi)
	jz 1f
	mov %\register, %\r\()ax
	xor $\mask, %eax
	mov %\r\()ax, %\register
	xor $\mask, %eax
	mov %\r\()ax, %\register
1:
	.endm

	.macro assemble_for width, r, argument
	.code\width
	.globl walk\width, write_crs\width, say\width

walk\width:
	mov %ebp, %eax
	mov %al, AT(%esi)
	cmp %al, WANT(%esi)
	je 1f
	bts %ebp, VISITED(%esi)
	jc 2f
1:	mov $line_station, %ebx
	call say\width
2:
iteration\width:
	testb $DO_HYPERCALL, ACTIONS(%esi)
	jz 3f
	mov $HYPERCALL, %eax
	mov $HYPERCALL_EVENT, %\argument
	cmpb $0, USES_VMMCALL(%esi)
	je 1f
	vmmcall
	jmp 2f
1:	vmcall
2:	mov %eax, RESULT(%esi)
3:
	.if \width == 16
	cmp $STATION_VM86, %ebp
	jne 4f
	testb $DO_CRS, ACTIONS(%esi)
	jz 5f
	int $VM86_WRITE_CRS
	jmp 5f
4:
	.endif
	call write_crs\width
5:	addl $1, ITERATIONS(%esi)
	adcl $0, ITERATIONS + 4(%esi)
	mov %ebp, %eax
	cmp %al, WANT(%esi)
	jne 7f
	testl $HELD_LINE - 1, ITERATIONS(%esi)
	jnz 6f
	mov $line_held, %ebx
	call say\width
	# The pause, at least one write: a vCPU that spins without exits and with interrupts off may be beyond reach.
6:	mov PACE(%esi), %ecx
1:	out %al, $DELAY_PORT
	dec %ecx
	jg 1b
	jmp iteration\width
7:	movb $0, AT(%esi)
	ret

write_crs\width:
	toggle DO_CR3, cr3, PAGE_SIZE, \r
	toggle DO_CR4, cr4, CR4_TSD, \r
	toggle DO_CR0, cr0, CR0_WP, \r
	ret

	serial \width, \r, station_names
	.endm

	.section .low, "ax"

	assemble_for 16, e, ebx
	assemble_for 32, e, ebx
	assemble_for 64, r, edi

	serial_data "modewalk: "
line_station:
	.ascii "vcpu "
	.byte DECIMAL, INDEX
	.ascii " station "
	.byte NAME, END
line_held:
	.ascii "vcpu "
	.byte DECIMAL, INDEX
	.ascii " held "
	.byte NAME
	.ascii " "
	.byte DECIMAL, ITERATIONS, END

	.balign 16
	.equ station_names, . - 16
	.irp name, real16, bigreal, prot16, prot32, vm86, long64, compat16, compat32
	.asciz "\name"
	.balign 16
	.endr
