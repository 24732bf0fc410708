// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection: sessions, vCPU jobs, waiting for a reply.
 */
#define pr_fmt(fmt) "kvmi: " fmt

#include <linux/bitmap.h>
#include <linux/capability.h>
#include <linux/file.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/sched/signal.h>
#include <linux/sched/stat.h>
#include <linux/slab.h>
#include <linux/smp.h>
#include <linux/uaccess.h>
#include <net/sock.h>
#include "kvmi_int.h"

MODULE_VERSION(KVMI_MODULE_VERSION);

static bool introspection;
module_param(introspection, bool, 0644);
MODULE_PARM_DESC(introspection, "Let a privileged process introspect VMs");

static unsigned int introspection_grace = 5;
module_param(introspection_grace, uint, 0644);
MODULE_PARM_DESC(introspection_grace,
		 "Seconds that a VM waits for its introspector to leave before it is saved, migrated or reset; 0: it is not asked");

static unsigned int introspection_first_seq = 1;
module_param(introspection_first_seq, uint, 0644);
MODULE_PARM_DESC(introspection_first_seq,
		 "Number of the first event of a session; a test sets it to see the count wrap around");

/* How long a vCPU looks for its reply before it sleeps. */
#define KVMI_SPIN_NS	(20 * NSEC_PER_USEC)

int kvmi_capability(void)
{
	return READ_ONCE(introspection) ? KVMI_VERSION : 0;
}

void kvmi_init_vm(struct kvm *kvm)
{
	mutex_init(&kvm->kvmi.lock);
}

/* ---- sessions ---- */

struct kvmi *kvmi_get(struct kvm *kvm)
{
	struct kvmi *kvmi;

	rcu_read_lock();
	kvmi = rcu_dereference(kvm->kvmi.session);
	if (kvmi && !refcount_inc_not_zero(&kvmi->refs))
		kvmi = NULL;
	rcu_read_unlock();

	return kvmi;
}

static void kvmi_free_vcpu(struct kvmi_vcpu *iv)
{
	struct kvmi_job *job, *next;

	list_for_each_entry_safe(job, next, &iv->jobs, link)
		kfree(job);
	bitmap_free(iv->msr_writes);
	kfree(iv);
}

void kvmi_put(struct kvmi *kvmi)
{
	struct kvmi_vcpu *iv;
	unsigned long idx;

	if (!refcount_dec_and_test(&kvmi->refs))
		return;

	xa_for_each(&kvmi->vcpus, idx, iv)
		kvmi_free_vcpu(iv);
	xa_destroy(&kvmi->vcpus);
	xa_destroy(&kvmi->access);
	sockfd_put(kvmi->sock);
	kvfree_rcu(kvmi, rcu);
}

/* Makes the receiving thread end the session, soon. */
void kvmi_shutdown(struct kvmi *kvmi)
{
	kernel_sock_shutdown(kvmi->sock, SHUT_RDWR);
}

/* Returns NULL if there is no memory. */
struct kvmi_vcpu *kvmi_vcpu_state(struct kvmi *kvmi, struct kvm_vcpu *vcpu)
{
	struct kvmi_vcpu *iv, *other;

	iv = xa_load(&kvmi->vcpus, vcpu->vcpu_idx);
	if (iv)
		return iv;

	iv = kzalloc(sizeof(*iv), GFP_KERNEL_ACCOUNT);
	if (!iv)
		return NULL;
	spin_lock_init(&iv->lock);
	INIT_LIST_HEAD(&iv->jobs);
	init_waitqueue_head(&iv->wq);

	other = xa_cmpxchg(&kvmi->vcpus, vcpu->vcpu_idx, NULL, iv,
			   GFP_KERNEL_ACCOUNT);
	if (other) {
		kfree(iv);
		iv = xa_is_err(other) ? NULL : other;
	}
	return iv;
}

static void kvmi_ack_kick(void *unused)
{
}

