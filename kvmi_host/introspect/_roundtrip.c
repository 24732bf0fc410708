// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * The round trip of an event, compiled: what a session does for nearly every event, and nothing else.
 *
 * It judges nothing. Bytes that are not exactly one well-formed event, errors, ends, signals, and replies that change
 * something or cannot be sent at once all go to the methods _next_event and _reply of the class that is derived, which
 * do the same without this; see kvmi_host/introspect/roundtrip.py. What makes an event well-formed, and its class, is
 * taken from kvmi_host.protocol.events.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>
#include <sys/socket.h>
#include <time.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the wire is little-endian, and is read here as it comes"
#endif

enum { EVENT_REPLY = 0, EVENT = 1 };				/* message ids */
enum { UNHOOK = 0, CR = 1, MSR = 2, KINDS = 256 };		/* kinds of events */
enum { HEADER = 8, COMMON = 544, VALUE_AT = 16, VALUE = 8 };	/* sizes; where a CR's or MSR's new value is */
enum { HEAD = 16, PAGE = 4096, PAGES_AT_ONCE = 64 };		/* of an answer to READ_PHYSICAL of a page */
enum { CONTINUE = 0 };						/* action */
enum { SEQ, VCPU, KIND, MODE, BODY, FIELDS };			/* of the class Event, which is a tuple */
enum { CHUNK = 4096, LONGEST = 2000000, MOST_ARGUMENTS = 8 };	/* bytes; seconds */

struct reply {
	uint16_t id, size;
	uint32_t seq;
	uint16_t vcpu, padding1;
	uint32_t padding2;
	uint8_t action, event;
	uint16_t padding3;
	uint32_t padding4;
	uint8_t value[VALUE];
};

static PyObject *reply_name;
static PyTypeObject *event_type;
static PyObject *kinds;			/* by number: what Event.event is */
static Py_ssize_t own_sizes[KINDS];	/* of the least own data */

static uint16_t u16(const uint8_t *at)
{
	uint16_t value;

	memcpy(&value, at, sizeof(value));
	return value;
}

static uint32_t u32(const uint8_t *at)
{
	uint32_t value;

	memcpy(&value, at, sizeof(value));
	return value;
}

/* NULL without an error set: it is something else than one event that every check lets pass. */
static PyObject *event_from(const uint8_t *data, Py_ssize_t size)
{
	const uint8_t *body = data + HEADER;
	PyObject *event, *items[FIELDS];

	if (size < HEADER + COMMON || u16(data) != EVENT || u16(data + 2) != size - HEADER)
		return NULL;
	if (u16(body) != COMMON || size - HEADER - COMMON < own_sizes[body[4]])
		return NULL;
	event = event_type->tp_alloc(event_type, FIELDS);
	if (!event)
		return NULL;
	items[SEQ] = PyLong_FromUnsignedLong(u32(data + 4));
	items[VCPU] = PyLong_FromUnsignedLong(u16(body + 2));
	items[KIND] = Py_NewRef(PyTuple_GET_ITEM(kinds, body[4]));
	items[MODE] = PyLong_FromUnsignedLong(body[8]);
	items[BODY] = PyBytes_FromStringAndSize((const char *)body, size - HEADER);
	for (int i = 0; i < FIELDS; i++)
		PyTuple_SET_ITEM(event, i, items[i]);
	if (PyErr_Occurred())
		Py_CLEAR(event);
	return event;
}

PyDoc_STRVAR(event_in_doc,
"event_in(data, size, /)\n--\n\n"
"The Event that the first `size` bytes of `data` are; None if they are not exactly one.");

static PyObject *event_in(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
	Py_buffer data;
	PyObject *event;
	Py_ssize_t size;

	if (count != 2)
		return PyErr_Format(PyExc_TypeError, "event_in() takes bytes and how many of them count");
	size = PyLong_AsSsize_t(arguments[1]);
	if (PyErr_Occurred() || PyObject_GetBuffer(arguments[0], &data, PyBUF_SIMPLE))
		return NULL;
	event = event_from(data.buf, size < data.len ? size : data.len);
	PyBuffer_Release(&data);
	return event || PyErr_Occurred() ? event : Py_NewRef(Py_None);
}

/* What a kvmi_host.protocol.pages.PageReads has: answers as they have to come, a head and a page in turns. */
struct layout {
	Py_buffer heads, expected, pages;
	Py_ssize_t count, at;
};

