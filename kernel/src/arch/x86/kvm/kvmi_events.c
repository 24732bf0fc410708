// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection: what a guest does that makes an event.
 *
 * These are called by the handlers of exits, and by the emulator, before the
 * guest's instruction has had an effect.
 */
#include <linux/kvm_host.h>
#include <asm/fpu/xcr.h>
#include <asm/vmx.h>
#include "cpuid.h"
#include "kvm_cache_regs.h"
#include "kvm_emulate.h"
#include "kvmi.h"
#include "x86.h"
#include "../../../virt/kvm/kvmi_int.h"

/* The guest's hypercall to its introspector, as made by Xen's guest agents. */
#define KVMI_HC_GUEST_REQUEST		34
#define KVMI_HC_GUEST_REQUEST_EVENT	24

static const struct kvmi_vcpu_reply kvmi_continue_only = {
	.actions = BIT(KVMI_EVENT_ACTION_CONTINUE),
};

static const struct kvmi_vcpu_reply kvmi_continue_or_retry = {
	.actions = BIT(KVMI_EVENT_ACTION_CONTINUE) |
		   BIT(KVMI_EVENT_ACTION_RETRY),
};

/*
 * An event from within the handler of an exit, which is in kvm->srcu's read
 * side. Returns the action, or an error if nobody wants to know or there was
 * no valid reply.
 */
int kvmi_exit_event(struct kvm_vcpu *vcpu, unsigned int id, const void *data,
		    size_t size, const struct kvmi_vcpu_reply *expect)
{
	struct kvmi *kvmi;
	struct kvmi_vcpu *iv;
	int ret = -ENOENT;

	if (!kvmi_in_view(vcpu))
		return -ENOENT;
	kvmi = kvmi_get(vcpu->kvm);
	if (!kvmi)
		return -ENOENT;

	iv = kvmi_vcpu_state(kvmi, vcpu);
	if (iv && kvmi_event_on(kvmi, iv, id)) {
		kvm_vcpu_srcu_read_unlock(vcpu);
		ret = kvmi_event(kvmi, iv, vcpu, id, data, size, expect);
		kvm_vcpu_srcu_read_lock(vcpu);
		if (!ret)
			ret = iv->reply.action;
	}
	kvmi_put(kvmi);

	return ret;
}

unsigned long __kvmi_cr_write(struct kvm_vcpu *vcpu, unsigned int cr,
			      unsigned long old_value, unsigned long new_value)
{
	struct kvmi_event_cr ev = {
		.cr = cr,
		.old_value = old_value,
		.new_value = new_value,
	};
	struct kvmi_event_cr_reply rpl;
	const struct kvmi_vcpu_reply expect = {
		.actions = BIT(KVMI_EVENT_ACTION_CONTINUE),
		.data = &rpl,
		.same = &ev.new_value,
		.size = sizeof(rpl),
	};

	/* What the value says beside the register's new content. */
	if (cr == 0)
		ev.new_value |= X86_CR0_ET;
	if (cr == 3 && kvm_read_cr4_bits(vcpu, X86_CR4_PCIDE))
		ev.new_value &= ~X86_CR3_PCID_NOFLUSH;

	if (ev.new_value != ev.old_value &&
	    kvmi_exit_event(vcpu, KVMI_EVENT_CR, &ev, sizeof(ev), &expect) >= 0 &&
	    rpl.new_val != ev.new_value)
		return rpl.new_val;
	return new_value;
}

