// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * peer: the kernel's end of sessions, as fast as a program can be it.
 *
 *   peer events SECONDS FD...    one VM at each descriptor, a stream socket: its vCPU writes CR3 and waits for the reply
 *   peer watched SECONDS FD...   ... once the introspector has switched that on
 *   peer memory FD               serves READ_PHYSICAL until the introspector closes
 *
 * "events" first goes a few rounds unmeasured, then prints as JSON how long it measured, the rounds of each VM in that
 * time, and how long there was from one round of any VM to the next in microseconds: that of the fastest tenth of slices
 * of at least SLICE rounds, in which nobody else had a turn on its CPU. Every reply is checked. In "memory" a page holds
 * its own address, over and over; as in the kernel, commands are served in order, and none is while the answer of the one
 * before it is not taken.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "wire.h"

enum { WARM_UP = 300, SLICE = 100, MAX_SLICES = 100000, COMMANDS = 256, MAX_VMS = 64 };

struct vm {
	int fd;
	bool watched;
	double seconds, elapsed;
	unsigned long rounds;
	pthread_t thread;
};

static pthread_barrier_t start;

/* Of all VMs. When each slice ended, in seconds; a slice is several rounds of each VM, for they come in bursts. */
static atomic_ulong all_rounds;
static unsigned long slice;
static double ends[MAX_SLICES];

static void round_trip(int fd, struct cr_event *event)
{
	struct cr_reply reply;

	event->header.seq++;
	event->common.arch.regs.rip += 3;
	event->common.arch.sregs.cr3 = event->own.old_value = event->own.new_value;
	event->own.new_value ^= 0x3000;
	send_all(fd, event, sizeof(*event));
	if (receive(fd, &reply, sizeof(reply), sizeof(reply)) != sizeof(reply))
		errx(1, "the introspector closed before its reply to event %u was whole", event->header.seq);

	const struct cr_reply expected = {
		.header = { KVMI_EVENT_REPLY, sizeof(reply) - sizeof(reply.header), event->header.seq },
		.vcpu.vcpu = event->common.vcpu,
		.common = { KVMI_EVENT_ACTION_CONTINUE, KVMI_EVENT_CR },
		.own.new_val = event->own.new_value,
	};
	if (memcmp(&reply, &expected, sizeof(reply)))
		errx(1, "a reply that is none to event %u", event->header.seq);
}

/* Say yes to what comes until CR3 of the one vCPU is watched. The version of the interface is 1, too. */
static void be_watched(int fd)
{
	struct kvmi_msg_hdr header;
	char payload[PAGE];

	do {
		struct guest_info_answer answer = { .info.vcpu_count = 1 };

		if (receive(fd, &header, sizeof(header), sizeof(header)) != sizeof(header) ||
		    header.size > sizeof(payload) || receive(fd, payload, header.size, header.size) != header.size)
			errx(1, "the introspector closed before it watched anything");
		size_t size = header.id == KVMI_GET_GUEST_INFO ? sizeof(answer.info) :
			      header.id == KVMI_GET_VERSION ? sizeof(struct kvmi_get_version_reply) : 0;

		answer.header = (struct kvmi_msg_hdr){ header.id, sizeof(answer.error) + size, header.seq };
		send_all(fd, &answer, sizeof(answer.header) + answer.header.size);
	} while (header.id != KVMI_CONTROL_CR);
}

static void *run(void *argument)
{
	struct vm *vm = argument;
	struct cr_event event = {
		.header = { KVMI_EVENT, sizeof(event) - sizeof(event.header) },
		.common = { .size = sizeof(event.common), .event = KVMI_EVENT_CR, .arch.mode = 8 },
		.own = { .cr = CR3, .new_value = 0x1000 },
	};

	if (vm->watched)
		be_watched(vm->fd);
	for (int i = 0; i < WARM_UP; i++)
		round_trip(vm->fd, &event);
	pthread_barrier_wait(&start);
	double began = now(), after;
	do {
		round_trip(vm->fd, &event);
		vm->rounds++;
		after = now();
		unsigned long number = atomic_fetch_add(&all_rounds, 1);

		if (number % slice == 0 && number / slice < MAX_SLICES)
			ends[number / slice] = after;
	} while (after - began < vm->seconds);
	vm->elapsed = after - began;
	return NULL;
}

static void events(double seconds, bool watched, int count, char **descriptors)
{
	static struct vm vms[MAX_VMS];
	double elapsed = 0;
	size_t slices;

	if (count > MAX_VMS)
		errx(2, "%d VMs are more than %d", count, MAX_VMS);
	slice = count * 10 > SLICE ? count * 10 : SLICE;
	pthread_barrier_init(&start, NULL, count);
	for (int i = 0; i < count; i++) {
		vms[i] = (struct vm){ .fd = atoi(descriptors[i]), .watched = watched, .seconds = seconds };
		if ((errno = pthread_create(&vms[i].thread, NULL, run, &vms[i])))
			err(1, "pthread_create");
	}
	for (int i = 0; i < count; i++) {
		pthread_join(vms[i].thread, NULL);
		if (vms[i].elapsed > elapsed)
			elapsed = vms[i].elapsed;
	}
	slices = (all_rounds - 1) / slice;
	if (slices > MAX_SLICES - 1)
		slices = MAX_SLICES - 1;
	if (!slices)
		errx(1, "too few rounds to measure");
	for (size_t i = 0; i < slices; i++)
		ends[i] = ends[i + 1] - ends[i];
	printf("{\"round_us\": %.3f, \"seconds\": %.6f, \"rounds\": [", decile(ends, slices) / slice * 1e6, elapsed);
	for (int i = 0; i < count; i++)
		printf("%s%lu", i ? ", " : "", vms[i].rounds);
	printf("]}\n");
}

static void memory(int fd)
{
	struct read_command commands[COMMANDS];
	struct page_answer answer = { .header = { KVMI_READ_PHYSICAL, sizeof(answer) - sizeof(answer.header) } };
	size_t have = 0;

	for (;;) {
		size_t got = receive(fd, (char *)commands + have, 1, sizeof(commands) - have);
		size_t whole = (have + got) / sizeof(*commands);

		if (!got)
			return;
		have += got;
		for (size_t i = 0; i < whole; i++) {
			uint64_t gpa = commands[i].range.gpa;

			if (commands[i].header.id != KVMI_READ_PHYSICAL || commands[i].range.size != PAGE)
				errx(1, "a command that does not read a page");
			answer.header.seq = commands[i].header.seq;
			for (int at = 0; at < PAGE; at += sizeof(gpa))
				memcpy(answer.page + at, &gpa, sizeof(gpa));
			send_all(fd, &answer, sizeof(answer));
		}
		have -= whole * sizeof(*commands);
		memmove(commands, commands + whole, have);
	}
}

int main(int argc, char **argv)
{
	if (argc >= 4 && (!strcmp(argv[1], "events") || !strcmp(argv[1], "watched")))
		events(atof(argv[2]), argv[1][0] == 'w', argc - 3, argv + 3);
	else if (argc == 3 && !strcmp(argv[1], "memory"))
		memory(atoi(argv[2]));
	else
		errx(2, "usage: peer events|watched SECONDS FD... | peer memory FD");
}
