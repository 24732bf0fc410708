# SPDX-License-Identifier: LGPL-2.1-or-later
#
# A program for x86-64 Linux that runs as 32-bit code and as 64-bit code in turn, for ever, and makes the KVMI hypercall
# in each. It is a static 32-bit ELF, to be the first process, and asks the kernel for nothing. Code of 16 bits would
# need a segment of the LDT, which Debian's cloud kernels (without CONFIG_X86_16BIT) do not give.

	.equ USER32,		0x23		# the kernel's segments for user code: arch/x86/include/asm/segment.h
	.equ USER64,		0x33

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
	jne round
1:	inc %ebp

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
	ljmp *to32(%rip)

	.section .rodata
to32:
	.long round
	.word USER32
