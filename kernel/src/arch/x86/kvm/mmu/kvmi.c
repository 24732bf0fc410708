// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection: access to guest pages.
 *
 * kvmi->access has what is admitted; mappings are made of what it says and
 * dropped when it changes, so neither memory slots nor the kind of MMU matter.
 * A page that is watched is never part of a large one.
 */
#include <linux/kvm_host.h>
#include "../kvm_cache_regs.h"
#include "../kvm_emulate.h"
#include "../kvmi.h"
#include "../mmu.h"
#include "../x86.h"
#include "mmu_internal.h"
#include "spte.h"
#include "../../../../virt/kvm/kvmi_int.h"

#define KVMI_PAGE_ACCESS_ALL \
	(KVMI_PAGE_ACCESS_R | KVMI_PAGE_ACCESS_W | KVMI_PAGE_ACCESS_X)

/* The page may be accessed, until kvmi_close_pages(). */
#define KVMI_PAGE_OPEN XA_MARK_0

/* ---- what is admitted ---- */

/* Can the CPU's tables say it? */
bool kvmi_page_access_valid(u8 access)
{
	if (access & ~KVMI_PAGE_ACCESS_ALL)
		return false;
	if (access & KVMI_PAGE_ACCESS_R || !access)
		return true;
	/* Bit 0 is for all access on AMD, and for reads alone on Intel. */
	return access == KVMI_PAGE_ACCESS_X &&
	       !(shadow_present_mask & PT_PRESENT_MASK);
}

u8 kvmi_get_access(struct kvmi *kvmi, gfn_t gfn)
{
	void *entry = xa_load(&kvmi->access, gfn);

	return entry ? xa_to_value(entry) : KVMI_PAGE_ACCESS_ALL;
}

static u8 kvmi_access_now(struct kvmi *kvmi, gfn_t gfn)
{
	if (xa_get_mark(&kvmi->access, gfn, KVMI_PAGE_OPEN))
		return KVMI_PAGE_ACCESS_ALL;
	return kvmi_get_access(kvmi, gfn);
}

static void kvmi_unmap(struct kvmi *kvmi, gfn_t gfn)
{
	struct kvm *kvm = kvmi->kvm;
	int idx = srcu_read_lock(&kvm->srcu);

	kvm_zap_gfn_range(kvm, gfn, gfn + 1);
	srcu_read_unlock(&kvm->srcu, idx);
}

int kvmi_set_access(struct kvmi *kvmi, gfn_t gfn, u8 access)
{
	void *old;

	if (access == KVMI_PAGE_ACCESS_ALL)
		old = xa_erase(&kvmi->access, gfn);
	else
		old = xa_store(&kvmi->access, gfn, xa_mk_value(access),
			       GFP_KERNEL_ACCOUNT);
	if (xa_is_err(old))
		return xa_err(old);
	if (old || access != KVMI_PAGE_ACCESS_ALL)
		kvmi_unmap(kvmi, gfn);
	return 0;
}

void kvmi_open_page(struct kvmi *kvmi, gfn_t gfn)
{
	xa_set_mark(&kvmi->access, gfn, KVMI_PAGE_OPEN);
	kvmi_unmap(kvmi, gfn);
}

void kvmi_close_pages(struct kvmi *kvmi)
{
	unsigned long gfn;
	void *entry;

	xa_for_each_marked(&kvmi->access, gfn, entry, KVMI_PAGE_OPEN) {
		xa_clear_mark(&kvmi->access, gfn, KVMI_PAGE_OPEN);
		kvmi_unmap(kvmi, gfn);
	}
}

/* The session is off the VM: what is mapped from now on is mapped in full. */
void kvmi_forget_pages(struct kvmi *kvmi)
{
	unsigned long gfn;
	void *entry;

	xa_for_each(&kvmi->access, gfn, entry)
		kvmi_unmap(kvmi, gfn);
}

/* ---- mappings ---- */

u64 __kvmi_spte(struct kvm_vcpu *vcpu, gfn_t gfn, u64 spte)
{
	u8 access = KVMI_PAGE_ACCESS_ALL;
	struct kvmi *kvmi;

	if (!kvmi_in_view(vcpu))
		return spte;

	rcu_read_lock();
	kvmi = rcu_dereference(vcpu->kvm->kvmi.session);
	if (kvmi)
		access = kvmi_access_now(kvmi, gfn);
	rcu_read_unlock();

	if (!(access & KVMI_PAGE_ACCESS_W))
		spte &= ~(PT_WRITABLE_MASK | shadow_mmu_writable_mask);
	if (!(access & KVMI_PAGE_ACCESS_X))
		spte = (spte & ~shadow_x_mask) | shadow_nx_mask;
	/* KVM has a bit of its own that tells an entry from none. */
	if (!(access & KVMI_PAGE_ACCESS_R))
		spte &= ~PT_PRESENT_MASK;
	return spte;
}

