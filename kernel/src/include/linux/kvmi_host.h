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

/* Embedded in struct kvm. */
struct kvmi_vm {
	/* Serializes the begin of a session with the end of the last one. */
	struct mutex lock;
	/* Written under @lock, read under RCU. */
	struct kvmi __rcu *session;
};

/* Embedded in struct kvm_vcpu; touched by the vCPU's thread alone. */
struct kvmi_vcpu_host {
	/* Bit n: writes to CRn must exit, whether or not KVM needs it. */
	unsigned long cr_writes;
	/* The reply to an event moved rip; see kvmi_handle_request(). */
	bool rip_moved;
	unsigned long rip;
};

void kvmi_init_vm(struct kvm *kvm);
void kvmi_release_vm(struct kvm *kvm);
void kvmi_vcpu_created(struct kvm_vcpu *vcpu);
int kvmi_capability(void);
bool kvmi_is_ioctl(unsigned int ioctl);
long kvmi_vm_ioctl(struct kvm *kvm, unsigned int ioctl, void __user *argp);
void kvmi_handle_request(struct kvm_vcpu *vcpu);

#endif /* __KVMI_HOST_H */
