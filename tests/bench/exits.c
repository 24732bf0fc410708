// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * exits: what an exit of a vCPU costs, and an introspection event at the same instruction.
 *
 *   exits bare|event [KIND...]
 *
 * A VM of its own runs each kind of instruction in a loop, on one vCPU. The cost is that of one round of the loop in
 * nanoseconds of CLOCK_MONOTONIC: the difference of a long and a short run, divided by that of their rounds. Of several
 * runs the fastest ones count, for they have the fewest ticks of the host's timer in them, and no turn of its scheduler
 * that the others do not need. It is printed as a JSON object by kind. With "event" the VM is hooked, and a thread
 * answers every event at once.
 *
 * Meant for a machine whose clock counts instructions: there the figures repeat.
 */
#include <asm/kvm.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <linux/kvmi.h>

enum { TRIES = 5, SHORT = 200, LONG = 1000 };

/* Guest physical memory, mapped one to one. */
enum {
	TABLES = 0x1000, /* PML4, then a PDPT with one page of 1 GiB */
	IDT = 0x4000,
	CODE = 0x5000,
	WATCHED = 0x6000,
	STACK = 0x8000,
	MEMORY = 0x200000,
};

enum { PAT = 0x277 };

/*
 * The guest's code: rcx has the rounds, and rsi one of two values that take turns. Assembled here and copied to the
 * guest.
 */