int __kvmi_max_mapping_level(struct kvm *kvm, gfn_t gfn, int level)
{
	unsigned long first, pages;
	struct kvmi *kvmi;

	rcu_read_lock();
	kvmi = rcu_dereference(kvm->kvmi.session);
	for (; kvmi && level > PG_LEVEL_4K; level--) {
		pages = KVM_PAGES_PER_HPAGE(level);
		first = gfn & ~(pages - 1);
		if (!xa_find(&kvmi->access, &first, first + pages - 1,
			     XA_PRESENT))
			break;
	}
	rcu_read_unlock();

	return level;
}

/*
 * The page was written from outside of the guest. KVM has protected what it
 * shadows from the guest's writes alone, and takes it for unchanged even if the
 * guest executes INVLPG.
 */
void kvmi_page_written(struct kvm *kvm, gfn_t gfn)
{
	kvm_mmu_unprotect_page(kvm, gfn);
}

/* ---- faults ---- */

/* Of a nested page fault, or of one in a guest whose tables are shadowed. */
static u8 kvmi_fault_access(u64 error_code)
{
	if (error_code & PFERR_WRITE_MASK)
		return KVMI_PAGE_ACCESS_W;
	if (error_code & PFERR_FETCH_MASK)
		return KVMI_PAGE_ACCESS_X;
	return KVMI_PAGE_ACCESS_R;
}

static gpa_t kvmi_fault_gpa(struct kvm_vcpu *vcpu, gpa_t cr2_or_gpa,
			    u64 error_code)
{
	struct kvm_mmu *mmu = vcpu->arch.mmu;
	u64 access = error_code & (PFERR_WRITE_MASK | PFERR_USER_MASK |
				   PFERR_FETCH_MASK);

	if (mmu->root_role.direct)
		return cr2_or_gpa;
	return mmu->gva_to_gpa(vcpu, mmu, cr2_or_gpa, access, NULL);
}

/* Is the page among those of the @bytes at @gva? Then @gva is where. */
static bool kvmi_gva_in_page(struct kvm_vcpu *vcpu, gva_t *gva,
			     unsigned int bytes, gpa_t gpa)
{
	gva_t last = *gva + bytes - 1;
	gpa_t found;

	found = kvm_mmu_gva_to_gpa_system(vcpu, *gva, NULL);
	if (gpa_to_gfn(found) != gpa_to_gfn(gpa)) {
		found = kvm_mmu_gva_to_gpa_system(vcpu, last, NULL);
		if (gpa_to_gfn(found) != gpa_to_gfn(gpa))
			return false;
		*gva = last;
	}
	*gva = (*gva & PAGE_MASK) | offset_in_page(gpa);
	return true;
}

/*
 * AMD's CPUs do not tell the linear address: it is sought among those that the
 * instruction names. All ones if it is none of them.
 */
static gva_t kvmi_find_gva(struct kvm_vcpu *vcpu, gpa_t gpa, u8 access)
{
	struct x86_emulate_ctxt *ctxt = vcpu->arch.emulate_ctxt;
	const struct operand *ops[] = { &ctxt->dst, &ctxt->src, &ctxt->memop };
	gva_t gva = kvm_get_linear_rip(vcpu);
	unsigned int i;

	if (access == KVMI_PAGE_ACCESS_X)
		return kvmi_gva_in_page(vcpu, &gva, 15, gpa) ? gva : ~0ul;

	if (x86_decode_emulated_instruction(vcpu, 0, NULL, 0) != EMULATION_OK)
		return ~0ul;
	for (i = 0; i < ARRAY_SIZE(ops); i++) {
		if (ops[i]->type != OP_MEM)
			continue;
		gva = kvmi_operand_gva(ctxt, ops[i]);
		if (kvmi_gva_in_page(vcpu, &gva, max(ops[i]->bytes, 1u), gpa))
			return gva;
	}

	/* What is pushed or popped. */
	gva = kvm_rsp_read(vcpu);
	if (ctxt->mode != X86EMUL_MODE_PROT64)
		gva += ctxt->ops->get_cached_segment_base(ctxt, VCPU_SREG_SS);
	gva -= sizeof(u64);
	return kvmi_gva_in_page(vcpu, &gva, 2 * sizeof(u64), gpa) ? gva : ~0ul;
}

static gva_t kvmi_fault_gva(struct kvm_vcpu *vcpu, gpa_t cr2_or_gpa, gpa_t gpa,
			    u64 error_code)
{
	gva_t gva;

	if (!vcpu->arch.mmu->root_role.direct)
		return cr2_or_gpa;
	gva = static_call(kvm_x86_kvmi_fault_gva)(vcpu);
	if (gva)
		return gva;
	/* The tables that an address is looked up in have none themselves. */
	if (error_code & PFERR_GUEST_PAGE_MASK ||
	    kvm_event_needs_reinjection(vcpu))
		return ~0ul;
	return kvmi_find_gva(vcpu, gpa, kvmi_fault_access(error_code));
}

static bool kvmi_pf_reply_valid(const void *data)
{
	const struct kvmi_event_pf_reply *rpl = data;

	return rpl->ctx_size <= sizeof(rpl->ctx_data) && rpl->singlestep <= 1 &&
	       rpl->rep_complete <= 1 && !rpl->padding;
}