/* Brings the vCPU's thread to kvmi_handle_request() if it runs or sleeps. */
static void kvmi_kick(struct kvm_vcpu *vcpu, bool wait)
{
	int cpu;

	/* In this order: an unblocked thread must find the first request. */
	kvm_make_request(KVM_REQ_INTROSPECTION, vcpu);
	kvm_make_request(KVM_REQ_UNBLOCK, vcpu);
	kvm_vcpu_kick(vcpu);

	if (!wait)
		return;

	/* The interrupt is taken outside of guest mode only. */
	cpu = READ_ONCE(vcpu->cpu);
	if (cpu >= 0 && READ_ONCE(vcpu->mode) != OUTSIDE_GUEST_MODE)
		smp_call_function_single(cpu, kvmi_ack_kick, NULL, 1);
}

void kvmi_kick_all(struct kvmi *kvmi)
{
	struct kvm_vcpu *vcpu;
	unsigned long idx;

	kvm_for_each_vcpu(idx, vcpu, kvmi->kvm)
		kvmi_kick(vcpu, false);
}

static void kvmi_end(struct kvmi *kvmi)
{
	struct kvm *kvm = kvmi->kvm;
	struct kvmi_vcpu *iv;
	unsigned long idx;

	WRITE_ONCE(kvmi->ended, true);

	mutex_lock(&kvm->kvmi.lock);
	rcu_assign_pointer(kvm->kvmi.session, NULL);
	mutex_unlock(&kvm->kvmi.lock);

	kvmi_shutdown(kvmi);

	/* Waiting vCPUs go on as if told to continue, */
	xa_for_each(&kvmi->vcpus, idx, iv)
		wake_up_all(&iv->wq);
	/* and all of them give up what they intercept for the introspector. */
	kvmi_kick_all(kvmi);
	kvmi_forget_pages(kvmi);

	complete_all(&kvmi->done);
}

/* ---- reading ---- */

/* Something came, or the socket was shut down; called by whoever did that. */
static int kvmi_sock_wake(struct wait_queue_entry *wait, unsigned int mode,
			  int flags, void *key)
{
	struct kvmi *kvmi = container_of(wait, struct kvmi, sock_wait);
	struct kvmi_vcpu *reader;

	if (key && !(key_to_poll(key) & (EPOLLIN | EPOLLERR | EPOLLHUP)))
		return 0;
	WRITE_ONCE(kvmi->readable, true);
	/* Pairs with that in kvmi_wait_for_job(): one of the two sees it. */
	smp_mb();
	reader = READ_ONCE(kvmi->reader);
	wake_up(reader ? &reader->wq : &kvmi->wq);
	return 0;
}

static bool kvmi_has_job(struct kvmi_vcpu *iv)
{
	return !list_empty_careful(&iv->jobs);
}

/*
 * Serves what has come. A vCPU, @iv, does so until something is for itself; it
 * does not wait for its turn if it is to die.
 */
static int kvmi_read(struct kvmi *kvmi, struct kvmi_vcpu *iv)
{
	int ret = 1;

	if (mutex_lock_killable(&kvmi->recv_lock))
		return -EINTR;
	WRITE_ONCE(kvmi->readable, false);
	/* What comes after this sets it again; what came before is read now. */
	smp_mb();
	while (ret > 0 && !kvmi->finished && !(iv && kvmi_has_job(iv)))
		ret = kvmi_receive(kvmi);
	if (ret > 0 && !kvmi->finished && kvmi_has_more(kvmi))
		WRITE_ONCE(kvmi->readable, true);
	if (ret < 0) {
		WRITE_ONCE(kvmi->finished, true);
		wake_up(&kvmi->wq);
	}
	mutex_unlock(&kvmi->recv_lock);

	return 0;
}

static bool kvmi_can_read(struct kvmi *kvmi)
{
	return READ_ONCE(kvmi->readable) && !READ_ONCE(kvmi->finished);
}

static int kvmi_receiver(void *arg)
{
	struct kvmi *kvmi = arg;
	struct kvm *kvm = kvmi->kvm;

	add_wait_queue(sk_sleep(kvmi->sock->sk), &kvmi->sock_wait);
	while (!READ_ONCE(kvmi->finished)) {
		if (test_and_clear_bit(KVMI_ASK_UNHOOK, &kvmi->asked))
			kvmi_event_unhook(kvmi);
		kvmi_read(kvmi, NULL);
		wait_event_idle(kvmi->wq,
				READ_ONCE(kvmi->finished) ||
				test_bit(KVMI_ASK_UNHOOK, &kvmi->asked) ||
				(READ_ONCE(kvmi->readable) &&
				 !READ_ONCE(kvmi->reader)));
	}
	remove_wait_queue(sk_sleep(kvmi->sock->sk), &kvmi->sock_wait);

	kvmi_end(kvmi);
	kvmi_put(kvmi);
	kvm_put_kvm(kvm);
	module_put_and_kthread_exit(0);
}

