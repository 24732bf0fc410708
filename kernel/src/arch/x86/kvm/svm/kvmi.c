// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection: AMD's intercepts, and single steps.
 */
#include <linux/module.h>
#include <trace/events/ipi.h>
#include "svm.h"
#include "../kvm_cache_regs.h"
#include "../kvm_emulate.h"
#include "../kvmi.h"
#include "../x86.h"

MODULE_VERSION(KVMI_MODULE_VERSION);

/* An emulated CPU whose INT3 is no #BP to its host, but like any INT n. */
static bool int3_is_swint __read_mostly;

void __init svm_kvmi_setup(void)
{
	int3_is_swint = boot_cpu_has(X86_FEATURE_HYPERVISOR) &&
			hypervisor_cpuid_base("TCGTCGTCGTCG", 0);
	kvmi_steps_by_tf = true;
}

static void svm_kvmi_assign_intercept(struct vcpu_svm *svm, int bit, bool on)
{
	if (on)
		svm_set_intercept(svm, bit);
	else
		svm_clr_intercept(svm, bit);
}

/* vcpu->kvmi has changed. CR4 writes exit anyway. */
void svm_kvmi_update(struct kvm_vcpu *vcpu)
{
	struct vcpu_svm *svm = to_svm(vcpu);
	int bit;

	/* The host cannot see the registers of such a guest. */
	if (sev_es_guest(vcpu->kvm))
		return;

	if (npt_enabled)
		svm_kvmi_assign_intercept(svm, INTERCEPT_CR3_WRITE,
					  kvmi_wants_cr(vcpu, 3));
	/* It chooses the intercepts of CR0. */
	svm_set_cr0(vcpu, kvm_read_cr0(vcpu));

	for (bit = INTERCEPT_STORE_IDTR; bit <= INTERCEPT_LOAD_TR; bit++)
		svm_kvmi_assign_intercept(svm, bit,
					  kvmi_wants(vcpu, KVMI_EVENT_DESCRIPTOR));
}

/* The last word of svm_update_exception_bitmap(). */
void svm_kvmi_update_exceptions(struct kvm_vcpu *vcpu)
{
	struct vcpu_svm *svm = to_svm(vcpu);
	bool wanted = kvmi_wants(vcpu, KVMI_EVENT_BREAKPOINT);

	if (wanted)
		set_exception_intercept(svm, BP_VECTOR);
	if (int3_is_swint)
		svm_kvmi_assign_intercept(svm, INTERCEPT_INTn, wanted);
}

/* INT n: in a step, or where INT3 is one. */
int svm_kvmi_swint(struct kvm_vcpu *vcpu)
{
	struct x86_emulate_ctxt *ctxt = vcpu->arch.emulate_ctxt;
	int r;

	if (x86_decode_emulated_instruction(vcpu, 0, NULL, 0) != EMULATION_OK)
		return 1;
	if (ctxt->b != 0xcc) {
		kvm_queue_interrupt(vcpu, (u8)ctxt->src.val, true);
		kvm_make_request(KVM_REQ_EVENT, vcpu);
		return 1;
	}
	r = kvmi_breakpoint(vcpu, 1);
	if (r >= 0)
		return r;
	kvm_queue_exception(vcpu, BP_VECTOR);
	return 1;
}

int svm_kvmi_descriptor(struct kvm_vcpu *vcpu)
{
	static const u8 descriptors[] = {
		KVMI_DESC_IDTR, KVMI_DESC_GDTR, KVMI_DESC_LDTR, KVMI_DESC_TR,
	};
	u32 nr = to_svm(vcpu)->vmcb->control.exit_code - SVM_EXIT_IDTR_READ;

	return kvmi_descriptor(vcpu, descriptors[nr % 4], nr >= 4);
}

/* ---- single steps ---- */

/*
 * For one entry into the guest, the trap flag is set and whatever would store
 * the flags in the guest's memory is intercepted. Events that are injected
 * store them, too: the guest is stopped before it does anything after one, for
 * events are injected before an interrupt of the host makes it exit.
 */
void svm_kvmi_begin_step(struct vcpu_svm *svm)
{
	struct svm_kvmi_step *step = &svm->kvmi_step;
	u32 *intercepts = svm->vmcb->control.intercepts;
	struct kvm_vcpu *vcpu = &svm->vcpu;

	vcpu->kvmi.own_tf = false;
	step->on = !is_guest_mode(vcpu) && !sev_es_guest(vcpu->kvm) &&
		   !(vcpu->arch.hflags & HF_SMM_MASK);
	if (!step->on)
		return;

	step->delivers = svm->vmcb->control.event_inj & SVM_EVTINJ_VALID;
	if (step->delivers) {
		smp_send_reschedule(vcpu->cpu);
		return;
	}

	step->exceptions = intercepts[INTERCEPT_EXCEPTION];
	step->word3 = intercepts[INTERCEPT_WORD3];
	intercepts[INTERCEPT_EXCEPTION] |= ~BIT(NMI_VECTOR);
	intercepts[INTERCEPT_WORD3] |= BIT(INTERCEPT_INTn % 32);
	vmcb_mark_dirty(svm->vmcb, VMCB_INTERCEPTS);

	if (!(svm->vmcb->save.rflags & X86_EFLAGS_TF)) {
		svm->vmcb->save.rflags |= X86_EFLAGS_TF;
		vcpu->kvmi.own_tf = true;
	}
}

void svm_kvmi_end_step(struct vcpu_svm *svm)
{
	const struct svm_kvmi_step *step = &svm->kvmi_step;
	u32 *intercepts = svm->vmcb->control.intercepts;
	struct kvm_vcpu *vcpu = &svm->vcpu;

	if (!step->on)
		return;
	if (step->delivers) {
		if (!(svm->vmcb->control.exit_int_info & SVM_EXITINTINFO_VALID))
			__kvmi_stepped(vcpu);
		return;
	}

	intercepts[INTERCEPT_EXCEPTION] = step->exceptions;
	intercepts[INTERCEPT_WORD3] = step->word3;

	/* A completed IRET has loaded the guest's own. */
	if (vcpu->kvmi.own_tf &&
	    !(vcpu->kvmi.loads_flags && svm->vmcb->control.exit_code ==
	      SVM_EXIT_EXCP_BASE + DB_VECTOR))
		svm->vmcb->save.rflags &= ~X86_EFLAGS_TF;
}

static void svm_kvmi_reinject(struct vcpu_svm *svm, unsigned int vector)
{
	struct vmcb_control_area *control = &svm->vmcb->control;

	if (vector == PF_VECTOR)
		svm->vcpu.arch.cr2 = control->exit_info_2;
	if (x86_exception_has_error_code(vector))
		kvm_queue_exception_e(&svm->vcpu, vector, control->exit_info_1);
	else
		kvm_queue_exception(&svm->vcpu, vector);
}

/* Returns true if an exit while stepping is dealt with. */
bool svm_kvmi_step_exit(struct kvm_vcpu *vcpu)
{
	struct vcpu_svm *svm = to_svm(vcpu);
	u32 vector = svm->vmcb->control.exit_code - SVM_EXIT_EXCP_BASE;

	if (vector > 31 || is_guest_mode(vcpu))
		return false;

	switch (vector) {
	case DB_VECTOR:
		if (!((svm->vmcb->save.dr6 ^ DR6_ACTIVE_LOW) & DR6_BS))
			return false;
		__kvmi_stepped(vcpu);
		if (!vcpu->kvmi.own_tf)
			return false;
		svm->vmcb->save.dr6 &= ~DR6_BS;
		vmcb_mark_dirty(svm->vmcb, VMCB_DR);
		/* Other causes, such as its breakpoints, are the guest's. */
		return svm->vmcb->save.dr6 == DR6_ACTIVE_LOW;
	case BP_VECTOR:
	case UD_VECTOR:
	case GP_VECTOR:
	case AC_VECTOR:
	case MC_VECTOR:
		return false;
	case PF_VECTOR:
		if (!npt_enabled)
			return false;
		fallthrough;
	default:
		svm_kvmi_reinject(svm, vector);
		return true;
	}
}
