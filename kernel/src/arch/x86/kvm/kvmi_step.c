// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection: single steps.
 *
 * vcpu->kvmi.step makes the CPU stop after the guest's next instruction: by
 * the monitor trap flag on Intel, by the trap flag on AMD. What KVM emulates
 * counts as an instruction, too, and so does the delivery of an interrupt or
 * an exception. The SINGLESTEP event comes with the next request.
 *
 * One vCPU, kvmi->stepper, may step for another reason: to make an access to
 * a watched page by itself. The page is open then, and all others stand.
 */
#include <linux/kvm_host.h>
#include "kvm_cache_regs.h"
#include "kvmi.h"
#include "x86.h"
#include "../../../virt/kvm/kvmi_int.h"

/* Set once, by the vendor's module: it steps with the guest's trap flag. */
bool kvmi_steps_by_tf __read_mostly;
EXPORT_SYMBOL_GPL(kvmi_steps_by_tf);

void __kvmi_stepped(struct kvm_vcpu *vcpu)
{
	if (!kvmi_in_view(vcpu))
		return;
	vcpu->kvmi.stepped = true;
	kvm_make_request(KVM_REQ_INTROSPECTION, vcpu);
}
EXPORT_SYMBOL_GPL(__kvmi_stepped);

/* ---- the trap flag must not be seen ---- */

static bool kvmi_is_prefix(struct kvm_vcpu *vcpu, u8 byte)
{
	switch (byte) {
	case 0x26: case 0x2e: case 0x36: case 0x3e:
	case 0x64: case 0x65: case 0x66: case 0x67:
	case 0xf0: case 0xf2: case 0xf3:
		return true;
	case 0x40 ... 0x4f:
		return is_64_bit_mode(vcpu);
	default:
		return false;
	}
}

/* The opcode at rip, with 0x0f00 for two bytes; 0 if it cannot be read. */
unsigned int kvmi_next_opcode(struct kvm_vcpu *vcpu)
{
	unsigned long rip = kvm_get_linear_rip(vcpu);
	struct x86_exception exception;
	unsigned int i, escape = 0;
	u8 byte;

	for (i = 0; i < 15; i++) {
		if (kvm_read_guest_virt(vcpu, rip + i, &byte, 1, &exception))
			return 0;
		if (escape)
			return escape | byte;
		if (byte == 0x0f)
			escape = 0x0f00;
		else if (!kvmi_is_prefix(vcpu, byte))
			return byte;
	}
	return 0;
}

/*
 * Called before the guest is entered for a step. Instructions that store the
 * flags are emulated; those that load them are remembered.
 */
bool __kvmi_emulates_step(struct kvm_vcpu *vcpu)
{
	vcpu->kvmi.loads_flags = false;
	/* What is about to be delivered comes before the next instruction. */
	if (!kvmi_steps_by_tf || !kvmi_in_view(vcpu) ||
	    kvm_event_needs_reinjection(vcpu) || vcpu->arch.exception.pending)
		return false;

	switch (kvmi_next_opcode(vcpu)) {
	case 0x9c:	/* PUSHF */
	case 0x9d:	/* POPF */
	case 0x0f05:	/* SYSCALL */
	case 0x0f34:	/* SYSENTER */
		return true;
	case 0xcf:	/* IRET */
	case 0x0f07:	/* SYSRET */
		vcpu->kvmi.loads_flags = true;
		return false;
	default:
		return false;
	}
}

/* ---- one goes, the others stand ---- */

/*
 * Lets @vcpu access the page by itself, with its next instruction. If another
 * one does such a thing already, the access is tried again after that, without
 * a question: see kvmi_owes_step().
 */
void kvmi_start_step(struct kvmi *kvmi, struct kvm_vcpu *vcpu, gfn_t gfn)
{
	struct kvm_vcpu *stepper = cmpxchg(&kvmi->stepper, NULL, vcpu);

	vcpu->kvmi.step_owed = stepper && stepper != vcpu;
	if (vcpu->kvmi.step_owed) {
		vcpu->kvmi.step_gfn = gfn;
		vcpu->kvmi.step_rip = kvm_rip_read(vcpu);
		kvm_make_request(KVM_REQ_INTROSPECTION, vcpu);
		return;
	}
	/* After this none is in the guest, and none enters it. */
	kvm_make_all_cpus_request(vcpu->kvm, KVM_REQ_INTROSPECTION |
				  KVM_REQUEST_WAIT | KVM_REQUEST_NO_WAKEUP);
	kvmi_open_page(kvmi, gfn);
}

bool kvmi_owes_step(struct kvm_vcpu *vcpu, gfn_t gfn)
{
	return vcpu->kvmi.step_owed && vcpu->kvmi.step_gfn == gfn &&
	       vcpu->kvmi.step_rip == kvm_rip_read(vcpu);
}

void kvmi_end_step(struct kvmi *kvmi, struct kvm_vcpu *vcpu)
{
	struct kvmi_vcpu *iv;
	unsigned long idx;

	if (READ_ONCE(kvmi->stepper) != vcpu)
		return;
	kvmi_close_pages(kvmi);
	WRITE_ONCE(kvmi->stepper, NULL);
	xa_for_each(&kvmi->vcpus, idx, iv)
		wake_up_all(&iv->wq);
}

/* Must this vCPU stay out of the guest? */
bool kvmi_held(struct kvmi *kvmi, struct kvm_vcpu *vcpu)
{
	struct kvm_vcpu *stepper = READ_ONCE(kvmi->stepper);

	/* One that was reset in the middle of its step makes none. */
	return stepper && stepper != vcpu && !READ_ONCE(kvmi->ended) &&
	       READ_ONCE(stepper->arch.mp_state) == KVM_MP_STATE_RUNNABLE;
}

/* What cannot be emulated is left to the guest, with its page open. */
bool __kvmi_emulation_failed(struct kvm_vcpu *vcpu)
{
	struct kvmi *kvmi = kvmi_get(vcpu->kvm);

	if (!kvmi)
		return true;
	kvmi_start_step(kvmi, vcpu, vcpu->kvmi.pf_gfn);
	kvmi_put(kvmi);
	return true;
}