u64 __kvmi_msr_write(struct kvm_vcpu *vcpu, u32 msr, u64 new_value)
{
	struct kvmi_event_msr ev = {
		.msr = msr,
		.new_value = new_value,
	};
	struct kvmi_event_msr_reply rpl;
	const struct kvmi_vcpu_reply expect = {
		.actions = BIT(KVMI_EVENT_ACTION_CONTINUE),
		.data = &rpl,
		.same = &ev.new_value,
		.size = sizeof(rpl),
	};

	if (!kvmi_wants_msr(vcpu, msr))
		return new_value;

	/* A write to one that cannot be read counts as a change from 0. */
	if (__kvm_get_msr(vcpu, msr, &ev.old_value, true))
		ev.old_value = 0;

	if (ev.new_value != ev.old_value &&
	    kvmi_exit_event(vcpu, KVMI_EVENT_MSR, &ev, sizeof(ev), &expect) >= 0)
		return rpl.new_val;
	return new_value;
}

void __kvmi_xsetbv(struct kvm_vcpu *vcpu, u32 index, u64 value)
{
	/* It is KVM's to refuse what is privileged or no such register. */
	if (static_call(kvm_x86_get_cpl)(vcpu) ||
	    index != XCR_XFEATURE_ENABLED_MASK || value == vcpu->arch.xcr0)
		return;
	kvmi_exit_event(vcpu, KVMI_EVENT_XSETBV, NULL, 0, &kvmi_continue_only);
}

bool __kvmi_hypercall(struct kvm_vcpu *vcpu)
{
	u64 nr, sub;

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

	kvmi_exit_event(vcpu, KVMI_EVENT_HYPERCALL, NULL, 0,
			&kvmi_continue_only);
	kvm_rax_write(vcpu, 0);
	++vcpu->stat.hypercalls;
	return true;
}

/*
 * An INT3 has been intercepted, rip is at it. Returns 1 if that is all, or an
 * error if KVM has a reason of its own to intercept it.
 */
int kvmi_breakpoint(struct kvm_vcpu *vcpu, u8 insn_len)
{
	unsigned long rip = kvm_get_linear_rip(vcpu);
	struct kvmi_event_breakpoint ev = {
		.gpa = kvm_mmu_gva_to_gpa_system(vcpu, rip, NULL),
		.insn_len = insn_len,
	};

	if (kvmi_exit_event(vcpu, KVMI_EVENT_BREAKPOINT, &ev, sizeof(ev),
			    &kvmi_continue_or_retry) == KVMI_EVENT_ACTION_RETRY)
		return 1;
	if (vcpu->guest_debug & KVM_GUESTDBG_USE_SW_BP)
		return -ENOENT;
	vcpu->kvmi.no_skip = false;
	kvm_queue_exception(vcpu, BP_VECTOR);
	return 1;
}
EXPORT_SYMBOL_GPL(kvmi_breakpoint);

/* Where a memory operand is, as the emulator has decoded it. */
gva_t kvmi_operand_gva(struct x86_emulate_ctxt *ctxt, const struct operand *op)
{
	unsigned int seg = op->addr.mem.seg;
	gva_t gva = op->addr.mem.ea;

	if (ctxt->mode != X86EMUL_MODE_PROT64)
		return (u32)(gva + ctxt->ops->get_cached_segment_base(ctxt, seg));
	if (seg == VCPU_SREG_FS || seg == VCPU_SREG_GS)
		gva += ctxt->ops->get_cached_segment_base(ctxt, seg);
	return gva;
}

/* Does LGDT or LIDT load what is there already? If in doubt, it does not. */
static bool kvmi_same_table(struct kvm_vcpu *vcpu, u8 descriptor)
{
	struct x86_emulate_ctxt *ctxt = vcpu->arch.emulate_ctxt;
	struct x86_exception exception;
	struct desc_ptr old;
	struct {
		u16 limit;
		u64 base;
	} __packed new = {};
	unsigned int size;

	if (x86_decode_emulated_instruction(vcpu, 0, NULL, 0) != EMULATION_OK ||
	    ctxt->src.type != OP_MEM)
		return false;

	size = ctxt->mode == X86EMUL_MODE_PROT64 ? sizeof(new) : 6;
	if (kvm_read_guest_virt(vcpu, kvmi_operand_gva(ctxt, &ctxt->src), &new,
				size, &exception))
		return false;
	if (ctxt->op_bytes == 2 && ctxt->mode != X86EMUL_MODE_PROT64)
		new.base &= 0xffffff;

	if (descriptor == KVMI_DESC_GDTR)
		static_call(kvm_x86_get_gdt)(vcpu, &old);
	else
		static_call(kvm_x86_get_idt)(vcpu, &old);
	return new.limit == old.size && new.base == old.address;
}

