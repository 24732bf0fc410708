/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * KVM introspection: the hooks in x86 code.
 *
 * Until the first VM of the host is hooked, a hook is a no-op instruction; after
 * that, it costs an un-hooked VM one load and one branch.
 */
#ifndef __KVM_X86_KVMI_H
#define __KVM_X86_KVMI_H

#include <linux/jump_label.h>
#include <linux/kvm_host.h>
#include <uapi/linux/kvmi.h>

/* Some VM is hooked, or was. */
DECLARE_STATIC_KEY_FALSE(kvmi_used);

struct operand;
struct x86_emulate_ctxt;

/* Bit n: this CPU cannot do what it takes for event n. */
extern unsigned long kvmi_events_not_served;
extern bool kvmi_steps_by_tf;

/* kvmi.c */
void __kvmi_set_sregs(struct kvm_vcpu *vcpu, const struct kvm_sregs *sregs);

/* kvmi_events.c */
unsigned long __kvmi_cr_write(struct kvm_vcpu *vcpu, unsigned int cr,
			      unsigned long old_value, unsigned long new_value);
u64 __kvmi_msr_write(struct kvm_vcpu *vcpu, u32 msr, u64 new_value);
void __kvmi_xsetbv(struct kvm_vcpu *vcpu, u32 index, u64 value);
bool __kvmi_hypercall(struct kvm_vcpu *vcpu);
int kvmi_breakpoint(struct kvm_vcpu *vcpu, u8 insn_len);
int kvmi_descriptor(struct kvm_vcpu *vcpu, u8 descriptor, bool write);
gva_t kvmi_operand_gva(struct x86_emulate_ctxt *ctxt, const struct operand *op);

/* kvmi_step.c */
void __kvmi_stepped(struct kvm_vcpu *vcpu);
bool __kvmi_emulates_step(struct kvm_vcpu *vcpu);
bool __kvmi_emulation_failed(struct kvm_vcpu *vcpu);

/* mmu/kvmi.c */
int __kvmi_page_fault(struct kvm_vcpu *vcpu, gpa_t cr2_or_gpa, u64 error_code);
u64 __kvmi_spte(struct kvm_vcpu *vcpu, gfn_t gfn, u64 spte);
int __kvmi_max_mapping_level(struct kvm *kvm, gfn_t gfn, int level);
bool __kvmi_emulated_access(struct kvm_vcpu *vcpu, gva_t gva, gpa_t gpa,
			    bool write);
bool __kvmi_custom_read(struct kvm_vcpu *vcpu, gva_t gva, void *val,
			unsigned int bytes);

static inline bool kvmi_hooked(struct kvm *kvm)
{
	return static_branch_unlikely(&kvmi_used) &&
	       unlikely(rcu_access_pointer(kvm->kvmi.session));
}

static inline bool kvmi_wants(struct kvm_vcpu *vcpu, unsigned int event)
{
	return static_branch_unlikely(&kvmi_used) &&
	       unlikely(vcpu->kvmi.events & BIT(event));
}

/* Must writes to CR @cr exit for the introspector's sake? */
static inline bool kvmi_wants_cr(struct kvm_vcpu *vcpu, unsigned int cr)
{
	return static_branch_unlikely(&kvmi_used) &&
	       unlikely(vcpu->kvmi.cr_writes & BIT(cr));
}

#define KVMI_MSRS_IN_RANGE	0x2000
#define KVMI_NUM_MSRS		(2 * KVMI_MSRS_IN_RANGE)

/* The MSRs that hardware can intercept have a number below KVMI_NUM_MSRS. */
static inline unsigned int kvmi_msr_index(u32 msr)
{
	if (msr < KVMI_MSRS_IN_RANGE)
		return msr;
	if (msr - 0xc0000000 < KVMI_MSRS_IN_RANGE)
		return KVMI_MSRS_IN_RANGE + (msr - 0xc0000000);
	return KVMI_NUM_MSRS;
}

static inline bool kvmi_wants_msr(struct kvm_vcpu *vcpu, u32 msr)
{
	unsigned int index;

	if (!static_branch_unlikely(&kvmi_used) ||
	    likely(!vcpu->kvmi.msr_writes))
		return false;
	index = kvmi_msr_index(msr);
	return index < KVMI_NUM_MSRS && test_bit(index, vcpu->kvmi.msr_writes);
}

/* The VMM sets the state of a vCPU. */
static inline void kvmi_set_sregs(struct kvm_vcpu *vcpu,
				  const struct kvm_sregs *sregs)
{
	if (kvmi_hooked(vcpu->kvm))
		__kvmi_set_sregs(vcpu, sregs);
}

