# SPDX-License-Identifier: LGPL-2.1-or-later
#
# From the boot loader to the walk: every vCPU is brought into the same state (32-bit protected mode, paging off,
# interrupts off), then all of them run `walk`.

	.include "contract.inc"

	.include "boot.inc"

	.equ NAP,		100 * TICKS_PER_MS
	.equ AP_NAPS,		50		# 5 s

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
	lgdt gdtr
	ljmp $CODE32, $vcpu_start

	.section .ap_start, "ax"
	ap_start gdtr

	.section .low, "ax"
	.code32
vcpu_start:
	mov $DATA32, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	lidt idtr_32

	detect_vmmcall
	own_index
	cmp $MAX_VCPUS, %ebx
	jae halt

	mov %ebx, %esi
	shl $RECORD_SHIFT, %esi
	add $RECORDS, %esi
	mov %edi, %eax
	mov %al, USES_VMMCALL(%esi)

	lea 1(%ebx), %esp
	imul $STACK_SIZE, %esp
	add $STACKS, %esp

	mov $CR0_PE | CR0_ET, %eax
	mov %eax, %cr0
	mov $CR4_PAE, %eax
	mov %eax, %cr4
	mov CR3_PAIR(%esi), %eax
	mov %eax, %cr3

	set_up_lapic

	lock incl ONLINE
	test %ebx, %ebx
	jnz 1f
	call start_others
	movl $1, STATE
1:	cmpl $0, STATE
	jne walk
	call nap
	jmp 1b

	start_others AP_NAPS, say_vcpus
say_vcpus:
	mov $line_vcpus, %ebx
	jmp say32

# Sleep for 100 ms, the only time that interrupts are on. Every wait but that for the serial port is made of these, so
# that a guest that nobody watches leaves the host's CPUs alone. The timer goes on until it is stopped: where an exit
# between STI and HLT loses the interrupt shadow, as in QEMU's emulation of AMD hosts, the interrupt may come before HLT.
nap:
	movl $NAP, LAPIC + LAPIC_TIMER_COUNT
	sti
	hlt
	cli
	movl $0, LAPIC + LAPIC_TIMER_COUNT
	ret

	.globl timer, spurious
timer:
	movl $0, LAPIC + LAPIC_EOI
spurious:
	iret

# The life of a vCPU: at the station that the host wants, else around all of them. EBP is the station's number from
# here down to the code of walk.s.
walk:
	mov $1, %ebp
1:	movzbl WANT(%esi), %eax
	lea -1(%eax), %ecx
	cmp $STATIONS, %ecx			# 0 wraps: no station either
	jae 2f
	mov %eax, %ebp
	call *stations - 4(, %ebp, 4)
	jmp walk
2:	call *stations - 4(, %ebp, 4)
	inc %ebp
	cmp $STATIONS, %ebp
	jbe 1b
	addl $1, LAPS(%esi)
	adcl $0, LAPS + 4(%esi)
	testb $3, LAPS(%esi)
	jnz 3f
	mov $line_lap, %ebx
	call say32
3:	call nap
	jmp walk

	.globl halt
halt:
	cli
	hlt
	jmp halt

stations:
	.long station_real16, station_bigreal, station_prot16, station_prot32
	.long station_vm86, station_long64, station_compat16, station_compat32

line_vcpus:
	.byte DECIMAL, ONLINE - RECORDS		# the speaker is vCPU 0: the header is next to its record
	.ascii " vcpus"
	.byte END
line_lap:
	.ascii "vcpu "
	.byte DECIMAL, INDEX
	.ascii " lap "
	.byte DECIMAL, LAPS, END
