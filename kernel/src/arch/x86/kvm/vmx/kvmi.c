// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection: Intel's execution controls.
 */
#include <linux/module.h>
#include "vmx.h"
#include "../kvm_cache_regs.h"
#include "../kvmi.h"

MODULE_VERSION(KVMI_MODULE_VERSION);

/* vcpu->kvmi.cr_writes has changed. */
void vmx_kvmi_update_crs(struct kvm_vcpu *vcpu)
{
	struct vcpu_vmx *vmx = to_vmx(vcpu);
	/* Bits that the guest owned so far are in its VMCS: fetch them first. */
	unsigned long cr0 = kvm_read_cr0(vcpu);
	unsigned long cr4 = kvm_read_cr4(vcpu);

	(void)kvm_read_cr3(vcpu);

	vcpu->arch.cr0_guest_owned_bits = vmx_l1_guest_owned_cr0_bits(vcpu);
	vmcs_writel(CR0_GUEST_HOST_MASK, ~vcpu->arch.cr0_guest_owned_bits);
	set_cr4_guest_host_mask(vmx);

	/* They write the read shadows; the first one chooses CR3's exits. */
	vmx_set_cr0(vcpu, cr0);
	vmx_set_cr4(vcpu, cr4);
	vmx_kvmi_update_cr3_exits(vcpu);
}

/* With unrestricted guests KVM itself never intercepts CR3. */
void vmx_kvmi_update_cr3_exits(struct kvm_vcpu *vcpu)
{
	struct vcpu_vmx *vmx = to_vmx(vcpu);

	if (!enable_ept || is_guest_mode(vcpu))
		return;
	if (kvmi_wants_cr(vcpu, 3))
		exec_controls_setbit(vmx, CPU_BASED_CR3_LOAD_EXITING);
	else if (enable_unrestricted_guest)
		exec_controls_clearbit(vmx, CPU_BASED_CR3_LOAD_EXITING);
}