static int kvmi_event_pf(struct kvm_vcpu *vcpu, gva_t gva, gpa_t gpa, u8 access,
			 struct kvmi_event_pf_reply *rpl)
{
	static const struct kvmi_event_pf_reply same;
	const struct kvmi_vcpu_reply expect = {
		.actions = BIT(KVMI_EVENT_ACTION_CONTINUE) |
			   BIT(KVMI_EVENT_ACTION_RETRY),
		.data = rpl,
		.same = &same,
		.size = sizeof(*rpl),
		.valid = kvmi_pf_reply_valid,
	};
	struct kvmi_event_pf ev = { .gva = gva, .gpa = gpa, .access = access };
	int ret;

	ret = kvmi_exit_event(vcpu, KVMI_EVENT_PF, &ev, sizeof(ev), &expect);
	if (ret < 0)
		*rpl = same;
	return ret;
}

static int kvmi_emulate_access(struct kvm_vcpu *vcpu, gfn_t gfn,
			       const struct kvmi_event_pf_reply *rpl)
{
	unsigned long rip = kvm_rip_read(vcpu);
	int r;

	vcpu->kvmi.pf = rpl;
	vcpu->kvmi.pf_gfn = gfn;
	/* KVM lets the guest go on in the middle of a long string. */
	do {
		cond_resched();
		r = kvm_emulate_instruction(vcpu, 0);
	} while (r > 0 && rpl->rep_complete && kvm_rip_read(vcpu) == rip &&
		 !vcpu->arch.exception.pending && !signal_pending(current) &&
		 !kvm_test_request(KVM_REQ_EVENT, vcpu) &&
		 !kvm_test_request(KVM_REQ_INTROSPECTION, vcpu));
	vcpu->kvmi.pf = NULL;

	return r;
}

int __kvmi_page_fault(struct kvm_vcpu *vcpu, gpa_t cr2_or_gpa, u64 error_code)
{
	u8 access = kvmi_fault_access(error_code);
	struct kvmi_event_pf_reply rpl;
	struct kvmi *kvmi;
	gpa_t gpa;
	gfn_t gfn;
	int ret = -ENOENT;

	if (error_code & PFERR_RSVD_MASK || !kvmi_in_view(vcpu))
		return -ENOENT;
	gpa = kvmi_fault_gpa(vcpu, cr2_or_gpa, error_code);
	gfn = gpa_to_gfn(gpa);
	if (gpa == INVALID_GPA || !kvm_vcpu_is_visible_gfn(vcpu, gfn))
		return -ENOENT;

	kvmi = kvmi_get(vcpu->kvm);
	if (!kvmi)
		return -ENOENT;
	if (!(access & ~kvmi_access_now(kvmi, gfn)))
		goto out;
	if (kvmi_owes_step(vcpu, gfn)) {
		kvmi_start_step(kvmi, vcpu, gfn);
		ret = 1;
		goto out;
	}

	ret = kvmi_event_pf(vcpu,
			    kvmi_fault_gva(vcpu, cr2_or_gpa, gpa, error_code),
			    gpa, access, &rpl);
	/* What is not the instruction's own access cannot be emulated. */
	if (rpl.singlestep || (ret != KVMI_EVENT_ACTION_RETRY &&
			       kvm_event_needs_reinjection(vcpu)))
		kvmi_start_step(kvmi, vcpu, gfn);
	else if (ret != KVMI_EVENT_ACTION_RETRY && !READ_ONCE(kvmi->ended)) {
		ret = kvmi_emulate_access(vcpu, gfn, &rpl);
		goto out;
	}
	ret = 1;
out:
	kvmi_put(kvmi);
	return ret;
}

/* ---- the emulator ---- */

bool __kvmi_emulated_access(struct kvm_vcpu *vcpu, gva_t gva, gpa_t gpa,
			    bool write)
{
	u8 access = write ? KVMI_PAGE_ACCESS_W : KVMI_PAGE_ACCESS_R;
	struct kvmi_event_pf_reply rpl;
	gfn_t gfn = gpa_to_gfn(gpa);
	struct kvmi *kvmi;
	bool watched;

	/* It has been asked about. */
	if (!kvmi_in_view(vcpu) ||
	    (vcpu->kvmi.pf && vcpu->kvmi.pf_gfn == gfn))
		return true;

	kvmi = kvmi_get(vcpu->kvm);
	if (!kvmi)
		return true;
	watched = access & ~kvmi_access_now(kvmi, gfn);
	kvmi_put(kvmi);

	return !watched || kvmi_event_pf(vcpu, gva, gpa, access, &rpl) !=
			   KVMI_EVENT_ACTION_RETRY;
}

bool __kvmi_custom_read(struct kvm_vcpu *vcpu, gva_t gva, void *val,
			unsigned int bytes)
{
	const struct kvmi_event_pf_reply *rpl = vcpu->kvmi.pf;
	u64 offset = gva - rpl->ctx_addr;

	if (offset >= rpl->ctx_size || bytes > rpl->ctx_size - offset)
		return false;
	memcpy(val, rpl->ctx_data + offset, bytes);
	return true;
}
