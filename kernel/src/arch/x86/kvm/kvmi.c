// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection: the state of a vCPU, x86 commands, what is intercepted.
 */
#include <linux/bitmap.h>
#include <linux/kvm_host.h>
#include <linux/nospec.h>
#include <asm/mtrr.h>
#include "cpuid.h"
#include "kvm_cache_regs.h"
#include "kvmi.h"
#include "x86.h"
#include "../../../virt/kvm/kvmi_int.h"

struct static_key_false kvmi_used = STATIC_KEY_FALSE_INIT;
EXPORT_SYMBOL_GPL(kvmi_used);

/* Called before a VM is hooked. */
void kvmi_arch_use(void)
{
	static_branch_enable(&kvmi_used);
}

/* Set once, by the vendor's module. */
unsigned long kvmi_events_not_served __read_mostly;
EXPORT_SYMBOL_GPL(kvmi_events_not_served);

bool kvmi_arch_event_served(unsigned int id)
{
	return !(kvmi_events_not_served & BIT(id));
}

/* ---- state ---- */

/* What a guest's guest does, or its firmware in SMM, is not looked at. */
bool kvmi_in_view(struct kvm_vcpu *vcpu)
{
	return !is_guest_mode(vcpu) && !(vcpu->arch.hflags & HF_SMM_MASK);
}

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

/* Where the code segment of a processor begins after a reset. */
#define KVMI_RESET_CS_BASE	0xffff0000u

/*
 * The first vCPU comes back to where it was switched on: the VMM resets the
 * machine, or puts another state in its place. What the introspector knows of
 * the guest, and has put into its memory, is of the past.
 */
void __kvmi_set_sregs(struct kvm_vcpu *vcpu, const struct kvm_sregs *sregs)
{
	if (kvm_vcpu_is_reset_bsp(vcpu) &&
	    sregs->cs.base == KVMI_RESET_CS_BASE &&
	    static_call(kvm_x86_get_segment_base)(vcpu, VCPU_SREG_CS) !=
	    KVMI_RESET_CS_BASE)
		kvmi_leave(vcpu->kvm, true);
}

/* ---- intercepts ---- */

static void kvmi_forget_msrs(struct kvm_vcpu *vcpu)
{
	if (!vcpu->kvmi.msr_writes)
		return;
	bitmap_free(vcpu->kvmi.msr_writes);
	vcpu->kvmi.msr_writes = NULL;
	static_call(kvm_x86_msr_filter_changed)(vcpu);
}

static void kvmi_update_msrs(struct kvmi *kvmi, struct kvmi_vcpu *iv,
			     struct kvm_vcpu *vcpu)
{
	if (!iv->msrs_changed)
		return;
	if (!vcpu->kvmi.msr_writes)
		vcpu->kvmi.msr_writes = bitmap_zalloc(KVMI_NUM_MSRS,
						      GFP_KERNEL_ACCOUNT);
	if (!vcpu->kvmi.msr_writes) {
		/* It was promised events that would not come. */
		kvmi_shutdown(kvmi);
		return;
	}
	bitmap_copy(vcpu->kvmi.msr_writes, iv->msr_writes, KVMI_NUM_MSRS);
	iv->msrs_changed = false;
	/* It looks at every MSR that could be the guest's own. */
	static_call(kvm_x86_msr_filter_changed)(vcpu);
}

/*
 * Derives what is intercepted from what the session wants; @iv is NULL if
 * there is no session.
 */
void kvmi_arch_intercept(struct kvmi *kvmi, struct kvmi_vcpu *iv,
			 struct kvm_vcpu *vcpu)
{
	struct kvmi_vcpu_host *host = &vcpu->kvmi;
	unsigned long events = 0, crs = 0;
	bool step = false;

	/* The request is made again when its guest has left. */
	if (is_guest_mode(vcpu))
		return;

	if (iv) {
		events = *iv->events & *kvmi->event_allowed;
		step = events & BIT(KVMI_EVENT_SINGLESTEP) ||
		       READ_ONCE(kvmi->stepper) == vcpu;
		if (events & BIT(KVMI_EVENT_CR))
			crs = iv->cr_writes;
	}

	if (events & BIT(KVMI_EVENT_MSR)) {
		kvmi_update_msrs(kvmi, iv, vcpu);
	} else {
		kvmi_forget_msrs(vcpu);
		if (iv)
			iv->msrs_changed = iv->msr_writes;
	}

	if (events == host->events && crs == host->cr_writes &&
	    step == host->step)
		return;
	host->events = events;
	host->cr_writes = crs;
	host->step = step;
	static_call(kvm_x86_kvmi_update)(vcpu);
	static_call(kvm_x86_update_exception_bitmap)(vcpu);
}