/* Room for what comes at layout->at. */
static int list_room(const struct layout *layout, struct iovec *parts)
{
	Py_ssize_t page = layout->at / (HEAD + PAGE);
	size_t within = layout->at % (HEAD + PAGE);
	int count = 0;

	for (; page < layout->count && count < 2 * PAGES_AT_ONCE; page++) {
		parts[count++] = (struct iovec){ (char *)layout->heads.buf + page * HEAD, HEAD };
		parts[count++] = (struct iovec){ (char *)layout->pages.buf + page * PAGE, PAGE };
	}
	for (int part = 0; part < count && within; part++) {
		size_t past = within < parts[part].iov_len ? within : parts[part].iov_len;

		parts[part].iov_base = (char *)parts[part].iov_base + past;
		parts[part].iov_len -= past;
		within -= past;
	}
	return count;
}

/* As recvmsg(2), again and again while more is to come within so many milliseconds, and all heads are as expected. */
static ssize_t receive_layout(int fd, struct layout *layout, int milliseconds)
{
	Py_ssize_t began = layout->at, checked = began / (HEAD + PAGE) * HEAD, whole;
	struct iovec parts[2 * PAGES_AT_ONCE];

	while (layout->at < layout->count * (HEAD + PAGE)) {
		struct msghdr message = { .msg_iov = parts, .msg_iovlen = list_room(layout, parts) };
		struct pollfd ready = { .fd = fd, .events = POLLIN };
		ssize_t size = recvmsg(fd, &message, MSG_DONTWAIT);

		if (size < 0 && errno == EAGAIN && poll(&ready, 1, milliseconds) > 0)
			continue;
		if (size <= 0)
			return layout->at > began ? layout->at - began : size;
		layout->at += size;
		whole = (layout->at + PAGE) / (HEAD + PAGE) * HEAD;
		if (memcmp((char *)layout->heads.buf + checked, (char *)layout->expected.buf + checked, whole - checked))
			break;
		checked = whole;
	}
	return layout->at - began;
}

PyDoc_STRVAR(receive_pages_doc,
"receive_pages(fd, reads, milliseconds, /)\n--\n\n"
"Receive the answers to a kvmi_host.protocol.pages.PageReads to where they belong, as long as they are good ones and\n"
"none takes longer than this to come: how many bytes; 0 at the end.\n\n"
":raise OSError: as recvmsg(2).");

static PyObject *receive_pages(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
	PyObject *heads = NULL, *expected = NULL, *pages = NULL, *at = NULL, *result = NULL;
	struct layout layout = { 0 };
	int fd, milliseconds;
	ssize_t size;

	if (count != 3)
		return PyErr_Format(PyExc_TypeError, "receive_pages() takes a descriptor, PageReads and milliseconds");
	fd = PyLong_AsLong(arguments[0]);
	milliseconds = PyLong_AsLong(arguments[2]);
	if (PyErr_Occurred())
		return NULL;
	heads = PyObject_GetAttrString(arguments[1], "heads");
	expected = heads ? PyObject_GetAttrString(arguments[1], "expected") : NULL;
	pages = expected ? PyObject_GetAttrString(arguments[1], "pages") : NULL;
	at = pages ? PyObject_GetAttrString(arguments[1], "at") : NULL;
	if (!at || PyObject_GetBuffer(heads, &layout.heads, PyBUF_WRITABLE) ||
	    PyObject_GetBuffer(expected, &layout.expected, PyBUF_SIMPLE) ||
	    PyObject_GetBuffer(pages, &layout.pages, PyBUF_WRITABLE))
		goto out;
	layout.at = PyLong_AsSsize_t(at);
	layout.count = layout.pages.len / PAGE;
	if (layout.at < 0 || layout.heads.len < layout.count * HEAD || layout.expected.len < layout.count * HEAD) {
		if (!PyErr_Occurred())
			PyErr_SetString(PyExc_ValueError, "heads and pages are not as many");
		goto out;
	}
	Py_BEGIN_ALLOW_THREADS
	size = receive_layout(fd, &layout, milliseconds);
	Py_END_ALLOW_THREADS
	result = size < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromSsize_t(size);
out:
	PyBuffer_Release(&layout.heads);
	PyBuffer_Release(&layout.expected);
	PyBuffer_Release(&layout.pages);
	Py_XDECREF(at);
	Py_XDECREF(pages);
	Py_XDECREF(expected);
	Py_XDECREF(heads);
	return result;
}

/* @fd: the session's socket; negative if everything is to be done in Python. */
struct replying {
	PyObject_HEAD
	int fd;
};

/*
 * @direct: nothing received is left in Python, so that the next bytes begin a message; events are those of dialect v6.
 * @due: while so, the number that the next event has to have.
 * @timeout: of the session, in seconds.
 * @patience: the socket's own timeout in seconds.
 */
struct round_trip {
	struct replying base;
	char direct;
	unsigned int due;
	double timeout, patience;
};

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static bool set_patience(struct round_trip *self, double seconds)
{
	long long microseconds = seconds * 1e6 + 1; /* 0 would be for ever */
	struct timeval timeout = { .tv_sec = microseconds / 1000000, .tv_usec = microseconds % 1000000 };

	if (setsockopt(self->base.fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout)))
		return false;
	self->patience = seconds;
	return true;
}

