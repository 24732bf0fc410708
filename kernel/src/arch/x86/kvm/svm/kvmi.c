// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection: AMD's intercepts.
 */
#include <linux/module.h>
#include "svm.h"
#include "../kvm_cache_regs.h"
#include "../kvmi.h"

MODULE_VERSION(KVMI_MODULE_VERSION);

/* vcpu->kvmi.cr_writes has changed. CR4 writes exit anyway. */
void svm_kvmi_update_crs(struct kvm_vcpu *vcpu)
{
	struct vcpu_svm *svm = to_svm(vcpu);

	/* The host cannot see the registers of such a guest. */
	if (sev_es_guest(vcpu->kvm))
		return;

	if (npt_enabled) {
		if (kvmi_wants_cr(vcpu, 3))
			svm_set_intercept(svm, INTERCEPT_CR3_WRITE);
		else
			svm_clr_intercept(svm, INTERCEPT_CR3_WRITE);
	}
	/* It chooses the intercepts of CR0. */
	svm_set_cr0(vcpu, kvm_read_cr0(vcpu));
}