#define SNIPPET(name, body) \
	asm(".pushsection .rodata\n" #name "_code: 1:\n" body "\ndec %rcx\njnz 1b\nhlt\n" #name "_end: .popsection"); \
	extern const char name##_code[], name##_end[]

SNIPPET(pio, "out %al, $0x80");
SNIPPET(cpuid, "mov %rcx, %r8\nxor %eax, %eax\ncpuid\nmov %r8, %rcx");
SNIPPET(msr, "mov %rcx, %r8\nmov $0x277, %ecx\nxor $1, %esi\nmov %esi, %eax\nmov $0x70406, %edx\nwrmsr\nmov %r8, %rcx");
SNIPPET(cr3, "xor $0x10, %rsi\nmov %rsi, %cr3");
SNIPPET(vmcall, "mov $34, %eax\nmov $24, %edi\nvmcall");
SNIPPET(vmmcall, "mov $34, %eax\nmov $24, %edi\nvmmcall");
SNIPPET(int3, "int3");
SNIPPET(write, "mov %rcx, 0x6000");
asm(".pushsection .rodata\nback_code: iretq\nback_end: .popsection");
extern const char back_code[], back_end[];

struct kind {
	const char *name;
	const char *code, *end;
	uint64_t rsi;
	int event; /* -1: none */
};

#define KIND(label, name, rsi, event) { label, name##_code, name##_end, rsi, event }

static const struct kind kinds[] = {
	KIND("pio", pio, 0, -1),
	KIND("cpuid", cpuid, 0, -1),
	KIND("msr", msr, 0x70406, KVMI_EVENT_MSR),
	KIND("cr3", cr3, TABLES, KVMI_EVENT_CR),
	KIND("hypercall", vmcall, 0, KVMI_EVENT_HYPERCALL),
	KIND("breakpoint", int3, 0, KVMI_EVENT_BREAKPOINT),
	KIND("page", write, 0, KVMI_EVENT_PF),
};

struct machine {
	int kvm, vm, vcpu, socket;
	size_t run_size;
	struct kvm_run *run;
	uint8_t *memory;
	pthread_t introspector;
	sem_t ready; /* the kernel has read the introspector's commands */
};

static bool is_amd(void)
{
	uint32_t eax = 0, ebx, ecx, edx;

	asm("cpuid" : "+a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx));
	return ebx == 0x68747541; /* "Auth" */
}

static int do_ioctl(int fd, unsigned long request, const void *argument, const char *what)
{
	int result = ioctl(fd, request, argument);

	if (result < 0)
		err(EXIT_FAILURE, "%s", what);
	return result;
}

/* ---- the introspector ---- */

static void write_all(int fd, const void *data, size_t size)
{
	for (const char *at = data; size; ) {
		ssize_t sent = write(fd, at, size);

		if (sent <= 0)
			err(EXIT_FAILURE, "writing to the kernel");
		at += sent;
		size -= sent;
	}
}

static bool read_all(int fd, void *data, size_t size)
{
	for (char *at = data; size; ) {
		ssize_t got = read(fd, at, size);

		if (got <= 0)
			return false;
		at += got;
		size -= got;
	}
	return true;
}

static void command(int fd, unsigned int id, const void *payload, size_t size)
{
	struct {
		struct kvmi_msg_hdr hdr;
		char payload[64];
	} message = { .hdr = { .id = id, .size = size } };

	if (size)
		memcpy(message.payload, payload, size);
	write_all(fd, &message, sizeof(message.hdr) + size);
}

static void enable(int fd, int event)
{
	const struct {
		struct kvmi_vcpu_hdr vcpu;
		struct kvmi_control_events control;
	} events = { .control = { .event_id = event, .enable = 1 } };
	const struct {
		struct kvmi_vcpu_hdr vcpu;
		struct kvmi_control_cr control;
	} cr = { .control = { .enable = 1, .cr = 3 } };
	const struct {
		struct kvmi_vcpu_hdr vcpu;
		struct kvmi_control_msr control;
	} msr = { .control = { .enable = 1, .msr = PAT } };
	const struct {
		struct kvmi_set_page_access set;
		struct kvmi_page_access_entry entry;
	} page = { .set = { .count = 1 }, .entry = { .gpa = WATCHED, .access = KVMI_PAGE_ACCESS_R } };

	command(fd, KVMI_CONTROL_EVENTS, &events, sizeof(events));
	if (event == KVMI_EVENT_CR)
		command(fd, KVMI_CONTROL_CR, &cr, sizeof(cr));
	else if (event == KVMI_EVENT_MSR)
		command(fd, KVMI_CONTROL_MSR, &msr, sizeof(msr));
	else if (event == KVMI_EVENT_PF)
		command(fd, KVMI_SET_PAGE_ACCESS, &page, sizeof(page));
	/* It is answered by the thread that reads the others and hands them to the vCPU. */
	command(fd, KVMI_GET_VERSION, NULL, 0);
}

/* Answers every event with CONTINUE, and with the value that is new. */
static void *answer(void *argument)
{
	struct machine *machine = argument;
	const int fd = machine->socket;
	static union {
		struct {
			struct kvmi_msg_hdr hdr;
			char payload[KVMI_MSG_SIZE];
		};
		struct {
			struct kvmi_msg_hdr event_hdr;
			struct kvmi_event common;
			struct kvmi_event_cr value; /* an MSR's has the same layout */
		};
	} message;

	while (read_all(fd, &message.hdr, sizeof(message.hdr)) &&
	       read_all(fd, message.payload, message.hdr.size)) {
		struct {
			struct kvmi_msg_hdr hdr;
			struct kvmi_vcpu_hdr vcpu;
			struct kvmi_event_reply common;
			uint64_t value;
		} reply = {
			.hdr = { .id = KVMI_EVENT_REPLY, .seq = message.hdr.seq },
			.common = { .event = message.common.event },
			.value = message.value.new_value,
		};
		bool valued = message.common.event == KVMI_EVENT_CR || message.common.event == KVMI_EVENT_MSR;
		size_t size = sizeof(reply) - (valued ? 0 : sizeof(reply.value));

		if (message.hdr.id == KVMI_GET_VERSION)
			sem_post(&machine->ready);
		if (message.hdr.id != KVMI_EVENT)
			continue;
		reply.hdr.size = size - sizeof(reply.hdr);
		write_all(fd, &reply, size);
	}
	return NULL;
}

static void hook(struct machine *machine, int event)
{
	struct kvm_introspection_feature all = { .allow = 1, .id = -1 };
	struct kvm_introspection_hook hook = { 0 };
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
		err(EXIT_FAILURE, "socketpair");
	hook.fd = pair[1];
	do_ioctl(machine->vm, KVM_INTROSPECTION_HOOK, &hook, "KVM_INTROSPECTION_HOOK");
	do_ioctl(machine->vm, KVM_INTROSPECTION_COMMAND, &all, "KVM_INTROSPECTION_COMMAND");
	do_ioctl(machine->vm, KVM_INTROSPECTION_EVENT, &all, "KVM_INTROSPECTION_EVENT");
	close(pair[1]);
	machine->socket = pair[0];
	if (sem_init(&machine->ready, 0, 0) || pthread_create(&machine->introspector, NULL, answer, machine))
		errx(EXIT_FAILURE, "no thread");
	enable(machine->socket, event);
	while (sem_wait(&machine->ready) && errno == EINTR)
		;
}

/* ---- the VM ---- */

static void set_registers(struct machine *machine, const struct kind *kind, uint64_t rounds)
{
	struct kvm_segment code = { .type = 11, .present = 1, .s = 1, .l = 1, .g = 1, .selector = 8, .limit = ~0u };
	struct kvm_segment data = { .type = 3, .present = 1, .s = 1, .db = 1, .g = 1, .selector = 16, .limit = ~0u };
	struct kvm_regs regs = { .rip = CODE, .rsp = STACK, .rflags = 2, .rcx = rounds, .rsi = kind->rsi };
	struct kvm_sregs sregs;

	do_ioctl(machine->vcpu, KVM_GET_SREGS, &sregs, "KVM_GET_SREGS");
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.ss = data;
	sregs.cr3 = TABLES;
	sregs.cr4 = 1 << 5; /* PAE */
	sregs.cr0 = 0x80000011u; /* PG, ET, PE */
	sregs.efer = 1 << 8 | 1 << 10; /* LME, LMA */
	sregs.idt.base = IDT;
	sregs.idt.limit = 16 * 4 - 1;
	/* The gate of vector 3 leads to this selector. */
	sregs.gdt.base = IDT + 0x800;
	sregs.gdt.limit = 8 * 3 - 1;
	do_ioctl(machine->vcpu, KVM_SET_SREGS, &sregs, "KVM_SET_SREGS");
	do_ioctl(machine->vcpu, KVM_SET_REGS, &regs, "KVM_SET_REGS");
}

static void fill_memory(struct machine *machine, const struct kind *kind)
{
	uint64_t *table = (uint64_t *)(machine->memory + TABLES);
	uint64_t *gate = (uint64_t *)(machine->memory + IDT + 16 * 3);
	uint64_t *gdt = (uint64_t *)(machine->memory + IDT + 0x800);
	const uint64_t back = CODE + 0x800;

	table[0] = (TABLES + 0x1000) | 3;
	table[512] = 0x83; /* one page of 1 GiB */
	gate[0] = (back & 0xffff) | 8 << 16 | 0x8e00ull << 32;
	gdt[1] = 0x00af9b000000ffffull;
	gdt[2] = 0x00cf93000000ffffull;
	memcpy(machine->memory + CODE, kind->code, kind->end - kind->code);
	memcpy(machine->memory + back, back_code, back_end - back_code);
}

static void create(struct machine *machine)
{
	struct kvm_userspace_memory_region region = { .memory_size = MEMORY };
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[256];
	} cpuid = { .head.nent = 256 };

	machine->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (machine->kvm < 0)
		err(EXIT_FAILURE, "/dev/kvm");
	machine->vm = do_ioctl(machine->kvm, KVM_CREATE_VM, NULL, "KVM_CREATE_VM");
	machine->memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (machine->memory == MAP_FAILED)
		err(EXIT_FAILURE, "memory");
	region.userspace_addr = (uintptr_t)machine->memory;
	do_ioctl(machine->vm, KVM_SET_USER_MEMORY_REGION, &region, "KVM_SET_USER_MEMORY_REGION");
	machine->vcpu = do_ioctl(machine->vm, KVM_CREATE_VCPU, NULL, "KVM_CREATE_VCPU");
	do_ioctl(machine->kvm, KVM_GET_SUPPORTED_CPUID, &cpuid, "KVM_GET_SUPPORTED_CPUID");
	do_ioctl(machine->vcpu, KVM_SET_CPUID2, &cpuid, "KVM_SET_CPUID2");
	machine->run_size = do_ioctl(machine->kvm, KVM_GET_VCPU_MMAP_SIZE, NULL, "KVM_GET_VCPU_MMAP_SIZE");
	machine->run = mmap(NULL, machine->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, machine->vcpu, 0);
	if (machine->run == MAP_FAILED)
		err(EXIT_FAILURE, "the vCPU's page");
}

static void destroy(struct machine *machine)
{
	if (machine->socket) {
		shutdown(machine->socket, SHUT_RDWR);
		pthread_join(machine->introspector, NULL);
		close(machine->socket);
	}
	munmap(machine->run, machine->run_size);
	munmap(machine->memory, MEMORY);
	close(machine->vcpu);
	close(machine->vm);
	close(machine->kvm);
}

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ull + time.tv_nsec;
}

