// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection: Intel's execution controls.
 */
#include <linux/module.h>
#include "vmx.h"
#include "../kvm_cache_regs.h"
#include "../kvmi.h"

MODULE_VERSION(KVMI_MODULE_VERSION);

/* Bit 29 and 28 of the VM-exit instruction information. */
#define KVMI_DESC_INSN(info)	(((info) >> 28) & 3)

void __init vmx_kvmi_setup(void)
{
	/* Access to pages has to be stepped over, too. */
	if (!(vmcs_config.cpu_based_exec_ctrl & CPU_BASED_MONITOR_TRAP_FLAG))
		kvmi_events_not_served |= BIT(KVMI_EVENT_SINGLESTEP) |
					  BIT(KVMI_EVENT_PF);
	if (!(vmcs_config.cpu_based_2nd_exec_ctrl & SECONDARY_EXEC_DESC))
		kvmi_events_not_served |= BIT(KVMI_EVENT_DESCRIPTOR);
}

/* vcpu->kvmi has changed. */
void vmx_kvmi_update(struct kvm_vcpu *vcpu)
{
	struct vcpu_vmx *vmx = to_vmx(vcpu);
	/* Bits that the guest owned so far are in its VMCS: fetch them first. */
	unsigned long cr0 = kvm_read_cr0(vcpu);
	unsigned long cr4 = kvm_read_cr4(vcpu);

	(void)kvm_read_cr3(vcpu);

	vcpu->arch.cr0_guest_owned_bits = vmx_l1_guest_owned_cr0_bits(vcpu);
	vmcs_writel(CR0_GUEST_HOST_MASK, ~vcpu->arch.cr0_guest_owned_bits);
	set_cr4_guest_host_mask(vmx);

	if (kvmi_wants(vcpu, KVMI_EVENT_DESCRIPTOR))
		secondary_exec_controls_setbit(vmx, SECONDARY_EXEC_DESC);
	else if (secondary_exec_controls_get(vmx) & SECONDARY_EXEC_DESC)
		secondary_exec_controls_clearbit(vmx, SECONDARY_EXEC_DESC);

	/*
	 * They write the read shadows; the first one chooses CR3's exits, and
	 * the second whether UMIP needs those of descriptor tables.
	 */
	vmx_set_cr0(vcpu, cr0);
	vmx_set_cr4(vcpu, cr4);
	vmx_kvmi_update_cr3_exits(vcpu);

	if (vcpu->kvmi.step)
		exec_controls_setbit(vmx, CPU_BASED_MONITOR_TRAP_FLAG);
	else
		exec_controls_clearbit(vmx, CPU_BASED_MONITOR_TRAP_FLAG);
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

int vmx_kvmi_descriptor(struct kvm_vcpu *vcpu)
{
	static const u8 descriptors[2][2] = {
		{ KVMI_DESC_GDTR, KVMI_DESC_IDTR },
		{ KVMI_DESC_LDTR, KVMI_DESC_TR },
	};
	unsigned int insn = KVMI_DESC_INSN(vmcs_read32(VMX_INSTRUCTION_INFO));
	bool local = to_vmx(vcpu)->exit_reason.basic == EXIT_REASON_LDTR_TR;

	return kvmi_descriptor(vcpu, descriptors[local][insn & 1], insn & 2);
}

/* The linear address of a violation, or 0 if there is none. */
u64 vmx_kvmi_fault_gva(struct kvm_vcpu *vcpu)
{
	if (to_vmx(vcpu)->exit_reason.basic != EXIT_REASON_EPT_VIOLATION ||
	    !(vmx_get_exit_qual(vcpu) & EPT_VIOLATION_GVA_IS_VALID))
		return 0;
	return vmcs_readl(GUEST_LINEAR_ADDRESS);
}
