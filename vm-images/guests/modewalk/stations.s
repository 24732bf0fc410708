# SPDX-License-Identifier: LGPL-2.1-or-later
#
# The stations: each is called in 32-bit protected mode with paging off, goes to its own mode, lets the code of walk.s
# run there, and comes back.

	.include "contract.inc"

	.section .low, "ax"

	.globl station_real16, station_bigreal, station_prot16, station_prot32
	.globl station_vm86, station_long64, station_compat16, station_compat32
	.globl vm86_write_crs, vm86_leave

	# From CODE32 to CODE16 and back. The stack and the data are where they were: every base is 0.
	.macro to_16
	.code32
	ljmp $CODE16, $1f - CODE16_BASE
	.code16
1:	mov $DATA16, %eax
	call set_segments
	.endm

	.macro to_32
	.code16
	ljmpl $CODE32, $1f
	.code32
1:	mov $DATA32, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	.endm

# FS and GS are not used, but without "unrestricted guest" KVM runs real mode on the CPU only if all segments fit.
	.code16
set_segments:
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %fs
	mov %eax, %gs
	mov %eax, %ss
	ret

station_real16:
	to_16
	mov %cr0, %eax
	and $~CR0_PE, %eax
	mov %eax, %cr0
	ljmp $CODE16, $1f - CODE16_BASE
1:	xor %eax, %eax
	call set_segments
	lidt idtr_real
	call walk16
	lidtl idtr_32
	mov %cr0, %eax
	or $CR0_PE, %eax
	mov %eax, %cr0
	to_32
	ret

# CR0.PE goes, CS stays as it was loaded: the D bit of its descriptor is what makes this real mode big.
	.code32
station_bigreal:
	ljmp $BIGREAL, $1f - BIGREAL_BASE
1:	mov %cr0, %eax
	and $~CR0_PE, %eax
	mov %eax, %cr0
	lidt idtr_real
	call walk32
	lidt idtr_32
	mov %cr0, %eax
	or $CR0_PE, %eax
	mov %eax, %cr0
	ljmp $CODE32, $1f
1:	ret

station_prot16:
	to_16
	call walk16
	to_32
	ret

	.code32
station_prot32:
	jmp walk32

# Virtual-8086 mode is entered by IRET and left by INT through the IDT, which lands on the stack that the TSS names:
# this one, as it is now, with the way back on it.
#
# TR is loaded each time, not once: a VMM that reads and writes back all registers leaves it marked busy, as it is, and
# QEMU's emulation of an AMD host aborts when INT finds it so.
station_vm86:
	mov INDEX(%esi), %eax
	lea TSS0(, %eax, 8), %ecx
	andb $~TSS_BUSY, gdt + TSS_BUSY_BYTE(%ecx)
	ltr %cx
	imul $TSS_SIZE, %eax
	mov %esp, TSS + 4(%eax)			# ESP0
	lea -STACK_SIZE / 2(%esp), %eax
	push $0					# GS, FS, DS, ES
	push $0
	push $0
	push $0
	push $0					# SS:ESP
	push %eax
	push $EFLAGS_VM86
	push $CODE16
	push $1f - CODE16_BASE
	iret
	.code16
1:	call walk16
	int $VM86_LEAVE

	.code32
vm86_leave:
	mov $DATA32, %eax
	mov %eax, %ds
	mov %eax, %es
	add $9 * 4, %esp			# what the CPU saved, the same nine words as above
	ret

# CR writes are not for CPL 3: its monitor makes them, here.
vm86_write_crs:
	mov $DATA32, %eax
	mov %eax, %ds
	call write_crs32
	iret

# Long mode begins with paging, and while CS is still a 32-bit segment that is compatibility mode.
enter_long:
	mov $MSR_EFER, %ecx
	rdmsr
	or $EFER_LME, %eax
	wrmsr
	mov %cr0, %eax
	or $CR0_PG, %eax
	mov %eax, %cr0
	lidt idtr_64
	ret

leave_long:
	mov %cr0, %eax
	and $~CR0_PG, %eax
	mov %eax, %cr0
	lidt idtr_32
	mov $MSR_EFER, %ecx
	rdmsr
	and $~EFER_LME, %eax
	wrmsr
	ret

station_long64:
	call enter_long
	ljmp $CODE64, $1f
	.code64
1:	mov %esp, %esp				# the upper halves are undefined after a visit to 32-bit code
	call walk64
	ljmpl *to_leave_long64(%rip)
	.code32
leave_long64:
	jmp leave_long

to_leave_long64:			# 64-bit code has no far jump to an immediate address
	.long leave_long64
	.word CODE32

station_compat16:
	call enter_long
	to_16
	call walk16
	to_32
	jmp leave_long

	.code32
station_compat32:
	call enter_long
	call walk32
	jmp leave_long
