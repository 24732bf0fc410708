/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * KVM introspection: what its own files share.
 *
 * kvmi.c      sessions: hook and unhook, vCPU jobs, waiting for a reply
 * kvmi_msg.c  the wire: framing, dispatch, commands, events and replies
 * arch/x86/kvm/kvmi.c         the state of a vCPU, x86 commands, intercepts
 * arch/x86/kvm/kvmi_events.c  what a guest does that makes an event
 * arch/x86/kvm/kvmi_step.c    single steps
 * arch/x86/kvm/mmu/kvmi.c     access to pages
 *
 * Life of a session: KVM_INTROSPECTION_HOOK makes it and starts its receiving
 * thread. The session ends when nothing more is read: the peer closed the
 * socket or broke the protocol, or a forced unhook or the release of the VM
 * shut the socket down. Whoever has a reason to end a session shuts its socket
 * down and goes on; only the receiving thread takes it apart.
 *
 * What comes from the peer is read by the receiving thread or, so that a reply
 * needs one wake-up and not two, by a vCPU that waits for one. Either serves
 * whatever it reads.
 *
 * Everybody else holds a reference while it uses the session (kvmi_get()); a
 * vCPU thread does so inside a hook only. The receiving thread holds the VM
 * and the module for as long as it runs.
 */
#ifndef __KVMI_INT_H
#define __KVMI_INT_H

#include <linux/completion.h>
#include <linux/kvm_host.h>
#include <linux/net.h>
#include <linux/refcount.h>
#include <linux/uuid.h>
#include <linux/wait.h>
#include <linux/xarray.h>
#include <uapi/linux/kvmi.h>

/* Messages that may wait for their vCPU; a command too many gets -EBUSY. */
#define KVMI_MAX_JOBS		1024
/* The receiving thread is to send the UNHOOK event; it has been told so. */
#define KVMI_ASK_UNHOOK		0
#define KVMI_ASKED_UNHOOK	1
/* PAUSE events that one vCPU may owe; a command too many gets -EBUSY. */
#define KVMI_MAX_PAUSES		1000

struct kvmi {
	refcount_t refs;
	struct rcu_head rcu;

	/* Constant. */
	struct kvm *kvm;
	struct socket *sock;
	uuid_t uuid;
	bool observe;

	/* Set once, by the receiving thread, before it wakes the waiters. */
	bool ended;
	/* Bits of KVMI_ASK_*. */
	unsigned long asked;
	/* The receiving thread has taken the session off the VM. */
	struct completion done;

	/*
	 * A message goes out whole, and event numbers leave in their order.
	 * Taken killably: a peer that does not read stops whoever sends to it.
	 */
	struct mutex send_lock;
	u32 ev_seq;	/* the last one used; under @send_lock */

	/* Set and tested by atomic bit operations. */
	DECLARE_BITMAP(cmd_allowed, KVMI_NUM_MESSAGES);
	DECLARE_BITMAP(event_allowed, KVMI_NUM_EVENTS);
	DECLARE_BITMAP(vm_events, KVMI_NUM_EVENTS);

	/* struct kvmi_vcpu by vCPU index, each made when first needed. */
	struct xarray vcpus;

	/*
	 * KVMI_PAGE_ACCESS_* of the pages that are watched, by frame number.
	 * Changed before mappings are dropped, read by whoever makes one.
	 */
	struct xarray access;
	/* The vCPU that makes an access by itself while all others stand. */
	struct kvm_vcpu *stepper;

	/* The receiving thread sleeps here, and hears of the socket so. */
	wait_queue_head_t wq;
	struct wait_queue_entry sock_wait;
	bool readable;	/* something may have come since it was last read */
	/* The waiting vCPU, if any, that is woken up in its place. */
	struct kvmi_vcpu *reader;

	/* Protects the rest; held while a message is read and served. */
	struct mutex recv_lock;
	bool finished;	/* nothing more is read */
	bool answers_off;
	/* There may be more than a message: @received bytes from @msg on. */
	size_t received;
	u8 msg[sizeof(struct kvmi_msg_hdr) + KVMI_MSG_SIZE] __aligned(8);
	u8 page[PAGE_SIZE];
};

/* A message for a vCPU, on its way to the vCPU's thread. */
struct kvmi_job {
	struct list_head link;
	bool no_answer;		/* answers were off when it was received */
	struct kvmi_msg_hdr hdr;
	u8 payload[] __aligned(8);	/* struct kvmi_vcpu_hdr and the rest */
};

/* The reply that a vCPU waits for. */
struct kvmi_vcpu_reply {
	u32 seq;
	unsigned long actions;	/* bit n: the event accepts action n */
	int error;		/* 0: a valid one is here */
	u8 action;
	void *data;		/* where its own data goes, @size bytes */
	const void *same;	/* the own data that changes nothing */
	size_t size;
	bool (*valid)(const void *data);	/* NULL: any own data is */
};

struct kvmi_vcpu {
	/* Protects jobs, njobs, pauses and waiting. */
	spinlock_t lock;
	struct list_head jobs;
	unsigned int njobs;
	unsigned int pauses;
	bool waiting;		/* for a reply: written by its own thread */

	/* The vCPU's thread sleeps here while it waits for a reply. */
	wait_queue_head_t wq;

	/* Of the vCPU's thread alone, from here on. */
	struct kvmi_vcpu_reply reply;
	bool begun;			/* nothing is left of an earlier session */
	bool announced;			/* CREATE_VCPU has been sent */
	bool have_regs;			/* SET_REGISTERS came while waiting: */
	struct kvm_regs regs;
	unsigned long cr_writes;	/* bit n: CONTROL_CR asked for CRn */
	unsigned long *msr_writes;	/* what CONTROL_MSR asked for, or NULL */
	bool msrs_changed;		/* since it was last looked at */
	struct kvmi_inject_exception exception;
	bool inject;			/* @exception is to be injected */
	DECLARE_BITMAP(events, KVMI_NUM_EVENTS);
};

