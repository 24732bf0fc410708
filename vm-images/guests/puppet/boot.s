# SPDX-License-Identifier: LGPL-2.1-or-later
#
# From the boot loader to the mailbox: every vCPU goes to long mode, ring 0, with interrupts on and a timer that ticks,
# so that it never runs for long without an exit.

	.include "contract.inc"
	.include "boot.inc"

	.equ AP_TICKS,		500		# 5 s

	.equ CPUID_XSAVE,	26		# of ECX of function 1
	.equ XCR0_KNOWN,	7		# x87, SSE, AVX

	.section .boot, "ax"
	.code32
	multiboot_header

	.globl _start
_start:
	cli
	cld
	mask_pics
	mov $low_source, %esi
	mov $low_start, %edi
	mov $low_size, %ecx
	rep movsb
	mov $TSS, %edi
	xor %eax, %eax
	mov $STACKS - TSS, %ecx
	rep stosb
	lgdt gdtr
	ljmp $CODE32, $vcpu_start

	.section .ap_start, "ax"
	ap_start gdtr_low
	.balign 4
gdtr_low:
	.word GDT_LIMIT
	.long gdt

	.section .low, "ax"
	.code32
vcpu_start:
	mov $DATA, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss

	mov $CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT, %eax
	mov %eax, %cr4
	mov $root, %eax
	mov %eax, %cr3
	mov $MSR_EFER, %ecx
	rdmsr
	or $EFER_LME, %eax
	wrmsr
	mov $CR0_PG | CR0_WP | CR0_ET | CR0_MP | CR0_PE, %eax
	mov %eax, %cr0
	ljmp $CODE64, $1f

	.code64
1:	detect_vmmcall
	own_index
	cmp $MAX_VCPUS, %ebx
	jae halt
	mov %ebx, %eax
	shl $PAGE_SHIFT, %eax
	lea STACKS + PAGE_SIZE(%rax), %rsp
	add $MAILBOXES, %eax
	xor %edx, %edx
	mov $MSR_GS_BASE, %ecx
	wrmsr
	mov %eax, %gs:SELF
	mov %edi, %gs:USES_VMMCALL
	mov %ebx, %gs:INDEX

	# All of the vector state that the CPU has and this guest knows.
	mov %ebx, %esi
	mov $1, %eax
	cpuid
	bt $CPUID_XSAVE, %ecx
	jnc 2f
	mov %cr4, %rax
	or $CR4_OSXSAVE, %eax
	mov %rax, %cr4
	mov $0xd, %eax
	xor %ecx, %ecx
	cpuid
	and $XCR0_KNOWN, %eax
	xor %ecx, %ecx
	xor %edx, %edx
	xsetbv
2:
	imul $2 * SYSTEM_DESCRIPTOR, %esi, %eax
	add $TSS0, %eax
	ltr %ax
	lidt idtr(%rip)
	set_up_lapic
	movl $HOME_MS * TICKS_PER_MS, LAPIC_TIMER_COUNT(%eax)
	sti

	lock incl ONLINE(%rip)
	test %esi, %esi
	jnz home
	start_others AP_TICKS, all_online
all_online:
	mov $ONLINE, %esi
	mov $line_vcpus, %ebx
	call say64
	jmp home

nap:
	hlt
	ret

	.globl timer, spurious
timer:
	push %rax
	incq %gs:TICKS
	incl %gs:COUNTS + 4 * TIMER
	mov $LAPIC, %eax
	movl $0, LAPIC_EOI(%eax)
	pop %rax
spurious:
	iretq

	.globl halt
halt:
	cli
	hlt
	jmp halt

	.data
	.globl ONLINE
ONLINE:
	.long 0
line_vcpus:
	.byte DECIMAL, 0
	.ascii " vcpus"
	.byte END
