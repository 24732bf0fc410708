// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * client: the least that an introspector has to do, which is what others are measured by.
 *
 *   client events FD           read seq, vcpu, event, mode, rip and cr3 of each event, answer it CONTINUE
 *   client memory FD BYTES     read guest memory from address 0, in chunks of CHUNK; prints as JSON what a chunk took in
 *                              microseconds: one of the fastest tenth, see peer.c
 */
#include <fcntl.h>
#include <poll.h>

#include "wire.h"

enum { CHUNK = 1 << 20, PAGES = CHUNK / PAGE, MAX_CHUNKS = 4096 };

volatile uint64_t seen[6]; /* what a handler would look at */

static void events(int fd)
{
	static struct cr_event event;

	while (receive(fd, &event, sizeof(event), sizeof(event)) == sizeof(event)) {
		seen[0] = event.header.seq;
		seen[1] = event.common.vcpu;
		seen[2] = event.common.event;
		seen[3] = event.common.arch.mode;
		seen[4] = event.common.arch.regs.rip;
		seen[5] = event.common.arch.sregs.cr3;
		if (event.header.id != KVMI_EVENT || event.common.event != KVMI_EVENT_CR)
			errx(1, "not a CR event");

		const struct cr_reply reply = {
			.header = { KVMI_EVENT_REPLY, sizeof(reply) - sizeof(reply.header), event.header.seq },
			.vcpu.vcpu = event.common.vcpu,
			.common = { KVMI_EVENT_ACTION_CONTINUE, KVMI_EVENT_CR },
			.own.new_val = event.own.new_value,
		};
		send_all(fd, &reply, sizeof(reply));
	}
}

/* Commands are sent as the socket takes them, while answers come. */
static void read_chunk(int fd, uint64_t gpa, uint32_t seq, uint8_t *memory)
{
	static struct read_command commands[PAGES];
	static struct page_answer answers[32];
	size_t sent = 0, have = 0, taken = 0;

	for (size_t i = 0; i < PAGES; i++)
		commands[i] = (struct read_command){
			{ KVMI_READ_PHYSICAL, sizeof(commands->range), seq + i }, { gpa + i * PAGE, PAGE }
		};
	while (taken < PAGES) {
		struct pollfd socket = { .fd = fd, .events = POLLIN | (sent < sizeof(commands) ? POLLOUT : 0) };

		if (poll(&socket, 1, 10000) <= 0)
			err(1, "poll");
		if (socket.revents & POLLOUT) {
			ssize_t done = send(fd, (char *)commands + sent, sizeof(commands) - sent, MSG_NOSIGNAL);

			if (done < 0 && errno != EAGAIN)
				err(1, "send");
			sent += done > 0 ? done : 0;
		}
		if (!(socket.revents & ~POLLOUT))
			continue;
		have += receive(fd, (char *)answers + have, 1, sizeof(answers) - have);
		size_t whole = have / sizeof(*answers);
		for (size_t i = 0; i < whole; i++, taken++) {
			if (answers[i].header.seq != seq + taken || answers[i].error.err)
				errx(1, "not the answer to command %zu", seq + taken);
			memcpy(memory + taken * PAGE, answers[i].page, PAGE);
		}
		have -= whole * sizeof(*answers);
		memmove(answers, answers + whole, have);
	}
}

static void memory(int fd, size_t bytes)
{
	static double times[MAX_CHUNKS];
	static uint8_t chunk[CHUNK];
	size_t count = 0;

	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
	for (size_t gpa = 0; gpa < bytes && count < MAX_CHUNKS; gpa += CHUNK) {
		uint64_t last;
		double began = now();

		read_chunk(fd, gpa, 1 + gpa / PAGE, chunk);
		times[count++] = now() - began;
		memcpy(&last, chunk + CHUNK - sizeof(last), sizeof(last));
		if (last != gpa + CHUNK - PAGE)
			errx(1, "not the memory at %#zx", gpa);
	}
	printf("{\"chunk_us\": %.3f}\n", decile(times, count) * 1e6);
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "events"))
		events(atoi(argv[2]));
	else if (argc == 4 && !strcmp(argv[1], "memory"))
		memory(atoi(argv[2]), strtoull(argv[3], NULL, 0));
	else
		errx(2, "usage: client events FD | client memory FD BYTES");
}
