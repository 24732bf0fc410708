// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection: the wire.
 *
 * Nothing that comes from the socket is trusted. A handler answers what it
 * can name as an error and returns 0; a message that leaves the stream or the
 * exchange in doubt makes it return an error, which ends the session.
 */
#define pr_fmt(fmt) "kvmi: " fmt

#include <linux/kthread.h>
#include <linux/nospec.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <net/sock.h>
#include "kvmi_int.h"

/* The least of a reply that is accepted: its vCPU, action and event. */
#define KVMI_MIN_REPLY (sizeof(struct kvmi_vcpu_hdr) + \
			offsetofend(struct kvmi_event_reply, event))

#define kvmi_warn(kvmi, fmt, ...) \
	pr_warn_ratelimited("%pU: " fmt, &(kvmi)->uuid, ##__VA_ARGS__)

/* ---- the socket ---- */

/*
 * Reads what there is if there are less than @size bytes, which the buffer has
 * room for. Returns 1 if there are now, 0 if they are yet to come, and an error
 * at the end of the stream.
 */
static int kvmi_sock_read(struct kvmi *kvmi, size_t size)
{
	struct msghdr msg = {};
	struct kvec vec;
	int got;

	while (kvmi->received < size) {
		vec.iov_base = kvmi->msg + kvmi->received;
		vec.iov_len = sizeof(kvmi->msg) - kvmi->received;
		got = kernel_recvmsg(kvmi->sock, &msg, &vec, 1, vec.iov_len,
				     MSG_DONTWAIT);
		if (got == -EAGAIN)
			return 0;
		if (got <= 0)
			return -EPIPE;
		kvmi->received += got;
	}
	return 1;
}

/* Called under @send_lock. Only a fatal signal breaks a message off. */
static int kvmi_sock_write(struct kvmi *kvmi, struct kvec *vec, size_t n,
			   size_t size)
{
	struct msghdr msg = { .msg_flags = MSG_NOSIGNAL };
	sigset_t fatal_only, old;
	int sent;

	siginitsetinv(&fatal_only, sigmask(SIGKILL));
	sigprocmask(SIG_SETMASK, &fatal_only, &old);
	sent = kernel_sendmsg(kvmi->sock, &msg, vec, n, size);
	sigprocmask(SIG_SETMASK, &old, NULL);

	if (sent < 0)
		return sent;
	return sent == size ? 0 : -EPIPE;
}

/*
 * While answers are off, an error code alone is not sent, and data that
 * nobody gets is a fault of the introspector.
 */
int kvmi_answer(const struct kvmi_ctx *ctx, int err, const void *data,
		size_t size)
{
	struct kvmi_error_code ec = { .err = err };
	struct kvmi_msg_hdr hdr = {
		.id = ctx->hdr->id,
		.seq = ctx->hdr->seq,
	};
	struct kvec vec[] = {
		{ .iov_base = &hdr, .iov_len = sizeof(hdr) },
		{ .iov_base = &ec, .iov_len = sizeof(ec) },
		{ .iov_base = (void *)data, .iov_len = size },
	};
	struct kvmi *kvmi = ctx->kvmi;
	int ret;

	if (err)
		size = 0;
	if (ctx->no_answer)
		return size ? -EINVAL : 0;

	hdr.size = sizeof(ec) + size;
	ret = mutex_lock_killable(&kvmi->send_lock);
	if (ret)
		return ret;
	ret = kvmi_sock_write(kvmi, vec, size ? 3 : 2,
			      sizeof(hdr) + sizeof(ec) + size);
	mutex_unlock(&kvmi->send_lock);

	return ret;
}

/* ---- commands of the VM: answered by whoever reads them ---- */

static int kvmi_get_version(const struct kvmi_ctx *ctx, const void *payload,
			    size_t size)
{
	struct kvmi_get_version_reply rpl = { .version = KVMI_VERSION };

	return kvmi_answer(ctx, 0, &rpl, sizeof(rpl));
}

static int kvmi_check(const struct kvmi_ctx *ctx, const struct kvmi_check *cmd,
		      const unsigned long *allowed, unsigned int count)
{
	int err = 0;

	if (cmd->padding1 || cmd->padding2)
		err = -EINVAL;
	else if (cmd->id >= count ||
		 !test_bit(array_index_nospec(cmd->id, count), allowed))
		err = -EPERM;

	return kvmi_answer(ctx, err, NULL, 0);
}

static int kvmi_check_command(const struct kvmi_ctx *ctx, const void *payload,
			      size_t size)
{
	return kvmi_check(ctx, payload, ctx->kvmi->cmd_allowed,
			  KVMI_NUM_MESSAGES);
}

static int kvmi_check_event(const struct kvmi_ctx *ctx, const void *payload,
			    size_t size)
{
	return kvmi_check(ctx, payload, ctx->kvmi->event_allowed,
			  KVMI_NUM_EVENTS);
}

static int kvmi_get_guest_info(const struct kvmi_ctx *ctx, const void *payload,
			       size_t size)
{
	struct kvmi_get_guest_info_reply rpl = {
		.vcpu_count = atomic_read(&ctx->kvmi->kvm->online_vcpus),
	};

	return kvmi_answer(ctx, 0, &rpl, sizeof(rpl));
}

static int kvmi_control_vm_events(const struct kvmi_ctx *ctx,
				  const void *payload, size_t size)
{
	const struct kvmi_control_events *cmd = payload;
	struct kvmi *kvmi = ctx->kvmi;
	int err = 0;

	if (cmd->enable > 1 || cmd->padding1 || cmd->padding2)
		err = -EINVAL;
	else if (cmd->event_id != KVMI_EVENT_UNHOOK &&
		 cmd->event_id != KVMI_EVENT_CREATE_VCPU)
		err = -EINVAL;
	else if (!test_bit(cmd->event_id, kvmi->event_allowed))
		err = -EPERM;
	else
		assign_bit(cmd->event_id, kvmi->vm_events, cmd->enable);

	/* Those that have not announced themselves do so now. */
	if (!err && cmd->enable && cmd->event_id == KVMI_EVENT_CREATE_VCPU)
		kvmi_kick_all(kvmi);

	return kvmi_answer(ctx, err, NULL, 0);
}

static int kvmi_control_cmd_response(const struct kvmi_ctx *ctx,
				     const void *payload, size_t size)
{
	const struct kvmi_control_cmd_response *cmd = payload;
	struct kvmi_ctx now = *ctx;

	if (cmd->enable > 1 || cmd->now > 1 || cmd->padding1 || cmd->padding2)
		return kvmi_answer(ctx, -EINVAL, NULL, 0);

	ctx->kvmi->answers_off = !cmd->enable;
	if (cmd->now)
		now.no_answer = !cmd->enable;

	return kvmi_answer(&now, 0, NULL, 0);
}

static int kvmi_get_max_gfn(const struct kvmi_ctx *ctx, const void *payload,
			    size_t size)
{
	struct kvmi_get_max_gfn_reply rpl = {};
	struct kvm *kvm = ctx->kvmi->kvm;
	struct kvm_memory_slot *slot;
	int idx, bkt;

	idx = srcu_read_lock(&kvm->srcu);
	kvm_for_each_memslot(slot, bkt, kvm_memslots(kvm)) {
		if (slot->id >= KVM_USER_MEM_SLOTS)
			continue;
		rpl.gfn = max(rpl.gfn, slot->base_gfn + slot->npages - 1);
	}
	srcu_read_unlock(&kvm->srcu, idx);

	return kvmi_answer(ctx, 0, &rpl, sizeof(rpl));
}

static int kvmi_copy_from_guest(struct kvm *kvm, u64 gpa, void *data,
				size_t size)
{
	unsigned long hva = gfn_to_hva_prot(kvm, gpa_to_gfn(gpa), NULL);

	if (kvm_is_error_hva(hva))
		return -EINVAL;
	hva += offset_in_page(gpa);
	return copy_from_user(data, (void __user *)hva, size) ? -EINVAL : 0;
}

/*
 * Like kvm_write_guest(), but outside of any vCPU, where a dirty ring has no
 * place for the page.
 */
static int kvmi_copy_to_guest(struct kvm *kvm, u64 gpa, const void *data,
			      size_t size)
{
	struct kvm_memory_slot *slot = gfn_to_memslot(kvm, gpa_to_gfn(gpa));
	unsigned long hva = gfn_to_hva(kvm, gpa_to_gfn(gpa));

	if (kvm_is_error_hva(hva))
		return -EINVAL;
	if (kvm->dirty_ring_size)
		return -EOPNOTSUPP;
	hva += offset_in_page(gpa);
	if (copy_to_user((void __user *)hva, data, size))
		return -EINVAL;
	if (kvm_slot_dirty_track_enabled(slot))
		set_bit_le(gpa_to_gfn(gpa) - slot->base_gfn,
			   slot->dirty_bitmap);
	kvmi_page_written(kvm, gpa_to_gfn(gpa));
	return 0;
}

static int kvmi_access_guest(struct kvm *kvm, u64 gpa, void *to,
			     const void *from, size_t size)
{
	/* A vCPU's thread is the VMM's. */
	bool stranger = current->flags & PF_KTHREAD;
	struct mm_struct *mm = kvm->mm;
	int err, idx;

	/* The VMM may be on its way out. */
	if (stranger && !mmget_not_zero(mm))
		return -EINVAL;
	if (stranger)
		kthread_use_mm(mm);
	idx = srcu_read_lock(&kvm->srcu);
	err = to ? kvmi_copy_from_guest(kvm, gpa, to, size) :
		   kvmi_copy_to_guest(kvm, gpa, from, size);
	srcu_read_unlock(&kvm->srcu, idx);
	if (stranger) {
		kthread_unuse_mm(mm);
		mmput(mm);
	}
	return err;
}

static bool kvmi_within_page(u64 gpa, u64 size)
{
	return size && size <= PAGE_SIZE - offset_in_page(gpa);
}

static int kvmi_read_physical(const struct kvmi_ctx *ctx, const void *payload,
			      size_t size)
{
	const struct kvmi_read_physical *cmd = payload;
	void *page = ctx->kvmi->page;
	int err;

	if (!kvmi_within_page(cmd->gpa, cmd->size))
		return -EINVAL;

	err = kvmi_access_guest(ctx->kvmi->kvm, cmd->gpa, page, NULL,
				cmd->size);
	return kvmi_answer(ctx, err, page, cmd->size);
}

static int kvmi_write_physical(const struct kvmi_ctx *ctx, const void *payload,
			       size_t size)
{
	const struct kvmi_write_physical *cmd = payload;
	int err;

	if (!kvmi_within_page(cmd->gpa, cmd->size) ||
	    size < sizeof(*cmd) + cmd->size)
		return -EINVAL;

	err = kvmi_access_guest(ctx->kvmi->kvm, cmd->gpa, NULL, cmd->data,
				cmd->size);
	return kvmi_answer(ctx, err, NULL, 0);
}

static bool kvmi_visible(struct kvm *kvm, gpa_t gpa)
{
	int idx = srcu_read_lock(&kvm->srcu);
	bool visible = kvm_is_visible_gfn(kvm, gpa_to_gfn(gpa));

	srcu_read_unlock(&kvm->srcu, idx);
	return visible;
}

static int kvmi_get_page_access(const struct kvmi_ctx *ctx, const void *payload,
				size_t size)
{
	const struct kvmi_get_page_access *cmd = payload;
	struct kvmi *kvmi = ctx->kvmi;
	u8 access[KVMI_MSG_SIZE / sizeof(cmd->gpa[0])];
	unsigned int i, count = cmd->count;

	if (cmd->view || cmd->padding || size < struct_size(cmd, gpa, count))
		return kvmi_answer(ctx, -EINVAL, NULL, 0);

	for (i = 0; i < count; i++) {
		if (!kvmi_visible(kvmi->kvm, cmd->gpa[i]))
			return kvmi_answer(ctx, -EINVAL, NULL, 0);
		access[i] = kvmi_get_access(kvmi, gpa_to_gfn(cmd->gpa[i]));
	}
	return kvmi_answer(ctx, 0, access, count);
}

/* All or nothing, unless memory runs out. */
static int kvmi_set_page_access(const struct kvmi_ctx *ctx, const void *payload,
				size_t size)
{
	const struct kvmi_set_page_access *cmd = payload;
	const struct kvmi_page_access_entry *entry;
	unsigned int i, count = cmd->count;
	struct kvmi *kvmi = ctx->kvmi;
	int err = 0;

	if (cmd->view || cmd->padding ||
	    size < struct_size(cmd, entries, count))
		return kvmi_answer(ctx, -EINVAL, NULL, 0);
	if (!kvmi_event_served(KVMI_EVENT_PF))
		return kvmi_answer(ctx, -EOPNOTSUPP, NULL, 0);

	for (i = 0; i < count; i++) {
		entry = &cmd->entries[i];
		if (entry->padding1 || entry->padding2 || entry->padding3 ||
		    !kvmi_page_access_valid(entry->access) ||
		    !kvmi_visible(kvmi->kvm, entry->gpa))
			return kvmi_answer(ctx, -EINVAL, NULL, 0);
	}
	for (i = 0; i < count && !err; i++) {
		entry = &cmd->entries[i];
		err = kvmi_set_access(kvmi, gpa_to_gfn(entry->gpa),
				      entry->access);
	}
	return kvmi_answer(ctx, err, NULL, 0);
}

static int kvmi_get_mtrr_type(const struct kvmi_ctx *ctx, const void *payload,
			      size_t size)
{
	const struct kvmi_get_mtrr_type *cmd = payload;
	struct kvmi_get_mtrr_type_reply rpl = {};
	int err = kvmi_arch_mtrr_type(ctx->kvmi->kvm, cmd->gpa, &rpl.type);

	return kvmi_answer(ctx, err, &rpl, sizeof(rpl));
}

static int kvmi_pause_vcpu(const struct kvmi_ctx *ctx, struct kvm_vcpu *vcpu,
			   const void *payload)
{
	const struct kvmi_pause_vcpu *cmd = payload;
	struct kvmi *kvmi = ctx->kvmi;
	int err;

	if (cmd->wait > 1 || cmd->padding1 || cmd->padding2 || cmd->padding3)
		err = -EINVAL;
	else if (!test_bit(KVMI_EVENT_PAUSE_VCPU, kvmi->event_allowed))
		err = -EPERM;
	else
		err = kvmi_add_pause(kvmi, vcpu, cmd->wait);

	return kvmi_answer(ctx, err, NULL, 0);
}

/* ---- commands of a vCPU: answered by its own thread ---- */

static int kvmi_get_vcpu_info(const struct kvmi_ctx *ctx, struct kvmi_vcpu *iv,
			      struct kvm_vcpu *vcpu, const void *payload,
			      size_t size)
{
	struct kvmi_get_vcpu_info_reply rpl = {
		.tsc_speed = kvmi_arch_tsc_hz(vcpu),
	};

	return kvmi_answer(ctx, 0, &rpl, sizeof(rpl));
}

static int kvmi_control_events(const struct kvmi_ctx *ctx, struct kvmi_vcpu *iv,
			       struct kvm_vcpu *vcpu, const void *payload,
			       size_t size)
{
	const struct kvmi_control_events *cmd = payload;
	unsigned int id = cmd->event_id;
	int err = 0;

	if (cmd->enable > 1 || cmd->padding1 || cmd->padding2 ||
	    id >= KVMI_NUM_EVENTS || id == KVMI_EVENT_UNHOOK ||
	    id == KVMI_EVENT_CREATE_VCPU ||
	    (id == KVMI_EVENT_PAUSE_VCPU && !cmd->enable))
		err = -EINVAL;
	else if (!kvmi_event_served(id))
		err = -EOPNOTSUPP;
	else if (!test_bit(id, ctx->kvmi->event_allowed))
		err = -EPERM;
	else
		__assign_bit(id, iv->events, cmd->enable);

	if (!err)
		kvm_make_request(KVM_REQ_INTROSPECTION, vcpu);
	return kvmi_answer(ctx, err, NULL, 0);
}

static int kvmi_control_cr(const struct kvmi_ctx *ctx, struct kvmi_vcpu *iv,
			   struct kvm_vcpu *vcpu, const void *payload,
			   size_t size)
{
	int err = kvmi_arch_control_cr(iv, payload);

	if (!err)
		kvm_make_request(KVM_REQ_INTROSPECTION, vcpu);
	return kvmi_answer(ctx, err, NULL, 0);
}

static int kvmi_control_msr(const struct kvmi_ctx *ctx, struct kvmi_vcpu *iv,
			    struct kvm_vcpu *vcpu, const void *payload,
			    size_t size)
{
	int err = kvmi_arch_control_msr(iv, payload);

	if (!err)
		kvm_make_request(KVM_REQ_INTROSPECTION, vcpu);
	return kvmi_answer(ctx, err, NULL, 0);
}

static int kvmi_get_cpuid(const struct kvmi_ctx *ctx, struct kvmi_vcpu *iv,
			  struct kvm_vcpu *vcpu, const void *payload,
			  size_t size)
{
	struct kvmi_get_cpuid_reply rpl;
	int err = kvmi_arch_get_cpuid(vcpu, payload, &rpl);

	return kvmi_answer(ctx, err, &rpl, sizeof(rpl));
}

static int kvmi_get_xsave(const struct kvmi_ctx *ctx, struct kvmi_vcpu *iv,
			  struct kvm_vcpu *vcpu, const void *payload,
			  size_t size)
{
	struct kvm_xsave *xsave = kzalloc(sizeof(*xsave), GFP_KERNEL_ACCOUNT);
	int err;

	if (!xsave)
		return kvmi_answer(ctx, -ENOMEM, NULL, 0);
	err = kvm_arch_vcpu_get_xsave(vcpu, xsave);
	err = kvmi_answer(ctx, err, xsave, sizeof(*xsave));
	kfree(xsave);
	return err;
}

static int kvmi_inject_exception(const struct kvmi_ctx *ctx,
				 struct kvmi_vcpu *iv, struct kvm_vcpu *vcpu,
				 const void *payload, size_t size)
{
	int err = kvmi_arch_inject_exception(iv, payload);

	if (!err)
		kvm_make_request(KVM_REQ_INTROSPECTION, vcpu);
	return kvmi_answer(ctx, err, NULL, 0);
}

static int kvmi_get_registers(const struct kvmi_ctx *ctx, struct kvmi_vcpu *iv,
			      struct kvm_vcpu *vcpu, const void *payload,
			      size_t size)
{
	return kvmi_arch_get_registers(ctx, vcpu, payload, size);
}

static int kvmi_set_registers(const struct kvmi_ctx *ctx, struct kvmi_vcpu *iv,
			      struct kvm_vcpu *vcpu, const void *payload,
			      size_t size)
{
	if (iv->waiting) {
		memcpy(&iv->regs, payload, sizeof(iv->regs));
		iv->have_regs = true;
	}
	return kvmi_answer(ctx, 0, NULL, 0);
}

/* ---- dispatch ---- */

/* One of @vm, @any and @vcpu serves it. */
struct kvmi_command {
	size_t size;		/* the least payload, without the vCPU header */
	bool changes_guest;
	int (*vm)(const struct kvmi_ctx *ctx, const void *payload, size_t size);
	/* about a vCPU, but served by whoever reads it */
	int (*any)(const struct kvmi_ctx *ctx, struct kvm_vcpu *vcpu,
		   const void *payload);
	int (*vcpu)(const struct kvmi_ctx *ctx, struct kvmi_vcpu *iv,
		    struct kvm_vcpu *vcpu, const void *payload, size_t size);
};

static const struct kvmi_command kvmi_commands[KVMI_NUM_MESSAGES] = {
	[KVMI_GET_VERSION] = { .vm = kvmi_get_version },
	[KVMI_CHECK_COMMAND] = {
		.vm = kvmi_check_command,
		.size = sizeof(struct kvmi_check),
	},
	[KVMI_CHECK_EVENT] = {
		.vm = kvmi_check_event,
		.size = sizeof(struct kvmi_check),
	},
	[KVMI_GET_GUEST_INFO] = { .vm = kvmi_get_guest_info },
	[KVMI_GET_VCPU_INFO] = { .vcpu = kvmi_get_vcpu_info },
	[KVMI_PAUSE_VCPU] = {
		.any = kvmi_pause_vcpu,
		.size = sizeof(struct kvmi_pause_vcpu),
	},
	[KVMI_CONTROL_VM_EVENTS] = {
		.vm = kvmi_control_vm_events,
		.size = sizeof(struct kvmi_control_events),
	},
	[KVMI_CONTROL_EVENTS] = {
		.vcpu = kvmi_control_events,
		.size = sizeof(struct kvmi_control_events),
	},
	[KVMI_CONTROL_CR] = {
		.vcpu = kvmi_control_cr,
		.size = sizeof(struct kvmi_control_cr),
	},
	[KVMI_CONTROL_MSR] = {
		.vcpu = kvmi_control_msr,
		.size = sizeof(struct kvmi_control_msr),
	},
	[KVMI_GET_REGISTERS] = {
		.vcpu = kvmi_get_registers,
		.size = sizeof(struct kvmi_get_registers),
	},
	[KVMI_SET_REGISTERS] = {
		.vcpu = kvmi_set_registers,
		.size = sizeof(struct kvm_regs),
		.changes_guest = true,
	},
	[KVMI_GET_CPUID] = {
		.vcpu = kvmi_get_cpuid,
		.size = sizeof(struct kvmi_get_cpuid),
	},
	[KVMI_GET_XSAVE] = { .vcpu = kvmi_get_xsave },
	[KVMI_READ_PHYSICAL] = {
		.vm = kvmi_read_physical,
		.size = sizeof(struct kvmi_read_physical),
	},
	[KVMI_WRITE_PHYSICAL] = {
		.vm = kvmi_write_physical,
		.size = sizeof(struct kvmi_write_physical),
		.changes_guest = true,
	},
	[KVMI_INJECT_EXCEPTION] = {
		.vcpu = kvmi_inject_exception,
		.size = sizeof(struct kvmi_inject_exception),
		.changes_guest = true,
	},
	[KVMI_GET_PAGE_ACCESS] = {
		.vm = kvmi_get_page_access,
		.size = sizeof(struct kvmi_get_page_access),
	},
	[KVMI_SET_PAGE_ACCESS] = {
		.vm = kvmi_set_page_access,
		.size = sizeof(struct kvmi_set_page_access),
		.changes_guest = true,
	},
	[KVMI_GET_MTRR_TYPE] = {
		.vm = kvmi_get_mtrr_type,
		.size = sizeof(struct kvmi_get_mtrr_type),
	},
	[KVMI_CONTROL_CMD_RESPONSE] = {
		.vm = kvmi_control_cmd_response,
		.size = sizeof(struct kvmi_control_cmd_response),
	},
	[KVMI_GET_MAX_GFN] = { .vm = kvmi_get_max_gfn },
};

/* Returns NULL for an id that is not served. */
static const struct kvmi_command *kvmi_command(unsigned int id)
{
	const struct kvmi_command *cmd;

	if (id >= KVMI_NUM_MESSAGES)
		return NULL;
	cmd = &kvmi_commands[array_index_nospec(id, KVMI_NUM_MESSAGES)];
	return cmd->vm || cmd->any || cmd->vcpu ? cmd : NULL;
}

bool kvmi_command_served(unsigned int id)
{
	return kvmi_command(id);
}

bool kvmi_command_changes_guest(unsigned int id)
{
	const struct kvmi_command *cmd = kvmi_command(id);

	return cmd && cmd->changes_guest;
}

bool kvmi_event_served(unsigned int id)
{
	return id < KVMI_NUM_EVENTS && kvmi_arch_event_served(id);
}

static int kvmi_queue(struct kvmi *kvmi, struct kvm_vcpu *vcpu,
		      const struct kvmi_msg_hdr *hdr, const void *payload,
		      bool no_answer)
{
	struct kvmi_job *job;
	int err;

	job = kmalloc(struct_size(job, payload, hdr->size), GFP_KERNEL_ACCOUNT);
	if (!job)
		return -ENOMEM;
	job->no_answer = no_answer;
	job->hdr = *hdr;
	memcpy(job->payload, payload, hdr->size);

	err = kvmi_add_job(kvmi, vcpu, job);
	if (err)
		kfree(job);
	return err;
}

/* Returns an error if the vCPU header is not one. */
static int kvmi_find_vcpu(struct kvmi *kvmi, const struct kvmi_msg_hdr *hdr,
			  const void *payload, struct kvm_vcpu **vcpu)
{
	const struct kvmi_vcpu_hdr *vh = payload;

	if (hdr->size < sizeof(*vh) || vh->padding1 || vh->padding2)
		return -EINVAL;
	*vcpu = kvm_get_vcpu(kvmi->kvm, vh->vcpu);
	return 0;
}

static int kvmi_dispatch_reply(struct kvmi *kvmi,
			       const struct kvmi_msg_hdr *hdr,
			       const void *payload)
{
	struct kvm_vcpu *vcpu;
	int err;

	err = kvmi_find_vcpu(kvmi, hdr, payload, &vcpu);
	if (err)
		return err;
	if (!vcpu)
		return -EINVAL;
	return kvmi_queue(kvmi, vcpu, hdr, payload, true);
}

static int kvmi_dispatch_vcpu(const struct kvmi_ctx *ctx,
			      const struct kvmi_command *cmd,
			      const void *payload)
{
	const struct kvmi_msg_hdr *hdr = ctx->hdr;
	struct kvm_vcpu *vcpu;
	int err;

	err = kvmi_find_vcpu(ctx->kvmi, hdr, payload, &vcpu);
	if (err)
		return err;

	if (!vcpu || hdr->size < sizeof(struct kvmi_vcpu_hdr) + cmd->size)
		return kvmi_answer(ctx, -EINVAL, NULL, 0);
	if (!kvmi_arch_vcpu_started(vcpu))
		return kvmi_answer(ctx, -EAGAIN, NULL, 0);

	if (cmd->any)
		return cmd->any(ctx, vcpu,
				payload + sizeof(struct kvmi_vcpu_hdr));

	err = kvmi_queue(ctx->kvmi, vcpu, hdr, payload, ctx->no_answer);
	return err ? kvmi_answer(ctx, err, NULL, 0) : 0;
}

static int kvmi_dispatch(struct kvmi *kvmi, const struct kvmi_msg_hdr *hdr,
			 const void *payload)
{
	const struct kvmi_command *cmd = kvmi_command(hdr->id);
	struct kvmi_ctx ctx = { .kvmi = kvmi, .hdr = hdr };

	if (hdr->id == KVMI_EVENT_REPLY)
		return kvmi_dispatch_reply(kvmi, hdr, payload);

	/* These two are sent even while answers are off. */
	if (!cmd)
		return kvmi_answer(&ctx, -EOPNOTSUPP, NULL, 0);
	if (!test_bit(hdr->id, kvmi->cmd_allowed))
		return kvmi_answer(&ctx, -EPERM, NULL, 0);

	ctx.no_answer = kvmi->answers_off;
	if (!cmd->vm)
		return kvmi_dispatch_vcpu(&ctx, cmd, payload);
	if (hdr->size < cmd->size)
		return kvmi_answer(&ctx, -EINVAL, NULL, 0);
	return cmd->vm(&ctx, payload, hdr->size);
}

/*
 * Reads and serves one message, under @recv_lock. Returns 1, 0 if it is not all
 * there, and an error if it is the last one.
 */
int kvmi_receive(struct kvmi *kvmi)
{
	struct kvmi_msg_hdr *hdr = (struct kvmi_msg_hdr *)kvmi->msg;
	size_t size;
	int err;

	/* The end of a stream is no news. */
	err = kvmi_sock_read(kvmi, sizeof(*hdr));
	if (err <= 0)
		return err;

	size = sizeof(*hdr) + hdr->size;
	err = -EMSGSIZE;
	if (hdr->size <= KVMI_MSG_SIZE)
		err = kvmi_sock_read(kvmi, size);
	if (!err)
		return 0;
	if (err > 0)
		err = kvmi_dispatch(kvmi, hdr, hdr + 1);

	if (err) {
		kvmi_warn(kvmi, "session ends: message id %u, size %u: %d\n",
			  hdr->id, hdr->size, err);
		return err;
	}
	kvmi->received -= size;
	memmove(kvmi->msg, kvmi->msg + size, kvmi->received);
	return 1;
}

/* Is there anything that kvmi_receive() has not served? Under @recv_lock. */
bool kvmi_has_more(struct kvmi *kvmi)
{
	return kvmi_sock_read(kvmi, 1);
}

/* ---- events and their replies ---- */

static int kvmi_read_reply(struct kvmi *kvmi, struct kvmi_vcpu_reply *expected,
			   const struct kvmi_msg_hdr *hdr, const void *payload)
{
	struct kvmi_event_reply common = {};
	size_t received, own;

	if (hdr->seq != expected->seq || hdr->size < KVMI_MIN_REPLY)
		return -EINVAL;

	/* An older tool may send less of it, but then it sends no more. */
	received = hdr->size - sizeof(struct kvmi_vcpu_hdr);
	payload += sizeof(struct kvmi_vcpu_hdr);
	memcpy(&common, payload, min(received, sizeof(common)));
	if (common.padding1 || common.padding2)
		return -EINVAL;

	own = received > sizeof(common) ? received - sizeof(common) : 0;
	if (own > expected->size)
		return -EINVAL;
	if (expected->size) {
		memset(expected->data, 0, expected->size);
		memcpy(expected->data, payload + sizeof(common), own);
	}
	if (expected->valid && !expected->valid(expected->data))
		return -EINVAL;

	if (common.action != KVMI_EVENT_ACTION_CRASH &&
	    !(common.action < BITS_PER_LONG &&
	      expected->actions & BIT(common.action))) {
		kvmi_warn(kvmi, "event %u does not accept action %u\n",
			  common.event, common.action);
		common.action = KVMI_EVENT_ACTION_CONTINUE;
	}

	if (kvmi->observe &&
	    (common.action != KVMI_EVENT_ACTION_CONTINUE ||
	     (expected->size &&
	      memcmp(expected->data, expected->same, expected->size))))
		return -EPERM;

	expected->action = common.action;
	return 0;
}

static int kvmi_handle_reply(struct kvmi *kvmi, struct kvmi_vcpu *iv,
			     const struct kvmi_job *job)
{
	int err = -EINVAL;

	if (iv->waiting)
		err = kvmi_read_reply(kvmi, &iv->reply, &job->hdr,
				      job->payload);
	if (err)
		kvmi_warn(kvmi, "session ends: reply seq %u, size %u: %d\n",
			  job->hdr.seq, job->hdr.size, err);

	iv->reply.error = err;
	WRITE_ONCE(iv->waiting, false);
	return err;
}

/* An error ends the session. */
int kvmi_run_job(struct kvmi *kvmi, struct kvmi_vcpu *iv, struct kvm_vcpu *vcpu,
		 const struct kvmi_job *job)
{
	struct kvmi_ctx ctx = {
		.kvmi = kvmi,
		.hdr = &job->hdr,
		.no_answer = job->no_answer,
	};

	if (job->hdr.id == KVMI_EVENT_REPLY)
		return kvmi_handle_reply(kvmi, iv, job);

	return kvmi_command(job->hdr.id)->vcpu(&ctx, iv, vcpu,
			job->payload + sizeof(struct kvmi_vcpu_hdr),
			job->hdr.size - sizeof(struct kvmi_vcpu_hdr));
}

/* Numbers the event; *@seq has its number before anybody can reply to it. */
static int kvmi_send_event(struct kvmi *kvmi, const struct kvmi_event *common,
			   const void *data, size_t size, u32 *seq)
{
	struct kvmi_msg_hdr hdr = {
		.id = KVMI_EVENT,
		.size = sizeof(*common) + size,
	};
	struct kvec vec[] = {
		{ .iov_base = &hdr, .iov_len = sizeof(hdr) },
		{ .iov_base = (void *)common, .iov_len = sizeof(*common) },
		{ .iov_base = (void *)data, .iov_len = size },
	};
	int err;

	err = mutex_lock_killable(&kvmi->send_lock);
	if (err)
		return err;
	hdr.seq = ++kvmi->ev_seq;
	*seq = hdr.seq;
	err = kvmi_sock_write(kvmi, vec, size ? 3 : 2,
			      sizeof(hdr) + hdr.size);
	mutex_unlock(&kvmi->send_lock);

	return err;
}

/*
 * Sends the event and waits for its reply, in the vCPU's thread and outside of
 * the read side of kvm->srcu. Returns 0 if there was a valid reply:
 * expect->data holds its own data. After an error the guest goes on as if it
 * had not been looked at.
 */
int kvmi_event(struct kvmi *kvmi, struct kvmi_vcpu *iv, struct kvm_vcpu *vcpu,
	       unsigned int id, const void *data, size_t size,
	       const struct kvmi_vcpu_reply *expect)
{
	struct kvmi_event common = {
		.size = sizeof(common),
		.vcpu = vcpu->vcpu_idx,
		.event = id,
	};
	int err;

	kvmi_arch_fill_event(vcpu, &common.arch);
	iv->reply = *expect;
	iv->have_regs = false;
	kvmi_begin_wait(iv);

	err = kvmi_send_event(kvmi, &common, data, size, &iv->reply.seq);
	if (err)
		kvmi_shutdown(kvmi);
	else
		err = kvmi_wait_for_reply(kvmi, iv, vcpu);

	kvmi_end_wait(iv, vcpu);
	if (err)
		return err;

	if (iv->have_regs)
		kvmi_arch_set_regs(vcpu, &iv->regs);
	if (iv->reply.action == KVMI_EVENT_ACTION_CRASH)
		kill_pid(task_tgid(current), SIGKILL, 1);
	return 0;
}

/* Whether the introspector has asked for the UNHOOK event. */
bool kvmi_wants_unhook(struct kvmi *kvmi)
{
	return test_bit(KVMI_EVENT_UNHOOK, kvmi->event_allowed) &&
	       test_bit(KVMI_EVENT_UNHOOK, kvmi->vm_events);
}

/* -ENOENT: nobody has asked for it. */
int kvmi_event_unhook(struct kvmi *kvmi)
{
	struct kvmi_event common = {
		.size = sizeof(common),
		.event = KVMI_EVENT_UNHOOK,
	};
	u32 seq;
	int err;

	if (!kvmi_wants_unhook(kvmi))
		return -ENOENT;

	err = kvmi_send_event(kvmi, &common, NULL, 0, &seq);
	if (err)
		kvmi_shutdown(kvmi);
	return err;
}