/*
 * A session whose peer has closed the socket is over, even if its receiving
 * thread has not come round to it: hooking again must not depend on that.
 */
static bool kvmi_peer_is_gone(struct kvmi *kvmi)
{
	return READ_ONCE(kvmi->sock->sk->sk_shutdown) & RCV_SHUTDOWN;
}

/* Returns 0 with kvm->kvmi.lock held and no session on the VM. */
static int kvmi_lock_unhooked(struct kvm *kvm)
{
	struct kvmi *old;
	int err;

	for (;;) {
		if (mutex_lock_killable(&kvm->kvmi.lock))
			return -EINTR;
		old = kvmi_get(kvm);
		if (!old)
			return 0;
		mutex_unlock(&kvm->kvmi.lock);

		err = -EEXIST;
		if (kvmi_peer_is_gone(old))
			err = wait_for_completion_killable(&old->done);
		kvmi_put(old);
		if (err)
			return err;
	}
}

static struct socket *kvmi_get_socket(int fd)
{
	struct socket *sock;
	int err;

	sock = sockfd_lookup(fd, &err);
	if (!sock)
		return ERR_PTR(-EINVAL);

	err = 0;
	if (sock->type != SOCK_STREAM)
		err = -EINVAL;
	else if (sock->state != SS_CONNECTED)
		err = -ENOTCONN;
	if (err) {
		sockfd_put(sock);
		return ERR_PTR(err);
	}
	return sock;
}

static struct kvmi *kvmi_alloc(struct kvm *kvm,
			       const struct kvm_introspection_hook *hook)
{
	struct kvmi *kvmi;
	struct socket *sock;

	sock = kvmi_get_socket(hook->fd);
	if (IS_ERR(sock))
		return ERR_CAST(sock);

	kvmi = kvzalloc(sizeof(*kvmi), GFP_KERNEL_ACCOUNT);
	if (!kvmi) {
		sockfd_put(sock);
		return ERR_PTR(-ENOMEM);
	}

	refcount_set(&kvmi->refs, 1);
	kvmi->kvm = kvm;
	kvmi->sock = sock;
	import_uuid(&kvmi->uuid, hook->uuid);
	kvmi->observe = hook->flags & KVM_INTROSPECTION_OBSERVE;
	kvmi->ev_seq = READ_ONCE(introspection_first_seq) - 1;
	init_completion(&kvmi->done);
	mutex_init(&kvmi->send_lock);
	mutex_init(&kvmi->recv_lock);
	init_waitqueue_head(&kvmi->wq);
	init_waitqueue_func_entry(&kvmi->sock_wait, kvmi_sock_wake);
	xa_init(&kvmi->vcpus);
	xa_init(&kvmi->access);
	set_bit(KVMI_GET_VERSION, kvmi->cmd_allowed);
	set_bit(KVMI_CHECK_COMMAND, kvmi->cmd_allowed);
	set_bit(KVMI_CHECK_EVENT, kvmi->cmd_allowed);

	return kvmi;
}

static int kvmi_hook(struct kvm *kvm, const void __user *argp)
{
	struct kvm_introspection_hook hook;
	struct task_struct *receiver;
	struct kvmi *kvmi;
	int err;

	if (!READ_ONCE(introspection))
		return -EPERM;
	if (copy_from_user(&hook, argp, sizeof(hook)))
		return -EFAULT;
	if (hook.flags & ~KVM_INTROSPECTION_OBSERVE)
		return -EINVAL;

	kvmi = kvmi_alloc(kvm, &hook);
	if (IS_ERR(kvmi))
		return PTR_ERR(kvmi);
	kvmi_arch_use();

	err = kvmi_lock_unhooked(kvm);
	if (err)
		goto out_put;

	receiver = kthread_create(kvmi_receiver, kvmi, "kvmi-%d",
				  kvm->userspace_pid);
	if (IS_ERR(receiver)) {
		err = PTR_ERR(receiver);
		goto out_unlock;
	}

	/* The reference made by kvmi_alloc() is the receiving thread's now. */
	kvm_get_kvm(kvm);
	__module_get(THIS_MODULE);
	rcu_assign_pointer(kvm->kvmi.session, kvmi);
	wake_up_process(receiver);
	mutex_unlock(&kvm->kvmi.lock);

	return 0;

out_unlock:
	mutex_unlock(&kvm->kvmi.lock);
out_put:
	kvmi_put(kvmi);
	return err;
}