/* Runs the snippet to its end; nanoseconds. */
static uint64_t run(struct machine *machine, const struct kind *kind, uint64_t rounds)
{
	uint64_t begin;

	set_registers(machine, kind, rounds);
	begin = now();
	do {
		if (ioctl(machine->vcpu, KVM_RUN, 0) && errno != EINTR)
			err(EXIT_FAILURE, "KVM_RUN");
	} while (machine->run->exit_reason == KVM_EXIT_IO || machine->run->exit_reason == KVM_EXIT_INTR);
	if (machine->run->exit_reason != KVM_EXIT_HLT)
		errx(EXIT_FAILURE, "%s: the guest stopped for the reason %u", kind->name, machine->run->exit_reason);
	return now() - begin;
}

static uint64_t fastest(struct machine *machine, const struct kind *kind, uint64_t rounds)
{
	uint64_t best = UINT64_MAX;

	for (int i = 0; i < TRIES; i++) {
		uint64_t time = run(machine, kind, rounds);

		if (time < best)
			best = time;
	}
	return best;
}

static double measure(const struct kind *kind, bool event)
{
	struct machine machine = { 0 };
	uint64_t brief, lengthy;

	create(&machine);
	fill_memory(&machine, kind);
	if (event)
		hook(&machine, kind->event);
	run(&machine, kind, SHORT); /* what is done once, is done */
	brief = fastest(&machine, kind, SHORT);
	lengthy = fastest(&machine, kind, LONG);
	destroy(&machine);
	return (double)(lengthy - brief) / (LONG - SHORT);
}

static bool chosen(const char *name, char **names)
{
	if (!*names)
		return true;
	for (; *names; names++)
		if (!strcmp(*names, name))
			return true;
	return false;
}

int main(int argc, char **argv)
{
	const char *comma = "";
	bool event;

	if (argc < 2 || (strcmp(argv[1], "bare") && strcmp(argv[1], "event")))
		errx(2, "usage: exits bare|event [KIND...]");
	event = !strcmp(argv[1], "event");

	printf("{");
	for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
		struct kind kind = kinds[i];

		if (!chosen(kind.name, argv + 2) || (event && kind.event < 0))
			continue;
		if (kind.event == KVMI_EVENT_HYPERCALL && is_amd()) {
			kind.code = vmmcall_code;
			kind.end = vmmcall_end;
		}
		printf("%s\"%s\": %.0f", comma, kind.name, measure(&kind, event));
		fflush(stdout);
		comma = ", ";
	}
	printf("}\n");
	return 0;
}
