/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the benchmark's two C programs say to each other: messages as in <linux/kvmi.h>, of which only what is measured
 * has names here.
 */
#ifndef BENCH_WIRE_H
#define BENCH_WIRE_H

#include <err.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include <linux/kvmi.h>

enum { PAGE = 4096, CR3 = 3 };

struct cr_event {
	struct kvmi_msg_hdr header;
	struct kvmi_event common;
	struct kvmi_event_cr own;
};

struct cr_reply {
	struct kvmi_msg_hdr header;
	struct kvmi_vcpu_hdr vcpu;
	struct kvmi_event_reply common;
	struct kvmi_event_cr_reply own;
};

struct read_command {
	struct kvmi_msg_hdr header;
	struct kvmi_read_physical range;
};

struct page_answer {
	struct kvmi_msg_hdr header;
	struct kvmi_error_code error;
	uint8_t page[PAGE];
};

struct guest_info_answer {
	struct kvmi_msg_hdr header;
	struct kvmi_error_code error;
	struct kvmi_get_guest_info_reply info;
};

static inline void send_all(int fd, const void *data, size_t size)
{
	for (const char *at = data; size;) {
		ssize_t sent = send(fd, at, size, MSG_NOSIGNAL);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0)
			err(1, "send");
		at += sent;
		size -= sent;
	}
}

/* Between @least and @most bytes; fewer only if the other end closed. */
static inline size_t receive(int fd, void *data, size_t least, size_t most)
{
	size_t have = 0;

	while (have < least) {
		ssize_t got = recv(fd, (char *)data + have, most - have, 0);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			err(1, "recv");
		if (!got)
			break;
		have += got;
	}
	return have;
}

static inline double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static inline int shorter(const void *one, const void *other)
{
	double difference = *(const double *)one - *(const double *)other;

	return (difference > 0) - (difference < 0);
}

/* Of times in any order: what a tenth of them stay below. */
static inline double decile(double *times, size_t count)
{
	qsort(times, count, sizeof(*times), shorter);
	return times[count / 10];
}

#endif