void kvmi_vcpu_destroyed(struct kvm_vcpu *vcpu)
{
	bitmap_free(vcpu->kvmi.msr_writes);
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

int kvmi_arch_control_msr(struct kvmi_vcpu *iv,
			  const struct kvmi_control_msr *cmd)
{
	unsigned int index = kvmi_msr_index(cmd->msr);

	if (cmd->enable > 1 || cmd->padding1 || cmd->padding2 ||
	    index >= KVMI_NUM_MSRS)
		return -EINVAL;

	if (!iv->msr_writes) {
		if (!cmd->enable)
			return 0;
		iv->msr_writes = bitmap_zalloc(KVMI_NUM_MSRS,
					       GFP_KERNEL_ACCOUNT);
		if (!iv->msr_writes)
			return -ENOMEM;
	}
	index = array_index_nospec(index, KVMI_NUM_MSRS);
	__assign_bit(index, iv->msr_writes, cmd->enable);
	iv->msrs_changed = true;
	return 0;
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

int kvmi_arch_get_cpuid(struct kvm_vcpu *vcpu, const struct kvmi_get_cpuid *cmd,
			struct kvmi_get_cpuid_reply *rpl)
{
	struct kvm_cpuid_entry2 *entry;

	entry = kvm_find_cpuid_entry_index(vcpu, cmd->function, cmd->index);
	if (!entry)
		return -ENOENT;
	rpl->eax = entry->eax;
	rpl->ebx = entry->ebx;
	rpl->ecx = entry->ecx;
	rpl->edx = entry->edx;
	return 0;
}

/* It is injected by kvmi_inject(), before the guest runs on. */
int kvmi_arch_inject_exception(struct kvmi_vcpu *iv,
			       const struct kvmi_inject_exception *cmd)
{
	if (cmd->nr >= 32 || cmd->nr == NMI_VECTOR || cmd->padding ||
	    cmd->has_error != x86_exception_has_error_code(cmd->nr))
		return -EINVAL;
	if (iv->inject)
		return -EBUSY;
	iv->exception = *cmd;
	iv->inject = true;
	return 0;
}

/* ---- memory types ---- */

/* Of the first MiB, by MSR: "Fixed Range MTRRs" in Intel's manual. */
static u32 kvmi_fixed_mtrr(gpa_t gpa, unsigned int *shift)
{
	if (gpa < 0x80000) {
		*shift = gpa / 0x10000 * 8;
		return MSR_MTRRfix64K_00000;
	}
	if (gpa < 0xc0000) {
		*shift = gpa / 0x4000 % 8 * 8;
		return MSR_MTRRfix16K_80000 + (gpa - 0x80000) / 0x20000;
	}
	*shift = gpa / 0x1000 % 8 * 8;
	return MSR_MTRRfix4K_C0000 + (gpa - 0xc0000) / 0x8000;
}

/* "Memory cache control, MTRR precedences" in the same. */
static u8 kvmi_combine_types(u8 a, u8 b)
{
	if (a == b)
		return a;
	if ((a == MTRR_TYPE_WRTHROUGH && b == MTRR_TYPE_WRBACK) ||
	    (a == MTRR_TYPE_WRBACK && b == MTRR_TYPE_WRTHROUGH))
		return MTRR_TYPE_WRTHROUGH;
	return MTRR_TYPE_UNCACHABLE;
}

#define KVMI_MTRR_DEF_ENABLED	BIT(11)
#define KVMI_MTRR_DEF_FIXED	BIT(10)
#define KVMI_MTRR_VAR_VALID	BIT(11)

/* What the MTRRs of the first vCPU say; the architecture wants all to agree. */
int kvmi_arch_mtrr_type(struct kvm *kvm, gpa_t gpa, u8 *type)
{
	struct kvm_vcpu *vcpu = kvm_get_vcpu(kvm, 0);
	unsigned int i, shift;
	bool found = false;
	u64 def, base, mask;
	u32 msr;

	if (!vcpu)
		return -EAGAIN;
	if (gpa >> cpuid_maxphyaddr(vcpu))
		return -EINVAL;

	def = kvmi_msr(vcpu, MSR_MTRRdefType);
	*type = MTRR_TYPE_UNCACHABLE;
	if (!(def & KVMI_MTRR_DEF_ENABLED))
		return 0;

	if (gpa < SZ_1M && def & KVMI_MTRR_DEF_FIXED) {
		msr = kvmi_fixed_mtrr(gpa, &shift);
		*type = kvmi_msr(vcpu, msr) >> shift;
		return 0;
	}

	for (i = 0; i < KVM_NR_VAR_MTRR; i++) {
		mask = kvmi_msr(vcpu, MTRRphysMask_MSR(i));
		base = kvmi_msr(vcpu, MTRRphysBase_MSR(i));
		if (!(mask & KVMI_MTRR_VAR_VALID) ||
		    (gpa ^ base) & mask & PAGE_MASK)
			continue;
		*type = found ? kvmi_combine_types(*type, base) : (u8)base;
		found = true;
	}
	if (!found)
		*type = def;
	return 0;
}