PyDoc_STRVAR(next_event_doc,
"next_event(timeout=None)\n--\n\n"
"The next event, or None when `timeout` seconds have passed without one.\n\n"
":param timeout: None is the session's own timeout; 0 only looks.\n"
":raise SessionClosed: the peer is gone and every event it sent was taken.");

static PyObject *next_event(PyObject *object, PyObject *const *arguments, Py_ssize_t count, PyObject *names)
{
	struct round_trip *self = (struct round_trip *)object;
	PyObject *timeout = Py_None, *event;
	uint8_t data[CHUNK];
	double wait, began;
	ssize_t size;

	if (count + (names ? PyTuple_GET_SIZE(names) : 0) == 1 &&
	    (count || PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, 0), "timeout") == 0))
		timeout = arguments[0];
	else if (count || names)
		return PyErr_Format(PyExc_TypeError, "next_event() takes nothing but a timeout");
	wait = timeout == Py_None ? self->timeout : PyFloat_AsDouble(timeout);
	if (PyErr_Occurred())
		return NULL;
	if (!self->direct || self->base.fd < 0 || !(wait < LONGEST))
		return PyObject_CallMethod(object, "_next_event", "d", wait);
	if (wait > 0 && wait != self->patience && !set_patience(self, wait))
		return PyObject_CallMethod(object, "_next_event", "d", wait);

	began = now();
	Py_BEGIN_ALLOW_THREADS
	size = recv(self->base.fd, data, sizeof(data), wait > 0 ? 0 : MSG_DONTWAIT);
	Py_END_ALLOW_THREADS
	if (size >= HEADER && u32(data + 4) == self->due) {
		event = event_from(data, size);
		if (event)
			self->due++;
		if (event || PyErr_Occurred())
			return event;
	} else if (size < 0 && errno == EAGAIN) {
		Py_RETURN_NONE;
	} else if (size < 0 && errno == EINTR && PyErr_CheckSignals()) {
		return NULL;
	}
	/* What ended the session does so again. */
	return PyObject_CallMethod(object, "_next_event", "dy#", wait - (now() - began), data, size > 0 ? size : 0);
}

/* An Event can be put together by hand, with anything in it. */
static bool is_whole(PyObject *event)
{
	return PyTuple_GET_SIZE(event) == FIELDS && PyBytes_CheckExact(PyTuple_GET_ITEM(event, BODY));
}

/* The size of the reply that changes nothing; 0 if this event has none, or one that takes more thought. */
static size_t encode_reply(PyObject *event, PyObject *action, struct reply *reply)
{
	PyObject *body = PyTuple_GET_ITEM(event, BODY);
	unsigned long seq = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(event, SEQ));
	unsigned long vcpu = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(event, VCPU));
	unsigned long kind = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(event, KIND));
	unsigned long what = action ? PyLong_AsUnsignedLong(action) : CONTINUE;
	size_t size = sizeof(*reply) - VALUE;

	if (PyErr_Occurred()) {
		PyErr_Clear();
		return 0;
	}
	if (kind == UNHOOK || kind > UINT8_MAX || what > UINT8_MAX || vcpu > UINT16_MAX || seq > UINT32_MAX)
		return 0;
	*reply = (struct reply){ .id = EVENT_REPLY, .seq = seq, .vcpu = vcpu, .action = what, .event = kind };
	if (kind == CR || kind == MSR) {
		const uint8_t *data = (const uint8_t *)PyBytes_AS_STRING(body);
		Py_ssize_t length = PyBytes_GET_SIZE(body);

		if (length < COMMON || length < u16(data) + VALUE_AT + VALUE)
			return 0;
		memcpy(reply->value, data + u16(data) + VALUE_AT, VALUE);
		size += VALUE;
	}
	reply->size = size - HEADER;
	return size;
}

PyDoc_STRVAR(reply_doc,
"reply(event, action=Action.CONTINUE, *, new_val=None, page_fault=None)\n--\n\n"
"Answer an event, and let its vCPU go on.\n\n"
":param new_val: for CR and MSR: the value to write instead of the guest's own.\n"
":param page_fault: for PF: how the access is made.\n"
":raise ValueError: the event has no reply, or takes no such data.");

static PyObject *reply(PyObject *object, PyObject *const *arguments, Py_ssize_t count, PyObject *names)
{
	int fd = ((struct replying *)object)->fd;
	bool plain = !names && (count == 1 || count == 2) && PyObject_TypeCheck(arguments[0], event_type);
	PyObject *call[2 + MOST_ARGUMENTS] = { NULL, object };
	Py_ssize_t all = count + (names ? PyTuple_GET_SIZE(names) : 0);
	struct reply reply;
	size_t size;

	if (fd >= 0 && plain && is_whole(arguments[0])) {
		size = encode_reply(arguments[0], count > 1 ? arguments[1] : NULL, &reply);
		ssize_t sent = size ? send(fd, &reply, size, MSG_NOSIGNAL | MSG_DONTWAIT) : 0;

		if (sent > 0 && (size_t)sent == size)
			Py_RETURN_NONE;
		if (sent > 0)
			return PyObject_CallMethod(object, "send_raw", "y#", (char *)&reply + sent, size - sent);
	}
	if (all > MOST_ARGUMENTS)
		return PyErr_Format(PyExc_TypeError, "reply() takes at most %d arguments", MOST_ARGUMENTS);
	memcpy(call + 2, arguments, all * sizeof(*call));
	return PyObject_VectorcallMethod(reply_name, call + 1, (1 + count) | PY_VECTORCALL_ARGUMENTS_OFFSET, names);
}

static PyMethodDef replying_methods[] = {
	{ "reply", (PyCFunction)(void (*)(void))reply, METH_FASTCALL | METH_KEYWORDS, reply_doc },
	{ 0 }
};

static PyMemberDef replying_members[] = {
	{ "_fd", T_INT, offsetof(struct replying, fd), 0, NULL },
	{ 0 }
};

static PyTypeObject replying_type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "kvmi_host.introspect._roundtrip.Replying",
	.tp_doc = "Answers to events, compiled.",
	.tp_basicsize = sizeof(struct replying),
	.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.tp_new = PyType_GenericNew,
	.tp_methods = replying_methods,
	.tp_members = replying_members,
};

static PyMethodDef round_trip_methods[] = {
	{ "next_event", (PyCFunction)(void (*)(void))next_event, METH_FASTCALL | METH_KEYWORDS, next_event_doc },
	{ 0 }
};

static PyMemberDef round_trip_members[] = {
	{ "_due", T_UINT, offsetof(struct round_trip, due), 0, NULL },
	{ "_direct", T_BOOL, offsetof(struct round_trip, direct), 0, NULL },
	{ "timeout", T_DOUBLE, offsetof(struct round_trip, timeout), 0, "The deadline of a command in seconds." },
	{ 0 }
};

static PyTypeObject round_trip_type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "kvmi_host.introspect._roundtrip.RoundTrip",
	.tp_doc = "The round trip of an event, compiled.",
	.tp_base = &replying_type,
	.tp_basicsize = sizeof(struct round_trip),
	.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.tp_methods = round_trip_methods,
	.tp_members = round_trip_members,
};

static int load(PyObject *module)
{
	PyObject *events = PyImport_ImportModule("kvmi_host.protocol.events");
	PyObject *type = events ? PyObject_GetAttrString(events, "Event") : NULL;
	PyObject *sizes = type ? PyObject_GetAttrString(type, "own_sizes") : NULL;

	kinds = sizes ? PyObject_GetAttrString(events, "_KINDS") : NULL;
	reply_name = PyUnicode_InternFromString("_reply");
	event_type = (PyTypeObject *)type;
	if (kinds && (!PyType_Check(type) || !PyType_IsSubtype(event_type, &PyTuple_Type) ||
		      event_type->tp_basicsize != PyTuple_Type.tp_basicsize ||
		      !PyTuple_Check(kinds) || PyTuple_GET_SIZE(kinds) != KINDS ||
		      !PyTuple_Check(sizes) || PyTuple_GET_SIZE(sizes) != KINDS))
		PyErr_SetString(PyExc_ImportError, "this was compiled for another kvmi_host.protocol.events");
	for (int kind = 0; kind < KINDS && !PyErr_Occurred(); kind++)
		own_sizes[kind] = PyLong_AsSsize_t(PyTuple_GET_ITEM(sizes, kind));
	Py_XDECREF(sizes);
	Py_XDECREF(events);
	if (PyErr_Occurred() || PyModule_AddType(module, &replying_type))
		return -1;
	return PyModule_AddType(module, &round_trip_type);
}

static PyMethodDef methods[] = {
	{ "receive_pages", (PyCFunction)(void (*)(void))receive_pages, METH_FASTCALL, receive_pages_doc },
	{ "event_in", (PyCFunction)(void (*)(void))event_in, METH_FASTCALL, event_in_doc },
	{ 0 }
};

static PyModuleDef_Slot slots[] = { { Py_mod_exec, load }, { 0 } };

static struct PyModuleDef module = {
	PyModuleDef_HEAD_INIT,
	.m_name = "_roundtrip",
	.m_doc = "The round trip of an event, compiled.",
	.m_methods = methods,
	.m_slots = slots,
};

PyMODINIT_FUNC PyInit__roundtrip(void)
{
	return PyModuleDef_Init(&module);
}