/* The guest is about to write to a control register; returns what it gets. */
static inline unsigned long kvmi_cr_write(struct kvm_vcpu *vcpu,
					  unsigned int cr,
					  unsigned long old_value,
					  unsigned long new_value)
{
	if (kvmi_wants_cr(vcpu, cr))
		return __kvmi_cr_write(vcpu, cr, old_value, new_value);
	return new_value;
}

/* The same for an MSR. */
static inline u64 kvmi_msr_write(struct kvm_vcpu *vcpu, u32 msr, u64 new_value)
{
	if (static_branch_unlikely(&kvmi_used) &&
	    unlikely(vcpu->kvmi.msr_writes))
		return __kvmi_msr_write(vcpu, msr, new_value);
	return new_value;
}

/* The guest is about to write to an extended control register. */
static inline void kvmi_xsetbv(struct kvm_vcpu *vcpu, u32 index, u64 value)
{
	if (kvmi_wants(vcpu, KVMI_EVENT_XSETBV))
		__kvmi_xsetbv(vcpu, index, value);
}

/* Returns true if the hypercall was one for the introspector, and is done. */
static inline bool kvmi_hypercall(struct kvm_vcpu *vcpu)
{
	return kvmi_wants(vcpu, KVMI_EVENT_HYPERCALL) && __kvmi_hypercall(vcpu);
}

/* Between two entries into the guest: has the introspector a wish? */
static inline void kvmi_check_request(struct kvm_vcpu *vcpu)
{
	if (static_branch_unlikely(&kvmi_used) &&
	    unlikely(kvm_test_request(KVM_REQ_INTROSPECTION, vcpu) ||
		     vcpu->kvmi.again))
		kvmi_handle_request(vcpu);
}

static inline bool kvmi_steps(struct kvm_vcpu *vcpu)
{
	return static_branch_unlikely(&kvmi_used) && unlikely(vcpu->kvmi.step);
}

/* KVM has completed an instruction of the guest by itself. */
static inline void kvmi_stepped(struct kvm_vcpu *vcpu)
{
	if (kvmi_steps(vcpu))
		__kvmi_stepped(vcpu);
}

/* Must KVM emulate the next instruction, for a step that nobody sees? */
static inline bool kvmi_emulates_step(struct kvm_vcpu *vcpu)
{
	return kvmi_steps(vcpu) && __kvmi_emulates_step(vcpu);
}

/* Is the access of a PF event being emulated? */
static inline bool kvmi_emulates_access(struct kvm_vcpu *vcpu)
{
	return static_branch_unlikely(&kvmi_used) && unlikely(vcpu->kvmi.pf);
}

/* Returns true if the guest will do by itself what could not be emulated. */
static inline bool kvmi_emulation_failed(struct kvm_vcpu *vcpu)
{
	return kvmi_emulates_access(vcpu) && __kvmi_emulation_failed(vcpu);
}

/*
 * A page fault, or a violation of nested page tables, before KVM looks at it.
 * Positive: the guest can go on; 0: the VMM has to do something; negative: the
 * access is one that the introspector leaves to KVM.
 */
static inline int kvmi_page_fault(struct kvm_vcpu *vcpu, gpa_t cr2_or_gpa,
				  u64 error_code)
{
	if (!kvmi_hooked(vcpu->kvm))
		return -ENOENT;
	return __kvmi_page_fault(vcpu, cr2_or_gpa, error_code);
}

/* Takes from a leaf entry what the introspector does not admit. */
static inline u64 kvmi_spte(struct kvm_vcpu *vcpu, gfn_t gfn, u64 spte)
{
	return kvmi_hooked(vcpu->kvm) ? __kvmi_spte(vcpu, gfn, spte) : spte;
}

/* A large page must not hold one that is watched. */
static inline int kvmi_max_mapping_level(struct kvm *kvm, gfn_t gfn, int level)
{
	return kvmi_hooked(kvm) ? __kvmi_max_mapping_level(kvm, gfn, level) :
				  level;
}

/* Returns false if the emulated instruction must be started again. */
static inline bool kvmi_emulated_access(struct kvm_vcpu *vcpu, gva_t gva,
					gpa_t gpa, bool write)
{
	return !kvmi_hooked(vcpu->kvm) ||
	       __kvmi_emulated_access(vcpu, gva, gpa, write);
}

/* Returns true if the introspector has said what the guest shall read here. */
static inline bool kvmi_custom_read(struct kvm_vcpu *vcpu, gva_t gva, void *val,
				    unsigned int bytes)
{
	return kvmi_emulates_access(vcpu) &&
	       __kvmi_custom_read(vcpu, gva, val, bytes);
}

/* What could not be changed while the guest's own guest ran is changed now. */
static inline void kvmi_leave_guest_mode(struct kvm_vcpu *vcpu)
{
	if (static_branch_unlikely(&kvmi_used))
		kvm_make_request(KVM_REQ_INTROSPECTION, vcpu);
}

#endif /* __KVM_X86_KVMI_H */
