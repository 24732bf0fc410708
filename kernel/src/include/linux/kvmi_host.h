/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * KVM introspection: what the rest of KVM sees of it.
 */
#ifndef __KVMI_HOST_H
#define __KVMI_HOST_H

#include <linux/mutex.h>
#include <linux/rcupdate.h>
#include <linux/types.h>

/*
 * Tells the three modules from the kernel's own: modinfo shows it, and dkms
 * would not put a module in the place of one with the same version, or none.
 */
#define KVMI_MODULE_VERSION	"kvmi"

struct kvm;
struct kvm_vcpu;
struct kvmi;
struct kvmi_event_pf_reply;

/* Embedded in struct kvm. */
struct kvmi_vm {
	/* Serializes the begin of a session with the end of the last one. */
	struct mutex lock;
	/* Written under @lock, read under RCU. */
	struct kvmi __rcu *session;
};

/*
 * Embedded in struct kvm_vcpu; touched by the vCPU's thread alone.
 *
 * @events, @cr_writes, @msr_writes and @step are what the guest is intercepted
 * for, whether or not KVM needs it: see kvmi_handle_request().
 */
struct kvmi_vcpu_host {
	unsigned long events;		/* bit n: event n is wanted */
	unsigned long cr_writes;	/* bit n: writes to CRn */
	unsigned long *msr_writes;	/* NULL: none; see kvmi_msr_index() */
	bool step;			/* stop after each instruction */

	/* An instruction has been done since @step was set. */
	bool stepped;
	/* AMD: the guest runs with a trap flag that is not its own, */
	bool own_tf;
	/* and its next instruction loads its flags. */
	bool loads_flags;

	/* The request is to be handled once more after the next exit. */
	bool again;
	/* A #BP or #OF is injected where no instruction makes one. */
	bool no_skip;
	/* The reply to an event moved rip. */
	bool rip_moved;
	unsigned long rip;

	/* While the access of a PF event is emulated. */
	const struct kvmi_event_pf_reply *pf;
	u64 pf_gfn;
	/* A step over an access, put off because another vCPU made one. */
	bool step_owed;
	u64 step_gfn;
	unsigned long step_rip;
};

void kvmi_init_vm(struct kvm *kvm);
void kvmi_release_vm(struct kvm *kvm);
void kvmi_vcpu_created(struct kvm_vcpu *vcpu);
void kvmi_vcpu_destroyed(struct kvm_vcpu *vcpu);
int kvmi_capability(void);
bool kvmi_is_ioctl(unsigned int ioctl);
long kvmi_vm_ioctl(struct kvm *kvm, unsigned int ioctl, void __user *argp);
void kvmi_set_memory_region(struct kvm *kvm, u64 gpa, u64 size, u32 flags);
void kvmi_handle_request(struct kvm_vcpu *vcpu);

#endif /* __KVMI_HOST_H */