/* An instruction that reads or writes a descriptor-table register. */
int kvmi_descriptor(struct kvm_vcpu *vcpu, u8 descriptor, bool write)
{
	struct kvmi_event_descriptor ev = {
		.descriptor = descriptor,
		.write = write,
	};

	if (write && descriptor <= KVMI_DESC_GDTR &&
	    kvmi_same_table(vcpu, descriptor))
		return kvm_emulate_instruction(vcpu, 0);

	if (kvmi_exit_event(vcpu, KVMI_EVENT_DESCRIPTOR, &ev, sizeof(ev),
			    &kvmi_continue_or_retry) == KVMI_EVENT_ACTION_RETRY)
		return 1;
	return kvm_emulate_instruction(vcpu, 0);
}
EXPORT_SYMBOL_GPL(kvmi_descriptor);

/* What is on its way into the guest already must not be overtaken. */
bool kvmi_can_inject(struct kvm_vcpu *vcpu)
{
	if (!kvmi_in_view(vcpu))
		return false;
	if (vcpu->arch.interrupt.injected || vcpu->arch.nmi_injected) {
		vcpu->kvmi.again = true;
		return false;
	}
	return true;
}

/*
 * INJECT_EXCEPTION: tells what will really be injected, and does it. What the
 * guest has brought about by itself goes first, and ours is dropped. Called
 * outside of the read side of kvm->srcu.
 */
void kvmi_inject(struct kvmi *kvmi, struct kvmi_vcpu *iv, struct kvm_vcpu *vcpu)
{
	const struct kvmi_inject_exception *cmd = &iv->exception;
	const struct kvm_queued_exception *own = &vcpu->arch.exception;
	bool taken = own->pending || own->injected;
	unsigned int opcode;
	struct kvmi_event_trap ev = {
		.vector = taken ? own->vector : cmd->nr,
		.cr2 = vcpu->arch.cr2,
	};

	iv->inject = false;

	if (taken && own->has_error_code)
		ev.error_code = own->error_code;
	else if (!taken && cmd->has_error)
		ev.error_code = cmd->error_code;
	if (ev.vector == PF_VECTOR && (!taken || own->has_payload))
		ev.cr2 = taken ? own->payload : cmd->address;
	ev.type = (kvm_exception_is_soft(ev.vector) ? INTR_TYPE_SOFT_EXCEPTION :
		   INTR_TYPE_HARD_EXCEPTION) >> 8;

	if (kvmi_event_on(kvmi, iv, KVMI_EVENT_TRAP))
		kvmi_event(kvmi, iv, vcpu, KVMI_EVENT_TRAP, &ev, sizeof(ev),
			   &kvmi_continue_only);

	if (taken)
		return;
	if (kvm_exception_is_soft(cmd->nr)) {
		kvm_vcpu_srcu_read_lock(vcpu);
		opcode = kvmi_next_opcode(vcpu);
		kvm_vcpu_srcu_read_unlock(vcpu);
		vcpu->kvmi.no_skip = opcode != (cmd->nr == BP_VECTOR ? 0xcc :
									0xce);
		vcpu->arch.event_exit_inst_len = 1;
	}
	if (cmd->nr == PF_VECTOR)
		vcpu->arch.cr2 = cmd->address;
	if (cmd->has_error)
		kvm_queue_exception_e(vcpu, cmd->nr, cmd->error_code);
	else
		kvm_queue_exception(vcpu, cmd->nr);
}
