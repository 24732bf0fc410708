# SPDX-License-Identifier: LGPL-2.1-or-later
#
# What the CPU reads: segments and pages. All of it is ready at assembly time.

	.include "contract.inc"

	.equ TSS_LIMIT,		103
	.equ LDT_LIMIT,		7
	.equ GIB,		4		# as many are mapped to themselves: memory and the local APIC

# A descriptor of what is no memory segment: in long mode it has twice the size.
	.macro system_descriptor base, limit, flags
	descriptor \base, \limit, \flags
	.long 0, 0
	.endm

	.data
	.globl gdt, gdtr, other_gdtr
	.balign 16
gdt:
	descriptor 0, 0, 0
	descriptor 0, 0xfffff, 0xc09b00			# CODE32
	descriptor 0, 0xfffff, 0xc09300			# DATA
	descriptor 0, 0xfffff, 0xa09b00			# CODE64
	system_descriptor LDT_TABLE, LDT_LIMIT, 0x008200
	.rept 2 * MAX_VCPUS
	system_descriptor TSS, TSS_LIMIT, 0x008900
	.endr
	.skip SYSTEM_DESCRIPTOR

# The second has another limit, of which no selector makes use.
gdtr:
	.word GDT_LIMIT
	.long gdt, 0
	.balign 8
other_gdtr:
	.word GDT_LIMIT + SYSTEM_DESCRIPTOR
	.long gdt, 0

	.section .pages, "aw"
	.globl root, other_root, alias_table
	.balign PAGE_SIZE
root:
	.long directory_pointers + PRESENT_WRITABLE, 0
	.balign PAGE_SIZE
other_root:
	.long directory_pointers + PRESENT_WRITABLE, 0
	.balign PAGE_SIZE
directory_pointers:
	.set page, 0
	.rept GIB
	.long directories + page + PRESENT_WRITABLE, 0
	.set page, page + PAGE_SIZE
	.endr
	.long alias_directory + PRESENT_WRITABLE, 0
	.balign PAGE_SIZE
directories:
	.set page, 0
	.rept GIB * 512
	.long page | PRESENT_WRITABLE | LARGE_PAGE, 0
	.set page, page + PAGE_2M
	.endr
alias_directory:
	.long alias_table + PRESENT_WRITABLE, 0
	.balign PAGE_SIZE
alias_table:
	.set page, ALIAS_PAGES * PAGE_SIZE
	.rept ALIAS_PAGES
	.set page, page - PAGE_SIZE
	.long alias_pages + page + PRESENT_WRITABLE, 0
	.endr
	.balign PAGE_SIZE