static int kvmi_allow(const struct kvm_introspection_feature *feature,
		      unsigned long *allowed, unsigned int count,
		      int (*check)(struct kvmi *kvmi, unsigned int id,
				   bool allow),
		      struct kvmi *kvmi)
{
	unsigned int id;
	int err;

	if (feature->allow > 1 || feature->id < -1 ||
	    feature->id >= (s32)count)
		return -EINVAL;

	for (id = 0; id < count; id++) {
		if (feature->id != -1 && feature->id != id)
			continue;
		err = check(kvmi, id, feature->allow);
		if (err && feature->id != -1)
			return err;
		if (!err)
			assign_bit(id, allowed, feature->allow);
	}
	return 0;
}

static int kvmi_check_allow_command(struct kvmi *kvmi, unsigned int id,
				    bool allow)
{
	if (!kvmi_command_served(id))
		return -EOPNOTSUPP;
	if (id == KVMI_GET_VERSION || id == KVMI_CHECK_COMMAND ||
	    id == KVMI_CHECK_EVENT)
		return allow ? 0 : -EPERM;
	if (allow && kvmi->observe && kvmi_command_changes_guest(id))
		return -EPERM;
	return 0;
}

static int kvmi_check_allow_event(struct kvmi *kvmi, unsigned int id,
				  bool allow)
{
	return kvmi_event_served(id) ? 0 : -EOPNOTSUPP;
}

static int kvmi_force_unhook(struct kvmi *kvmi)
{
	kvmi_shutdown(kvmi);
	return wait_for_completion_killable(&kvmi->done);
}

bool kvmi_is_ioctl(unsigned int ioctl)
{
	switch (ioctl) {
	case KVM_INTROSPECTION_HOOK:
	case KVM_INTROSPECTION_UNHOOK:
	case KVM_INTROSPECTION_FORCE_UNHOOK:
	case KVM_INTROSPECTION_COMMAND:
	case KVM_INTROSPECTION_EVENT:
		return true;
	default:
		return false;
	}
}

/* Unlike other VM ioctls, these are open to a privileged stranger. */
long kvmi_vm_ioctl(struct kvm *kvm, unsigned int ioctl, void __user *argp)
{
	struct kvm_introspection_feature feature = {};
	struct kvmi *kvmi;
	int err;

	if (kvm->mm != current->mm && !capable(CAP_SYS_ADMIN))
		return -EPERM;
	if (kvm->vm_dead)
		return -EIO;

	if (ioctl == KVM_INTROSPECTION_HOOK)
		return kvmi_hook(kvm, argp);

	if (ioctl == KVM_INTROSPECTION_COMMAND ||
	    ioctl == KVM_INTROSPECTION_EVENT)
		if (copy_from_user(&feature, argp, sizeof(feature)))
			return -EFAULT;

	kvmi = kvmi_get(kvm);
	if (!kvmi)
		return -EFAULT;

	switch (ioctl) {
	case KVM_INTROSPECTION_UNHOOK:
		err = kvmi_event_unhook(kvmi);
		break;
	case KVM_INTROSPECTION_FORCE_UNHOOK:
		err = kvmi_force_unhook(kvmi);
		break;
	case KVM_INTROSPECTION_COMMAND:
		err = kvmi_allow(&feature, kvmi->cmd_allowed, KVMI_NUM_MESSAGES,
				 kvmi_check_allow_command, kvmi);
		break;
	case KVM_INTROSPECTION_EVENT:
		err = kvmi_allow(&feature, kvmi->event_allowed, KVMI_NUM_EVENTS,
				 kvmi_check_allow_event, kvmi);
		break;
	default:
		err = -ENOTTY;
	}

	kvmi_put(kvmi);
	return err;
}

/* The VM's file descriptor is gone: so is its VMM, or soon. */
void kvmi_release_vm(struct kvm *kvm)
{
	struct kvmi *kvmi = kvmi_get(kvm);

	if (kvmi) {
		kvmi_shutdown(kvmi);
		kvmi_put(kvmi);
	}
}

/*
 * What the introspector put into the guest's memory is not to be saved or sent
 * away with it, and only the introspector knows it. So it is asked to leave,
 * once, and is given time for that. Then the session ends, if @insist, and the
 * VMM goes on.
 *
 * The receiving thread does the asking: a peer that does not read is not to
 * hold up the VMM for longer.
 */
void kvmi_leave(struct kvm *kvm, bool insist)
{
	unsigned long grace = READ_ONCE(introspection_grace);
	struct kvmi *kvmi = kvmi_get(kvm);

	if (!kvmi)
		return;

	if (grace && kvmi_wants_unhook(kvmi) &&
	    !test_and_set_bit(KVMI_ASKED_UNHOOK, &kvmi->asked)) {
		set_bit(KVMI_ASK_UNHOOK, &kvmi->asked);
		wake_up(&kvmi->wq);
		grace = min(grace, MAX_SCHEDULE_TIMEOUT / HZ) * HZ;
		if (!wait_for_completion_killable_timeout(&kvmi->done, grace))
			pr_warn_ratelimited("the introspector of process %d's VM does not leave\n",
					    kvm->userspace_pid);
	}
	if (insist)
		kvmi_force_unhook(kvmi);
	kvmi_put(kvmi);
}

/*
 * The VMM begins to log who writes to memory that the guest has already: it
 * saves the guest, or sends it away.
 */
void kvmi_set_memory_region(struct kvm *kvm, u64 gpa, u64 size, u32 flags)
{
	struct kvm_memory_slot *slot;
	bool begins;
	int idx;

	if (!rcu_access_pointer(kvm->kvmi.session) ||
	    !(flags & KVM_MEM_LOG_DIRTY_PAGES))
		return;

	idx = srcu_read_lock(&kvm->srcu);
	slot = gfn_to_memslot(kvm, gpa_to_gfn(gpa));
	begins = slot && slot->base_gfn == gpa_to_gfn(gpa) &&
		 slot->npages == size >> PAGE_SHIFT &&
		 !(slot->flags & KVM_MEM_LOG_DIRTY_PAGES);
	srcu_read_unlock(&kvm->srcu, idx);

	if (begins)
		kvmi_leave(kvm, false);
}

/* ---- vCPUs ---- */

/* A vCPU of a hooked VM may have to announce itself when it first runs. */
void kvmi_vcpu_created(struct kvm_vcpu *vcpu)
{
	if (rcu_access_pointer(vcpu->kvm->kvmi.session))
		kvm_make_request(KVM_REQ_INTROSPECTION, vcpu);
}

bool kvmi_event_on(struct kvmi *kvmi, struct kvmi_vcpu *iv, unsigned int id)
{
	return test_bit(id, kvmi->event_allowed) &&
	       (test_bit(id, kvmi->vm_events) || test_bit(id, iv->events));
}

/* Takes over @job if it succeeds. */
int kvmi_add_job(struct kvmi *kvmi, struct kvm_vcpu *vcpu, struct kvmi_job *job)
{
	struct kvmi_vcpu *iv = kvmi_vcpu_state(kvmi, vcpu);
	bool waiting;
	int err = 0;

	if (!iv)
		return -ENOMEM;

	spin_lock(&iv->lock);
	waiting = READ_ONCE(iv->waiting);
	if (iv->njobs < KVMI_MAX_JOBS) {
		list_add_tail(&job->link, &iv->jobs);
		iv->njobs++;
	} else {
		err = -EBUSY;
	}
	spin_unlock(&iv->lock);

	if (err)
		return err;
	wake_up(&iv->wq);
	/* One that waits for its reply comes to the job by itself. */
	if (!waiting)
		kvmi_kick(vcpu, false);
	return 0;
}

static struct kvmi_job *kvmi_next_job(struct kvmi_vcpu *iv)
{
	struct kvmi_job *job;

	spin_lock(&iv->lock);
	job = list_first_entry_or_null(&iv->jobs, struct kvmi_job, link);
	if (job) {
		list_del(&job->link);
		iv->njobs--;
	}
	spin_unlock(&iv->lock);

	return job;
}

int kvmi_add_pause(struct kvmi *kvmi, struct kvm_vcpu *vcpu, bool wait)
{
	struct kvmi_vcpu *iv = kvmi_vcpu_state(kvmi, vcpu);
	int err = 0;

	if (!iv)
		return -ENOMEM;

	spin_lock(&iv->lock);
	if (iv->pauses < KVMI_MAX_PAUSES)
		iv->pauses++;
	else
		err = -EBUSY;
	spin_unlock(&iv->lock);

	if (!err) {
		wake_up(&iv->wq);
		kvmi_kick(vcpu, wait);
	}
	return err;
}

static bool kvmi_take_pause(struct kvmi_vcpu *iv)
{
	bool owed;

	spin_lock(&iv->lock);
	owed = iv->pauses;
	if (owed)
		iv->pauses--;
	spin_unlock(&iv->lock);

	return owed;
}

/* Runs one job; returns false if there was none. */
static bool kvmi_run_next_job(struct kvmi *kvmi, struct kvmi_vcpu *iv,
			      struct kvm_vcpu *vcpu)
{
	struct kvmi_job *job = kvmi_next_job(iv);

	if (!job)
		return false;
	if (kvmi_run_job(kvmi, iv, vcpu, job))
		kvmi_shutdown(kvmi);
	kfree(job);
	return true;
}

void kvmi_begin_wait(struct kvmi_vcpu *iv)
{
	spin_lock(&iv->lock);
	iv->waiting = true;
	spin_unlock(&iv->lock);
}

/* What is queued behind the reply is left to kvmi_handle_request(). */
void kvmi_end_wait(struct kvmi_vcpu *iv, struct kvm_vcpu *vcpu)
{
	spin_lock(&iv->lock);
	iv->waiting = false;
	if (!list_empty(&iv->jobs))
		kvm_make_request(KVM_REQ_INTROSPECTION, vcpu);
	spin_unlock(&iv->lock);
}

/* An introspector on another CPU may be faster than a sleep takes. */
static void kvmi_spin(struct kvmi *kvmi, struct kvmi_vcpu *iv)
{
	ktime_t now = ktime_get(), stop = ktime_add_ns(now, KVMI_SPIN_NS);

	while (!kvmi_has_job(iv) && !READ_ONCE(kvmi->ended) &&
	       !kvmi_can_read(kvmi) && single_task_running() &&
	       !need_resched() && ktime_before(now, stop)) {
		cpu_relax();
		now = ktime_get();
	}
}

/* Sleeps until there is a job, or the session is over; meanwhile, reads. */
static int kvmi_wait_for_job(struct kvmi *kvmi, struct kvmi_vcpu *iv)
{
	bool reads = !cmpxchg(&kvmi->reader, NULL, iv);
	int err = 0;

	while (!err && !kvmi_has_job(iv) && !READ_ONCE(kvmi->ended)) {
		kvmi_spin(kvmi, iv);
		err = wait_event_killable(iv->wq, kvmi_has_job(iv) ||
					  READ_ONCE(kvmi->ended) ||
					  (reads && kvmi_can_read(kvmi)));
		if (!err && reads && kvmi_can_read(kvmi))
			err = kvmi_read(kvmi, iv);
	}
	if (reads) {
		WRITE_ONCE(kvmi->reader, NULL);
		/* Pairs with that in kvmi_sock_wake(). */
		smp_mb();
		if (READ_ONCE(kvmi->readable))
			wake_up(&kvmi->wq);
	}
	return err;
}

/* Serves the vCPU's commands until its reply is there; 0: a valid one. */
int kvmi_wait_for_reply(struct kvmi *kvmi, struct kvmi_vcpu *iv,
			struct kvm_vcpu *vcpu)
{
	while (iv->waiting) {
		if (kvmi_wait_for_job(kvmi, iv))
			return -EINTR;
		if (READ_ONCE(kvmi->ended))
			return -ENOTCONN;
		kvmi_run_next_job(kvmi, iv, vcpu);
	}
	return iv->reply.error;
}

static void kvmi_plain_event(struct kvmi *kvmi, struct kvmi_vcpu *iv,
			     struct kvm_vcpu *vcpu, unsigned int id)
{
	static const struct kvmi_vcpu_reply expect = {
		.actions = BIT(KVMI_EVENT_ACTION_CONTINUE),
	};

	kvmi_event(kvmi, iv, vcpu, id, NULL, 0, &expect);
}

/* One step of what the session wants of this vCPU; false: nothing is left. */
static bool kvmi_serve(struct kvmi *kvmi, struct kvmi_vcpu *iv,
		       struct kvm_vcpu *vcpu)
{
	if (READ_ONCE(kvmi->ended))
		return false;

	if (vcpu->kvmi.stepped) {
		vcpu->kvmi.stepped = false;
		kvmi_end_step(kvmi, vcpu);
		if (kvmi_event_on(kvmi, iv, KVMI_EVENT_SINGLESTEP))
			kvmi_plain_event(kvmi, iv, vcpu, KVMI_EVENT_SINGLESTEP);
		return true;
	}

	if (kvmi_run_next_job(kvmi, iv, vcpu))
		return true;

	if (!iv->announced && kvmi_event_on(kvmi, iv, KVMI_EVENT_CREATE_VCPU)) {
		iv->announced = true;
		kvmi_plain_event(kvmi, iv, vcpu, KVMI_EVENT_CREATE_VCPU);
		return true;
	}

	if (iv->inject && kvmi_can_inject(vcpu)) {
		kvmi_inject(kvmi, iv, vcpu);
		return true;
	}

	/* The last in turn. */
	if (kvmi_take_pause(iv)) {
		kvmi_plain_event(kvmi, iv, vcpu, KVMI_EVENT_PAUSE_VCPU);
		return true;
	}
	return false;
}

/* Waits for another vCPU's step; true: there is something to do meanwhile. */
static bool kvmi_stand(struct kvmi *kvmi, struct kvmi_vcpu *iv,
		       struct kvm_vcpu *vcpu)
{
	if (!kvmi_held(kvmi, vcpu))
		return false;

	/* The other one may be reset, which nobody tells. */
	wait_event_interruptible_timeout(iv->wq,
					 !list_empty_careful(&iv->jobs) ||
					 READ_ONCE(iv->pauses) ||
					 !kvmi_held(kvmi, vcpu), HZ / 10);
	return true;
}

/*
 * KVM_REQ_INTROSPECTION: called by the vCPU's thread between two entries into
 * the guest, or between two sleeps of a halted one, in the read side of
 * kvm->srcu.
 */
void kvmi_handle_request(struct kvm_vcpu *vcpu)
{
	struct kvmi *kvmi = kvmi_get(vcpu->kvm);
	struct kvmi_vcpu *iv = NULL;

	kvm_check_request(KVM_REQ_INTROSPECTION, vcpu);
	vcpu->kvmi.again = false;
	kvmi_arch_finish_regs(vcpu);

	if (kvmi) {
		iv = kvmi_vcpu_state(kvmi, vcpu);
		if (!iv)
			kvmi_shutdown(kvmi);
	}
	if (iv) {
		if (!iv->begun) {
			vcpu->kvmi.stepped = false;
			vcpu->kvmi.step_owed = false;
			iv->begun = true;
		}
		/* A peer that does not read must not hold up memory slots. */
		kvm_vcpu_srcu_read_unlock(vcpu);
		while (kvmi_serve(kvmi, iv, vcpu) ||
		       kvmi_stand(kvmi, iv, vcpu)) {
			if (!signal_pending(current))
				continue;
			/* The VMM wants its thread: the rest comes later. */
			kvm_make_request(KVM_REQ_INTROSPECTION, vcpu);
			break;
		}
		kvm_vcpu_srcu_read_lock(vcpu);
		kvmi_arch_finish_regs(vcpu);

		/* kvmi_end() makes the request once more, after this. */
		if (READ_ONCE(kvmi->ended))
			iv = NULL;
	}
	kvmi_arch_intercept(kvmi, iv, vcpu);
	if (kvmi)
		kvmi_put(kvmi);
}
