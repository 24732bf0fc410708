# SPDX-License-Identifier: LGPL-2.1-or-later
#
# A program for x86-64 Linux that runs in each of the modes that user code there can be in, one after the other, for
# ever, and makes the KVMI hypercall in each: 32 bits, 64 bits, 16 bits. It is a static 32-bit ELF, to be the first
# process, and asks the kernel for nothing but a 16-bit code segment.

	.equ USER32,		0x23		# the kernel's segments for user code: arch/x86/include/asm/segment.h
	.equ USER64,		0x33
	.equ USER16,		0x07		# entry 0 of the LDT

	.equ SYS_MODIFY_LDT,	123
	.equ WRITE_LDT,		0x11

	.equ HYPERCALL,		34
	.equ HYPERCALL_EVENT,	24

# EBP: 1 if this CPU's hypercall is VMMCALL, 0 if it is VMCALL.
	.macro hypercall
	test %ebp, %ebp
	jnz 1f
	vmcall
	jmp 2f
1:	vmmcall
2:
	.endm

	.globl _start
	.text
	.code32
_start:
	xor %eax, %eax
	cpuid
	xor %ebp, %ebp
	cmp $0x444d4163, %ecx			# Authenti"cAMD"
	je 1f
	cmp $0x656e6975, %ecx			# HygonGen"uine"
	jne 2f
1:	inc %ebp
2:	mov $SYS_MODIFY_LDT, %eax
	mov $WRITE_LDT, %ebx
	mov $segment16, %ecx
	mov $segment16_end - segment16, %edx
	int $0x80

round:
	mov $HYPERCALL, %eax
	mov $HYPERCALL_EVENT, %ebx
	hypercall
	ljmp $USER64, $in64

	.code64
in64:
	mov $HYPERCALL, %eax
	mov $HYPERCALL_EVENT, %edi
	hypercall
	ljmp *to16(%rip)

	.code16
in16:
	mov $HYPERCALL, %eax
	mov $HYPERCALL_EVENT, %ebx
	hypercall
	ljmpl $USER32, $round

	.data
to16:
	.long 0
	.word USER16

# struct user_desc: entry, base, limit, and flags: code, usable, 16 bits.
segment16:
	.long 0, in16, 0xfff, 0x44
segment16_end:
