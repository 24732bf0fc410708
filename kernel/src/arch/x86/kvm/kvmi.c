// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection: x86.
 */
#define pr_fmt(fmt) "kvmi: " fmt

#include <linux/kvm_host.h>
#include <linux/mm.h>
#include "kvm_cache_regs.h"
#include "kvmi.h"
#include "x86.h"
#include "../../../virt/kvm/kvmi_int.h"

/* The guest's hypercall to its introspector, as made by Xen's guest agents. */
#define KVMI_HC_GUEST_REQUEST		34
#define KVMI_HC_GUEST_REQUEST_EVENT	24

/* ---- state ---- */

/* The operand size in bytes: from CS, and from EFER and CR0. */
static u8 kvmi_mode(const struct kvm_sregs *sregs)
{
	/* Real mode and virtual-8086 mode have a D bit too. */
	if ((sregs->efer & EFER_LMA) && sregs->cs.l)
		return 8;
	return sregs->cs.db ? 4 : 2;
}

static u64 kvmi_msr(struct kvm_vcpu *vcpu, u32 index)
{
	u64 data;

	return __kvm_get_msr(vcpu, index, &data, true) ? 0 : data;
}

void kvmi_arch_fill_event(struct kvm_vcpu *vcpu, struct kvmi_event_arch *ev)
{
	kvm_arch_vcpu_get_regs(vcpu, &ev->regs);
	kvm_arch_vcpu_get_sregs(vcpu, &ev->sregs);
	ev->mode = kvmi_mode(&ev->sregs);

	ev->msrs.sysenter_cs = kvmi_msr(vcpu, MSR_IA32_SYSENTER_CS);
	ev->msrs.sysenter_esp = kvmi_msr(vcpu, MSR_IA32_SYSENTER_ESP);
	ev->msrs.sysenter_eip = kvmi_msr(vcpu, MSR_IA32_SYSENTER_EIP);
	ev->msrs.efer = kvmi_msr(vcpu, MSR_EFER);
	ev->msrs.star = kvmi_msr(vcpu, MSR_STAR);
	ev->msrs.lstar = kvmi_msr(vcpu, MSR_LSTAR);
	ev->msrs.cstar = kvmi_msr(vcpu, MSR_CSTAR);
	ev->msrs.pat = kvmi_msr(vcpu, MSR_IA32_CR_PAT);
	ev->msrs.shadow_gs = kvmi_msr(vcpu, MSR_KERNEL_GS_BASE);
}

bool kvmi_arch_vcpu_started(struct kvm_vcpu *vcpu)
{
	return READ_ONCE(vcpu->arch.mp_state) != KVM_MP_STATE_UNINITIALIZED;
}

u64 kvmi_arch_tsc_hz(struct kvm_vcpu *vcpu)
{
	return 1000ull * vcpu->arch.virtual_tsc_khz;
}

/*
 * Registers are set in the middle of an intercepted instruction, whose
 * completion moves rip: a new rip waits until that is done.
 */
void kvmi_arch_set_regs(struct kvm_vcpu *vcpu, const struct kvm_regs *regs)
{
	struct kvm_regs new = *regs;
	unsigned long rip = kvm_rip_read(vcpu);

	if (new.rip != rip) {
		vcpu->kvmi.rip = new.rip;
		vcpu->kvmi.rip_moved = true;
		kvm_make_request(KVM_REQ_INTROSPECTION, vcpu);
		new.rip = rip;
	}
	kvm_arch_vcpu_set_regs(vcpu, &new);
}

void kvmi_arch_finish_regs(struct kvm_vcpu *vcpu)
{
	if (!vcpu->kvmi.rip_moved)
		return;
	vcpu->kvmi.rip_moved = false;
	kvm_rip_write(vcpu, vcpu->kvmi.rip);
}

void kvmi_arch_intercept_crs(struct kvm_vcpu *vcpu, unsigned long crs)
{
	/* The request is made again when its guest has left. */
	if (is_guest_mode(vcpu))
		return;

	vcpu->kvmi.cr_writes = crs;
	static_call(kvm_x86_kvmi_update_crs)(vcpu);
}

/* ---- commands ---- */

int kvmi_arch_control_cr(struct kvmi_vcpu *iv, const struct kvmi_control_cr *cmd)
{
	if (cmd->enable > 1 || cmd->padding1 || cmd->padding2)
		return -EINVAL;

	switch (cmd->cr) {
	case 0:
	case 3:
	case 4:
		__assign_bit(cmd->cr, &iv->cr_writes, cmd->enable);
		return 0;
	default:
		return -EINVAL;
	}
}

static int kvmi_fill_msrs(struct kvm_vcpu *vcpu, struct kvm_msrs *msrs,
			  const u32 *index, unsigned int count)
{
	unsigned int i;

	msrs->nmsrs = count;
	for (i = 0; i < count; i++) {
		msrs->entries[i].index = index[i];
		if (__kvm_get_msr(vcpu, index[i], &msrs->entries[i].data, true))
			return -EINVAL;
	}
	return 0;
}

int kvmi_arch_get_registers(const struct kvmi_ctx *ctx, struct kvm_vcpu *vcpu,
			    const struct kvmi_get_registers *cmd, size_t size)
{
	struct kvmi_get_registers_reply *rpl;
	unsigned int count = cmd->nmsrs;
	size_t rpl_size;
	int err;

	rpl_size = struct_size(rpl, msrs.entries, count);
	if (cmd->padding1 || cmd->padding2 ||
	    size < struct_size(cmd, msrs_idx, count) ||
	    rpl_size > KVMI_MSG_SIZE - sizeof(struct kvmi_error_code))
		return kvmi_answer(ctx, -EINVAL, NULL, 0);

	rpl = kzalloc(rpl_size, GFP_KERNEL_ACCOUNT);
	if (!rpl)
		return kvmi_answer(ctx, -ENOMEM, NULL, 0);

	kvm_arch_vcpu_get_regs(vcpu, &rpl->regs);
	kvm_arch_vcpu_get_sregs(vcpu, &rpl->sregs);
	rpl->mode = kvmi_mode(&rpl->sregs);
	err = kvmi_fill_msrs(vcpu, &rpl->msrs, cmd->msrs_idx, count);

	err = kvmi_answer(ctx, err, rpl, rpl_size);
	kfree(rpl);
	return err;
}

/* ---- events ---- */

/* What a guest's guest does, or its firmware in SMM, is not looked at. */
static bool kvmi_in_view(struct kvm_vcpu *vcpu)
{
	return !is_guest_mode(vcpu) && !(vcpu->arch.hflags & HF_SMM_MASK);
}

/* An event from within an exit's handler, which is in kvm->srcu's read side. */
static int kvmi_exit_event(struct kvmi *kvmi, struct kvmi_vcpu *iv,
			   struct kvm_vcpu *vcpu, unsigned int id,
			   const void *data, size_t size,
			   const struct kvmi_vcpu_reply *expect)
{
	int err;

	kvm_vcpu_srcu_read_unlock(vcpu);
	err = kvmi_event(kvmi, iv, vcpu, id, data, size, expect);
	kvm_vcpu_srcu_read_lock(vcpu);

	return err;
}

static int kvmi_event_cr(struct kvmi *kvmi, struct kvmi_vcpu *iv,
			 struct kvm_vcpu *vcpu, const struct kvmi_event_cr *ev,
			 u64 *new_value)
{
	struct kvmi_event_cr_reply rpl;
	const struct kvmi_vcpu_reply expect = {
		.actions = BIT(KVMI_EVENT_ACTION_CONTINUE),
		.data = &rpl,
		.same = &ev->new_value,
		.size = sizeof(rpl),
	};
	int err;

	err = kvmi_exit_event(kvmi, iv, vcpu, KVMI_EVENT_CR, ev, sizeof(*ev),
			      &expect);
	if (!err)
		*new_value = rpl.new_val;
	return err;
}

void __kvmi_cr_write(struct kvm_vcpu *vcpu, unsigned int cr,
		     unsigned long old_value, unsigned long *new_value)
{
	struct kvmi_event_cr ev = {
		.cr = cr,
		.old_value = old_value,
		.new_value = *new_value,
	};
	struct kvmi_vcpu *iv;
	struct kvmi *kvmi;
	u64 value;

	/* What the value says beside the register's new content. */
	if (cr == 0)
		ev.new_value |= X86_CR0_ET;
	if (cr == 3 && kvm_read_cr4_bits(vcpu, X86_CR4_PCIDE))
		ev.new_value &= ~X86_CR3_PCID_NOFLUSH;

	if (ev.new_value == ev.old_value || !kvmi_in_view(vcpu))
		return;

	kvmi = kvmi_get(vcpu->kvm);
	if (!kvmi)
		return;
	iv = kvmi_vcpu_state(kvmi, vcpu);
	if (iv && test_bit(cr, &iv->cr_writes) &&
	    kvmi_event_on(kvmi, iv, KVMI_EVENT_CR) &&
	    !kvmi_event_cr(kvmi, iv, vcpu, &ev, &value) &&
	    value != ev.new_value)
		*new_value = value;
	kvmi_put(kvmi);
}

bool __kvmi_hypercall(struct kvm_vcpu *vcpu)
{
	static const struct kvmi_vcpu_reply expect = {
		.actions = BIT(KVMI_EVENT_ACTION_CONTINUE),
	};
	struct kvmi_vcpu *iv;
	struct kvmi *kvmi;
	u64 nr, sub;
	bool on;

	if (is_64_bit_hypercall(vcpu)) {
		nr = kvm_rax_read(vcpu);
		sub = kvm_rdi_read(vcpu);
	} else {
		nr = (u32)kvm_rax_read(vcpu);
		sub = (u32)kvm_rbx_read(vcpu);
	}
	if (nr != KVMI_HC_GUEST_REQUEST || sub != KVMI_HC_GUEST_REQUEST_EVENT ||
	    !kvmi_in_view(vcpu))
		return false;

	kvmi = kvmi_get(vcpu->kvm);
	if (!kvmi)
		return false;
	iv = kvmi_vcpu_state(kvmi, vcpu);
	on = iv && kvmi_event_on(kvmi, iv, KVMI_EVENT_HYPERCALL);
	if (on) {
		kvmi_exit_event(kvmi, iv, vcpu, KVMI_EVENT_HYPERCALL, NULL, 0,
				&expect);
		kvm_rax_write(vcpu, 0);
		++vcpu->stat.hypercalls;
	}
	kvmi_put(kvmi);

	return on;
}
