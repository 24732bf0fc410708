/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * KVM introspection: the hooks in x86 code.
 *
 * A hook costs an un-hooked VM one load and one branch.
 */
#ifndef __KVM_X86_KVMI_H
#define __KVM_X86_KVMI_H

#include <linux/kvm_host.h>
#include <uapi/linux/kvmi.h>

void __kvmi_cr_write(struct kvm_vcpu *vcpu, unsigned int cr,
		     unsigned long old_value, unsigned long *new_value);
bool __kvmi_hypercall(struct kvm_vcpu *vcpu);

static inline bool kvmi_hooked(struct kvm_vcpu *vcpu)
{
	return unlikely(rcu_access_pointer(vcpu->kvm->kvmi.session));
}

/* Must writes to CR @cr exit for the introspector's sake? */
static inline bool kvmi_wants_cr(struct kvm_vcpu *vcpu, unsigned int cr)
{
	return unlikely(vcpu->kvmi.cr_writes & BIT(cr));
}

/* The guest is about to change a control register: the value may be replaced. */
static inline void kvmi_cr_write(struct kvm_vcpu *vcpu, unsigned int cr,
				 unsigned long old_value,
				 unsigned long *new_value)
{
	if (kvmi_hooked(vcpu))
		__kvmi_cr_write(vcpu, cr, old_value, new_value);
}

/* Returns true if the hypercall was one for the introspector, and is done. */
static inline bool kvmi_hypercall(struct kvm_vcpu *vcpu)
{
	return kvmi_hooked(vcpu) && __kvmi_hypercall(vcpu);
}

/* What could not be changed while the guest's own guest ran is changed now. */
static inline void kvmi_leave_guest_mode(struct kvm_vcpu *vcpu)
{
	if (kvmi_hooked(vcpu) || unlikely(vcpu->kvmi.cr_writes))
		kvm_make_request(KVM_REQ_INTROSPECTION, vcpu);
}

#endif /* __KVM_X86_KVMI_H */
