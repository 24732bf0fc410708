# SPDX-License-Identifier: LGPL-2.1-or-later
#
# From the boot loader to the walk: every vCPU is brought into the same state (32-bit protected mode, paging off,
# interrupts off), then all of them run `walk`.

	.include "contract.inc"

	.equ LAPIC,		0xfee00000
	.equ LAPIC_EOI,		LAPIC + 0x0b0
	.equ LAPIC_SVR,		LAPIC + 0x0f0
	.equ LAPIC_ICR,		LAPIC + 0x300
	.equ LAPIC_LVT_TIMER,	LAPIC + 0x320
	.equ LAPIC_TIMER_COUNT,	LAPIC + 0x380
	.equ LAPIC_TIMER_DIV,	LAPIC + 0x3e0

	.equ LAPIC_ENABLE,	1 << 8
	.equ LAPIC_DIV_16,	3
	.equ LAPIC_PERIODIC,	1 << 17
	.equ INIT_OTHERS,	0x000c4500
	.equ SIPI_OTHERS,	0x000c4600 | AP_START >> 12

	.equ NAP,		6250000		# 100 ms: KVM's LAPIC timer runs at 1 GHz, here divided by 16
	.equ AP_NAPS,		50		# 5 s

	.equ FW_CFG_SELECT,	0x510
	.equ FW_CFG_DATA,	0x511
	.equ FW_CFG_NB_CPUS,	5

	.equ PIC_MASTER_MASK,	0x21
	.equ PIC_SLAVE_MASK,	0xa1

	.equ MULTIBOOT,		0x1badb002

	.section .boot, "ax"
	.code32
	.balign 4
	.long MULTIBOOT, 0, -MULTIBOOT

	.globl _start
_start:
	cli
	cld
	mov $0xff, %al				# the BIOS left the PC's timer running, and its vector is an exception's
	out %al, $PIC_MASTER_MASK
	out %al, $PIC_SLAVE_MASK
	mov $low_source, %esi
	mov $low_start, %edi
	mov $low_size, %ecx
	rep movsb
	lgdt gdtr
	ljmp $CODE32, $vcpu_start

	.section .ap_start, "ax"
	.code16
	cli
	xor %ax, %ax
	mov %ax, %ds
	lgdtl gdtr
	mov $CR0_PE | CR0_ET, %eax
	mov %eax, %cr0
	ljmpl $CODE32, $vcpu_start

	.section .low, "ax"
	.code32
vcpu_start:
	mov $DATA32, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	lidt idtr_32

	# AMD and Hygon have VMMCALL, Intel and its kin VMCALL; by the last four letters of their CPUID vendors.
	xor %eax, %eax
	cpuid
	cmp $0x444d4163, %ecx			# Authenti"cAMD"
	sete %al
	cmp $0x656e6975, %ecx			# HygonGen"uine"
	sete %ah
	or %ah, %al
	movzbl %al, %edi

	mov $1, %eax
	cpuid
	shr $24, %ebx				# the initial APIC id, which is the vCPU's index in KVM
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

	movl $LAPIC_ENABLE | SPURIOUS, LAPIC_SVR
	movl $LAPIC_DIV_16, LAPIC_TIMER_DIV
	movl $TIMER | LAPIC_PERIODIC, LAPIC_LVT_TIMER

	lock incl ONLINE
	test %ebx, %ebx
	jnz 1f
	call start_others
	movl $1, STATE
1:	cmpl $0, STATE
	jne walk
	call nap
	jmp 1b

# Start the other vCPUs and wait until they have come up; give up on them after a while.
start_others:
	mov $serial_setup, %ebx
1:	movzwl (%ebx), %edx
	mov 2(%ebx), %al
	out %al, (%dx)
	add $3, %ebx
	cmp $serial_setup_end, %ebx
	jb 1b

	movl $INIT_OTHERS, LAPIC_ICR
	call nap
	movl $SIPI_OTHERS, LAPIC_ICR
	call nap
	movl $SIPI_OTHERS, LAPIC_ICR

	# QEMU tells how many there are. Without its device this reads as all ones, and the wait below runs its time.
	mov $FW_CFG_SELECT, %edx
	mov $FW_CFG_NB_CPUS, %eax
	out %ax, (%dx)
	mov $FW_CFG_DATA, %edx
	in (%dx), %al
	movzbl %al, %ebx
	cmp $MAX_VCPUS, %ebx
	jbe 1f
	mov $MAX_VCPUS, %ebx
1:	mov $AP_NAPS, %edi
2:	cmp %ebx, ONLINE
	jae 3f
	call nap
	dec %edi
	jnz 2b
3:	mov $line_vcpus, %ebx
	jmp say32

# Sleep for 100 ms, the only time that interrupts are on. Every wait but that for the serial port is made of these, so
# that a guest that nobody watches leaves the host's CPUs alone. The timer goes on until it is stopped: where an exit
# between STI and HLT loses the interrupt shadow, as in QEMU's emulation of AMD hosts, the interrupt may come before HLT.
nap:
	movl $NAP, LAPIC_TIMER_COUNT
	sti
	hlt
	cli
	movl $0, LAPIC_TIMER_COUNT
	ret

	.globl timer, spurious
timer:
	movl $0, LAPIC_EOI
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

	.macro port number, value
	.word \number
	.byte \value
	.endm
serial_setup:
	port 0x3f9, 0				# no interrupts
	port 0x3fb, 0x80			# 115200 baud
	port 0x3f8, 1
	port 0x3f9, 0
	port 0x3fb, 3				# 8n1
	port 0x3fc, 3				# DTR, RTS
serial_setup_end:
