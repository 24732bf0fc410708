/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * KVM introspection: the messages between the kernel and an introspector,
 * and the ioctls that hand a socket to the kernel.
 */
#ifndef _UAPI__LINUX_KVMI_H
#define _UAPI__LINUX_KVMI_H

#include <linux/types.h>
#include <linux/kvm.h>
#include <asm/kvmi.h>

#define KVMI_VERSION 0x00000001

/* KVM_CHECK_EXTENSION numbers; mainline x86 answers 0 to both. */
#define KVM_CAP_INTROSPECTION		180
#define KVM_CAP_INTROSPECTION_V6	999

/* The message is an introspection command, unless said otherwise. */
enum {
	KVMI_EVENT_REPLY		= 0,	/* the answer to an event */
	KVMI_EVENT			= 1,	/* kernel to introspector */
	KVMI_GET_VERSION		= 2,
	KVMI_CHECK_COMMAND		= 3,
	KVMI_CHECK_EVENT		= 4,
	KVMI_GET_GUEST_INFO		= 5,
	KVMI_GET_VCPU_INFO		= 6,
	KVMI_PAUSE_VCPU			= 7,
	KVMI_CONTROL_VM_EVENTS		= 8,
	KVMI_CONTROL_EVENTS		= 9,
	KVMI_CONTROL_CR			= 10,
	KVMI_CONTROL_MSR		= 11,
	KVMI_CONTROL_VE			= 12,
	KVMI_GET_REGISTERS		= 13,
	KVMI_SET_REGISTERS		= 14,
	KVMI_GET_CPUID			= 15,
	KVMI_GET_XSAVE			= 16,
	KVMI_READ_PHYSICAL		= 17,
	KVMI_WRITE_PHYSICAL		= 18,
	KVMI_INJECT_EXCEPTION		= 19,
	KVMI_GET_PAGE_ACCESS		= 20,
	KVMI_SET_PAGE_ACCESS		= 21,
	KVMI_GET_MAP_TOKEN		= 22,
	KVMI_GET_MTRR_TYPE		= 23,
	KVMI_CONTROL_CMD_RESPONSE	= 27,
	KVMI_GET_MAX_GFN		= 29,

	KVMI_NUM_MESSAGES
};

enum {
	KVMI_EVENT_UNHOOK	= 0,
	KVMI_EVENT_CR		= 1,
	KVMI_EVENT_MSR		= 2,
	KVMI_EVENT_XSETBV	= 3,
	KVMI_EVENT_BREAKPOINT	= 4,
	KVMI_EVENT_HYPERCALL	= 5,
	KVMI_EVENT_PF		= 6,
	KVMI_EVENT_TRAP		= 7,
	KVMI_EVENT_DESCRIPTOR	= 8,
	KVMI_EVENT_CREATE_VCPU	= 9,
	KVMI_EVENT_PAUSE_VCPU	= 10,
	KVMI_EVENT_SINGLESTEP	= 11,

	KVMI_NUM_EVENTS
};

#define KVMI_EVENT_ACTION_CONTINUE	0
#define KVMI_EVENT_ACTION_RETRY		1
#define KVMI_EVENT_ACTION_CRASH		2

/* The largest payload: what follows the header of any message. */
#define KVMI_MSG_SIZE	(4096 * 2 - sizeof(struct kvmi_msg_hdr))

struct kvmi_msg_hdr {
	__u16 id;
	__u16 size;	/* of what follows */
	__u32 seq;
};

struct kvmi_error_code {
	__s32 err;
	__u32 padding;
};

struct kvmi_vcpu_hdr {
	__u16 vcpu;
	__u16 padding1;
	__u32 padding2;
};

struct kvmi_get_version_reply {
	__u32 version;
	__u32 padding;
};

struct kvmi_check {
	__u16 id;
	__u16 padding1;
	__u32 padding2;
};

struct kvmi_get_guest_info_reply {
	__u32 vcpu_count;
	__u32 padding[3];
};

struct kvmi_get_vcpu_info_reply {
	__u64 tsc_speed;	/* Hz */
};

struct kvmi_pause_vcpu {
	__u8 wait;
	__u8 padding1;
	__u16 padding2;
	__u32 padding3;
};

struct kvmi_control_events {
	__u16 event_id;
	__u8 enable;
	__u8 padding1;
	__u32 padding2;
};

struct kvmi_control_cmd_response {
	__u8 enable;
	__u8 now;
	__u16 padding1;
	__u32 padding2;
};

struct kvmi_read_physical {
	__u64 gpa;
	__u64 size;
};

struct kvmi_write_physical {
	__u64 gpa;
	__u64 size;
	__u8 data[];
};

struct kvmi_get_max_gfn_reply {
	__u64 gfn;
};

#define KVMI_PAGE_ACCESS_R	0x1
#define KVMI_PAGE_ACCESS_W	0x2
#define KVMI_PAGE_ACCESS_X	0x4

struct kvmi_get_page_access {
	__u16 view;
	__u16 count;
	__u32 padding;
	__u64 gpa[];
};

struct kvmi_page_access_entry {
	__u64 gpa;
	__u8 access;
	__u8 padding1;
	__u16 padding2;
	__u32 padding3;
};

struct kvmi_set_page_access {
	__u16 view;
	__u16 count;
	__u32 padding;
	struct kvmi_page_access_entry entries[];
};

struct kvmi_event_pf {
	__u64 gva;	/* all ones: not known */
	__u64 gpa;
	__u8 access;	/* what was tried */
	__u8 padding1;
	__u16 view;
	__u32 padding2;
};

struct kvmi_event_pf_reply {
	__u64 ctx_addr;
	__u32 ctx_size;
	__u8 singlestep;
	__u8 rep_complete;
	__u16 padding;
	__u8 ctx_data[256];	/* what is read at @ctx_addr by emulation */
};

struct kvmi_event {
	__u16 size;	/* of this structure */
	__u16 vcpu;
	__u8 event;
	__u8 padding[3];
	struct kvmi_event_arch arch;
};

struct kvmi_event_reply {
	__u8 action;
	__u8 event;
	__u16 padding1;
	__u32 padding2;
};

struct kvm_introspection_hook {
	__s32 fd;
	__u32 flags;
	__u8 uuid[16];
};

/* kvm_introspection_hook.flags: the session cannot change the guest. */
#define KVM_INTROSPECTION_OBSERVE	0x1

struct kvm_introspection_feature {
	__u32 allow;
	__s32 id;	/* -1: all */
};

#define KVM_INTROSPECTION_HOOK	_IOW(KVMIO, 0xff, struct kvm_introspection_hook)
#define KVM_INTROSPECTION_UNHOOK	_IO(KVMIO, 0xfe)
#define KVM_INTROSPECTION_COMMAND \
	_IOW(KVMIO, 0xfd, struct kvm_introspection_feature)
#define KVM_INTROSPECTION_EVENT \
	_IOW(KVMIO, 0xfc, struct kvm_introspection_feature)
#define KVM_INTROSPECTION_FORCE_UNHOOK	_IO(KVMIO, 0xfb)

#endif /* _UAPI__LINUX_KVMI_H */