/* What it takes to answer a message. */
struct kvmi_ctx {
	struct kvmi *kvmi;
	const struct kvmi_msg_hdr *hdr;
	bool no_answer;
};

/* kvmi.c */
struct kvmi *kvmi_get(struct kvm *kvm);
void kvmi_put(struct kvmi *kvmi);
void kvmi_shutdown(struct kvmi *kvmi);
void kvmi_leave(struct kvm *kvm, bool insist);
struct kvmi_vcpu *kvmi_vcpu_state(struct kvmi *kvmi, struct kvm_vcpu *vcpu);
int kvmi_add_job(struct kvmi *kvmi, struct kvm_vcpu *vcpu,
		 struct kvmi_job *job);
int kvmi_add_pause(struct kvmi *kvmi, struct kvm_vcpu *vcpu, bool wait);
void kvmi_kick_all(struct kvmi *kvmi);
bool kvmi_event_on(struct kvmi *kvmi, struct kvmi_vcpu *iv, unsigned int id);
void kvmi_begin_wait(struct kvmi_vcpu *iv);
void kvmi_end_wait(struct kvmi_vcpu *iv, struct kvm_vcpu *vcpu);
int kvmi_wait_for_reply(struct kvmi *kvmi, struct kvmi_vcpu *iv,
			struct kvm_vcpu *vcpu);

/* kvmi_msg.c */
int kvmi_receive(struct kvmi *kvmi);
bool kvmi_has_more(struct kvmi *kvmi);
int kvmi_run_job(struct kvmi *kvmi, struct kvmi_vcpu *iv,
		 struct kvm_vcpu *vcpu, const struct kvmi_job *job);
int kvmi_answer(const struct kvmi_ctx *ctx, int err, const void *data,
		size_t size);
int kvmi_event(struct kvmi *kvmi, struct kvmi_vcpu *iv, struct kvm_vcpu *vcpu,
	       unsigned int id, const void *data, size_t size,
	       const struct kvmi_vcpu_reply *expect);
bool kvmi_wants_unhook(struct kvmi *kvmi);
int kvmi_event_unhook(struct kvmi *kvmi);
bool kvmi_command_served(unsigned int id);
bool kvmi_command_changes_guest(unsigned int id);
bool kvmi_event_served(unsigned int id);

/* arch/x86/kvm/kvmi.c */
void kvmi_arch_use(void);
bool kvmi_in_view(struct kvm_vcpu *vcpu);
void kvmi_arch_fill_event(struct kvm_vcpu *vcpu, struct kvmi_event_arch *ev);
void kvmi_arch_set_regs(struct kvm_vcpu *vcpu, const struct kvm_regs *regs);
void kvmi_arch_finish_regs(struct kvm_vcpu *vcpu);
void kvmi_arch_intercept(struct kvmi *kvmi, struct kvmi_vcpu *iv,
			 struct kvm_vcpu *vcpu);
bool kvmi_arch_vcpu_started(struct kvm_vcpu *vcpu);
u64 kvmi_arch_tsc_hz(struct kvm_vcpu *vcpu);
bool kvmi_arch_event_served(unsigned int id);
int kvmi_arch_control_cr(struct kvmi_vcpu *iv, const struct kvmi_control_cr *cmd);
int kvmi_arch_control_msr(struct kvmi_vcpu *iv,
			  const struct kvmi_control_msr *cmd);
int kvmi_arch_get_registers(const struct kvmi_ctx *ctx, struct kvm_vcpu *vcpu,
			    const struct kvmi_get_registers *cmd, size_t size);
int kvmi_arch_get_cpuid(struct kvm_vcpu *vcpu, const struct kvmi_get_cpuid *cmd,
			struct kvmi_get_cpuid_reply *rpl);
int kvmi_arch_inject_exception(struct kvmi_vcpu *iv,
			       const struct kvmi_inject_exception *cmd);
int kvmi_arch_mtrr_type(struct kvm *kvm, gpa_t gpa, u8 *type);

/* arch/x86/kvm/kvmi_events.c */
int kvmi_exit_event(struct kvm_vcpu *vcpu, unsigned int id, const void *data,
		    size_t size, const struct kvmi_vcpu_reply *expect);
bool kvmi_can_inject(struct kvm_vcpu *vcpu);
void kvmi_inject(struct kvmi *kvmi, struct kvmi_vcpu *iv,
		 struct kvm_vcpu *vcpu);

/* arch/x86/kvm/kvmi_step.c */
unsigned int kvmi_next_opcode(struct kvm_vcpu *vcpu);
void kvmi_start_step(struct kvmi *kvmi, struct kvm_vcpu *vcpu, gfn_t gfn);
bool kvmi_owes_step(struct kvm_vcpu *vcpu, gfn_t gfn);
void kvmi_end_step(struct kvmi *kvmi, struct kvm_vcpu *vcpu);
bool kvmi_held(struct kvmi *kvmi, struct kvm_vcpu *vcpu);

/* arch/x86/kvm/mmu/kvmi.c */
bool kvmi_page_access_valid(u8 access);
u8 kvmi_get_access(struct kvmi *kvmi, gfn_t gfn);
int kvmi_set_access(struct kvmi *kvmi, gfn_t gfn, u8 access);
void kvmi_open_page(struct kvmi *kvmi, gfn_t gfn);
void kvmi_close_pages(struct kvmi *kvmi);
void kvmi_forget_pages(struct kvmi *kvmi);
void kvmi_page_written(struct kvm *kvm, gfn_t gfn);

#endif /* __KVMI_INT_H */
