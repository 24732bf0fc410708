# SPDX-License-Identifier: LGPL-2.1-or-later
#
# What the CPU and the host read: the control block, segments and pages. All of it is ready at assembly time.

	.include "contract.inc"

	.section .control, "aw"
	.long MAGIC, VERSION, 0, 0
	.balign RECORD_SIZE
	.set index, 0
	.rept MAX_VCPUS
	.byte 0, 0, DO_ALL, 0
	.long 20				# PACE
	.quad 0, 0
	.long HYPERCALL, index
	.long root, 0, root + PAGE_SIZE, 0
	.balign RECORD_SIZE
	.set index, index + 1
	.endr

	.section .tss, "aw"
	.rept MAX_VCPUS
	.long 0, 0, DATA32			# back link, ESP0 (set in stations.s), SS0
	.fill 88
	.word 0, 104				# the I/O bitmap follows
	.fill 128				# virtual-8086 mode may use the ports below 0x400
	.byte 0xff				# the CPU reads one byte further
	.balign TSS_SIZE
	.endr

	.section .low, "ax"
	.globl gdt, gdtr
	.balign 8
gdt:
	descriptor 0, 0, 0
	descriptor 0, 0xfffff, 0xc09b00			# CODE32
	descriptor 0, 0xfffff, 0xc09300			# DATA32
	descriptor CODE16_BASE, 0xffff, 0x009b00	# CODE16
	descriptor BIGREAL_BASE, 0xfffff, 0xc09b00	# BIGREAL
	descriptor 0, 0xffff, 0x009300			# DATA16
	descriptor 0, 0xfffff, 0xa09b00			# CODE64
	.set index, 0
	.rept MAX_VCPUS
	descriptor (TSS + index * TSS_SIZE), 232, 0x008900
	.set index, index + 1
	.endr
gdt_end:

gdtr:
	.word gdt_end - gdt - 1
	.long gdt

# Two roots of one identity mapping of the first GiB, in pages of 2 MiB. modewalk.ld puts this at an even page, so that
# the addresses of the two differ in nothing but the bit PAGE_SIZE.
	.section .pages, "aw"
	.balign PAGE_SIZE
root:
	.rept 2
	.long directory_pointers + PRESENT_WRITABLE, 0
	.balign PAGE_SIZE
	.endr
directory_pointers:
	.long directory + PRESENT_WRITABLE, 0
	.balign PAGE_SIZE
directory:
	.set page, 0
	.rept 512
	.long page | PRESENT_WRITABLE | LARGE_PAGE, 0
	.set page, page + PAGE_2M
	.endr
