/* Between QEMU and KVM, inside an unmodified QEMU: when a transition deletes and adds memslots again,
 * this decides in which order KVM is given the operations, and keeps vCPUs out meanwhile.
 *
 * Four imports of QEMU's main binary are redirected in its GOT: ioctl, pthread_mutex_unlock,
 * pthread_cond_wait and pthread_cond_timedwait.  Nothing else is touched.  There is no thread and no
 * socket; the agent writes the wanted mode into the channel (interposer.h).
 *
 *   observe   everything goes to KVM as QEMU asks for it, and is stamped
 *   pause     vCPUs are kept out of KVM_RUN from the first delete to the end of the transaction
 *   inhibit   operations wait from the first delete; at the end they are issued in QEMU's order, with
 *             vCPUs kept out if an add overlaps what a delete takes away (as QEMU does from 8.0 on)
 *   hole      operations wait likewise; then only the difference of the two maps is issued.  A slot
 *             that was split stays split: a hole is one delete, to fill it is one add, and the RAM
 *             around it is there all the time.  vCPUs are kept out while a slot is split, and with
 *             `strict` whenever `inhibit` would do so
 *
 * The end of a transaction is the moment when its thread lets go of the BQL.
 *
 * Rules
 *  1. It fails open.  Whatever it does not expect, KVM has QEMU's own slots and QEMU's operations go
 *     to KVM as if this were not here; the reason is in the channel, the mode is observe.
 *  2. Nobody waits for long: PARK_NS for vCPUs to leave KVM_RUN, RUN_NS before KVM_RUN.
 *  3. No lock is taken, and nothing is allocated, on the way into KVM_RUN.
 *  4. A bit of a dirty log is never lost: what KVM would forget with a slot is given to QEMU's own
 *     bitmap, while no vCPU runs.
 *  5. QEMU is told 0 for an operation that waits.  When KVM then refuses what QEMU asked for, the end
 *     is that of QEMU's own kvm_set_phys_mem: a message and abort().  No other path ends QEMU.
 *
 * Sources: QEMU accel/kvm/kvm-all.c (kvm_set_phys_mem, kvm_cpu_exec), softmmu/cpus.c
 * (qemu_mutex_unlock_iothread: the flag is cleared before the mutex), v7.2.22; Linux
 * Documentation/virt/kvm/api.rst, 4.35 (slots), 4.8 and 4.117 (dirty logs).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <link.h>
#include <linux/futex.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "interposer.h"

#define PARK_NS 500000000ull  /* for all vCPUs to leave KVM_RUN */
#define RUN_NS 2000000000ull  /* a vCPU is kept out of KVM_RUN */
#define CLOSE_NS 50000000ull  /* detach waits for the end of a transaction */
#define MAX_SLOTS 4096
#define MAX_OPS 1024
#define PAGE 4096ull
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define PUBLIC __attribute__((visibility("default")))
#define REGION2 0x40a0ae49u          /* KVM_SET_USER_MEMORY_REGION2, Linux 6.8 */
#define RESET_DIRTY_RINGS 0xaec7u    /* KVM_RESET_DIRTY_RINGS, Linux 5.11 */

typedef struct kvm_userspace_memory_region Region;

/* A slot, or a part of one.  Unused: memory_size 0.  `owner` (of a piece): index of its slot. */
struct slot {
    Region r;
    int owner;
};
struct table {
    struct slot at[MAX_SLOTS];
    int used; /* entries from here on are unused */
};

static struct channel *chan;
static struct table slots;  /* what QEMU believes */
static struct table pieces; /* what KVM has of them */
static Region queue[MAX_OPS];
static int queued;
static int vm_fd = -1;
static _Bool rings;      /* dirty rings are in use: they carry ids of slots */
static _Bool blind;      /* the tables do not hold everything: hands off until attached anew */
static _Bool is_parked;  /* by the open transaction */
static uint64_t opened_ns, park_ns;
static uint32_t park_stopped;
static _Atomic int open_tid; /* the thread that has a transaction open */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* over all of the above */
static __thread struct vcpu *me;
static __thread _Bool mine; /* the open transaction is this thread's */

static _Bool (*bql_locked)(void);
/* What memory_region_from_host and memory_region_set_dirty are in every QEMU since 2.0. */
static void *(*region_of)(void *host, uint64_t *offset);
static void (*set_dirty)(void *region, uint64_t offset, uint64_t size);
static int (*next_unlock)(pthread_mutex_t *);
static int (*next_wait)(pthread_cond_t *, pthread_mutex_t *);
static int (*next_timedwait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static uint32_t tid(void) {
    static __thread uint32_t id;
    return id ? id : (id = syscall(SYS_gettid));
}

static inline int raw_ioctl(int fd, unsigned long request, void *arg) {
    long r;
    __asm__ volatile("syscall"
                     : "=a"(r)
                     : "0"(SYS_ioctl), "D"((long)fd), "S"(request), "d"(arg)
                     : "rcx", "r11", "memory");
    if (unlikely(r < 0)) {
        errno = -r;
        return -1;
    }
    return r;
}

static void futex(_Atomic uint32_t *word, int op, uint32_t value, long ns) {
    struct timespec t = {0, ns};
    syscall(SYS_futex, word, op, value, ns ? &t : NULL, NULL, 0);
}

static void note(uint32_t kind, const Region *r, uint64_t begin_ns, int rc, uint32_t extra) {
    static const Region none;
    uint64_t number = atomic_fetch_add(&chan->head, 1);
    struct event *e = &chan->ring[number % RING];

    if (!r)
        r = &none;
    atomic_store_explicit(&e->seq, 0, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
    e->begin_ns = begin_ns;
    e->end_ns = now();
    e->gpa = r->guest_phys_addr;
    e->size = r->memory_size;
    e->hva = r->userspace_addr;
    e->tid = tid();
    e->kind = kind;
    e->slot = r->slot;
    e->flags = r->flags;
    e->rc = rc;
    e->extra = extra;
    atomic_store_explicit(&e->seq, number + 1, memory_order_release);
}

static void set_mode(uint32_t mode, uint32_t why) {
    uint64_t t = now();
    atomic_store(&chan->mode, mode);
    atomic_store(&chan->refusal, why);
    note(EV_MODE, NULL, t, mode, why);
}

/* -- vCPUs ----------------------------------------------------------------------------------------- */

static void stop_vcpu(const struct vcpu *v) { /* as kvm_cpu_kick: SIG_IPI, which nothing swallows */
    syscall(SYS_tgkill, getpid(), v->tid, SIGUSR1);
}

static void let_run(void) {
    atomic_store(&chan->parked, 0);
    futex(&chan->parked, FUTEX_WAKE, INT_MAX, 0);
}

/* Keep all vCPUs but this thread's out of KVM_RUN; false when one does not leave it. */
static _Bool park(void) {
    uint32_t n = atomic_load(&chan->vcpus);

    if (is_parked)
        return 1;
    if (!atomic_load(&chan->armed))
        return 0; /* a vCPU may be in a KVM_RUN that we did not see */
    park_ns = now();
    park_stopped = 0;
    atomic_store(&chan->parked, 1);
    for (uint32_t i = 0; i < n; i++)
        if (&chan->vcpu[i] != me && atomic_load(&chan->vcpu[i].inside)) {
            stop_vcpu(&chan->vcpu[i]);
            park_stopped++;
        }
    for (uint32_t i = 0; i < n; i++) {
        struct vcpu *v = &chan->vcpu[i];
        while (v != me && atomic_load(&v->inside)) {
            futex(&v->inside, FUTEX_WAIT, 1, 1000000);
            if (!atomic_load(&v->inside))
                break;
            if (now() - park_ns > PARK_NS) {
                let_run();
                chan->gave_up++;
                note(EV_PARK, NULL, park_ns, -ETIMEDOUT, park_stopped);
                return 0;
            }
            stop_vcpu(v);
        }
    }
    is_parked = 1;
    return 1;
}

static void unpark(void) {
    if (!is_parked)
        return;
    is_parked = 0;
    let_run();
    uint64_t took = now() - park_ns;
    chan->parks++;
    chan->park_ns += took;
    if (took > chan->park_max_ns)
        chan->park_max_ns = took;
    note(EV_PARK, NULL, park_ns, 0, park_stopped);
}

/* A vCPU's first KVM_RUN.  A plugged vCPU may come with the descriptor of one that was unplugged. */
static struct vcpu *enrol(int fd) {
    uint32_t n = 0;

    pthread_mutex_lock(&lock);
    uint32_t known = atomic_load(&chan->vcpus);
    while (n < known && (chan->vcpu[n].fd != (uint32_t)fd || atomic_load(&chan->vcpu[n].inside)))
        n++;
    if (n == MAX_VCPUS) {
        atomic_store(&chan->armed, 0); /* vCPUs are never kept out again */
    } else {
        chan->vcpu[n].fd = fd;
        chan->vcpu[n].tid = tid();
        me = &chan->vcpu[n];
        if (n == known)
            atomic_store(&chan->vcpus, n + 1);
    }
    pthread_mutex_unlock(&lock);
    return me;
}

/* -- KVM's slots -------------------------------------------------------------------------------------- */

static uint64_t end_of(const Region *r) { return r->guest_phys_addr + r->memory_size; }

static _Bool overlaps(const Region *a, const Region *b) {
    return a->slot >> 16 == b->slot >> 16 && a->guest_phys_addr < end_of(b) &&
           b->guest_phys_addr < end_of(a);
}

static struct slot *find(struct table *t, uint32_t id) {
    for (int i = 0; i < t->used; i++)
        if (t->at[i].r.memory_size && t->at[i].r.slot == id)
            return &t->at[i];
    return NULL;
}

static struct slot *put(struct table *t, const Region *r, int owner) {
    int i = 0;
    while (i < t->used && t->at[i].r.memory_size)
        i++;
    if (i == MAX_SLOTS)
        return NULL;
    if (i == t->used)
        t->used++;
    t->at[i] = (struct slot){*r, owner};
    return &t->at[i];
}

static int room(const struct table *t) {
    int n = MAX_SLOTS - t->used;
    for (int i = 0; i < t->used; i++)
        n += !t->at[i].r.memory_size;
    return n;
}

static int index_of(const struct slot *v) { return v - slots.at; }

static _Bool is_piece_of(const struct slot *k, const struct slot *v) {
    return k->r.memory_size && k->owner == index_of(v);
}

/* KVM has this slot as QEMU believes. */
static _Bool is_whole(const struct slot *v) {
    struct slot *k = find(&pieces, v->r.slot);
    return k && is_piece_of(k, v) && k->r.memory_size == v->r.memory_size;
}

static int give(Region *r, uint64_t gone) { /* to KVM; `gone`: bytes that a delete takes away */
    uint64_t t = now(), n = gone / PAGE;
    int rc = raw_ioctl(vm_fd, KVM_SET_USER_MEMORY_REGION, r), e = errno;
    note(EV_KVM, r, t, rc ? -e : 0, n > UINT_MAX ? 0 : n);
    errno = e;
    return rc;
}

/* QEMU takes ids from 0 up; pieces take them from the top down when QEMU's own is in use. */
static uint32_t free_id(uint32_t wanted) {
    static int top;

    if (!find(&pieces, wanted))
        return wanted;
    if (!top) {
        top = raw_ioctl(vm_fd, KVM_CHECK_EXTENSION, (void *)KVM_CAP_NR_MEMSLOTS);
        top = top < 32 ? 32 : top > 32764 ? 32764 : top;
    }
    for (int id = top - 1; id >= 0; id--)
        if (!find(&pieces, (wanted & 0xffff0000u) | id))
            return (wanted & 0xffff0000u) | id;
    return wanted; /* KVM refuses it */
}

/* -- dirty logs -------------------------------------------------------------------------------------- */

static _Bool is_logged(const Region *r) { return r->flags & KVM_MEM_LOG_DIRTY_PAGES; }
static uint64_t pages_of(const Region *r) { return r->memory_size / PAGE; }
static size_t bytes_of(uint64_t pages) { return (pages + 63) / 64 * 8; }
static _Bool bit(const uint64_t *map, uint64_t i) { return map[i / 64] >> (i % 64) & 1; }
static void set_bit(uint64_t *map, uint64_t i) { map[i / 64] |= 1ull << (i % 64); }

/* Not malloc: this thread may hold its lock (rule 3). */
static uint64_t *new_map(uint64_t pages) {
    void *p = mmap(NULL, bytes_of(pages), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p != MAP_FAILED)
        return p;
    atomic_store(&chan->refusal, NO_MEMORY);
    errno = ENOMEM;
    return NULL;
}
static void drop_map(uint64_t *map, uint64_t pages) {
    int e = errno;
    munmap(map, bytes_of(pages));
    errno = e;
}

/* KVM forgets a slot's dirty bits with the slot, and QEMU asked for them some time before it deleted
 * it.  The rest goes to QEMU's own bitmap.  Complete only while no vCPU runs. */
static void save_dirty(const struct slot *k) {
    uint64_t pages = pages_of(&k->r), t = now(), offset = 0, n = 0;
    uint64_t *map;

    if (!is_logged(&k->r) || !set_dirty || atomic_load(&chan->mode) == OBSERVE ||
        !(map = new_map(pages)))
        return;
    struct kvm_dirty_log log = {.slot = k->r.slot, .dirty_bitmap = map};
    void *region = region_of((void *)(uintptr_t)k->r.userspace_addr, &offset);
    if (region && raw_ioctl(vm_fd, KVM_GET_DIRTY_LOG, &log) == 0)
        for (uint64_t i = 0, j; i < pages; i = j) {
            for (j = i + 1; j < pages && bit(map, j) == bit(map, i); j++)
                ;
            if (bit(map, i)) {
                set_dirty(region, offset + i * PAGE, (j - i) * PAGE);
                n += j - i;
            }
        }
    drop_map(map, pages);
    chan->saved += n;
    note(EV_SAVED, &k->r, t, 0, n > UINT_MAX ? UINT_MAX : n);
}

static int get_dirty_log(int fd, struct kvm_dirty_log *log, const struct slot *v) {
    uint64_t *out = log->dirty_bitmap;
    int rc = 0;

    memset(out, 0, bytes_of(pages_of(&v->r)));
    for (int i = 0; i < pieces.used && !rc; i++) {
        const struct slot *k = &pieces.at[i];
        if (!is_piece_of(k, v))
            continue;
        uint64_t pages = pages_of(&k->r), *map = new_map(pages);
        uint64_t first = (k->r.guest_phys_addr - v->r.guest_phys_addr) / PAGE;
        if (!map)
            return -1;
        struct kvm_dirty_log part = {.slot = k->r.slot, .dirty_bitmap = map};
        rc = raw_ioctl(fd, KVM_GET_DIRTY_LOG, &part);
        for (uint64_t j = 0; j < pages && !rc; j++)
            if (bit(map, j))
                set_bit(out, first + j);
        drop_map(map, pages);
    }
    return rc;
}

static int clear_dirty_log(int fd, const struct kvm_clear_dirty_log *log, const struct slot *v) {
    int rc = 0;

    for (int i = 0; i < pieces.used && !rc; i++) {
        const struct slot *k = &pieces.at[i];
        if (!is_piece_of(k, v))
            continue;
        uint64_t pages = pages_of(&k->r), first = (k->r.guest_phys_addr - v->r.guest_phys_addr) / PAGE;
        uint64_t from = log->first_page > first ? log->first_page : first;
        uint64_t to = log->first_page + log->num_pages;
        if (to > first + pages)
            to = first + pages;
        if (from >= to)
            continue;
        /* KVM wants a first page that 64 divides; a bit that is not set clears nothing */
        uint64_t begin = (from - first) & ~63ull, end = (to - first + 63) & ~63ull;
        if (end > pages)
            end = pages;
        uint64_t *map = new_map(end - begin);
        if (!map)
            return -1;
        for (uint64_t p = from; p < to; p++)
            if (bit(log->dirty_bitmap, p - log->first_page))
                set_bit(map, p - first - begin);
        struct kvm_clear_dirty_log part = {
            .slot = k->r.slot, .first_page = begin, .num_pages = end - begin, .dirty_bitmap = map};
        rc = raw_ioctl(fd, KVM_CLEAR_DIRTY_LOG, &part);
        drop_map(map, end - begin);
    }
    return rc;
}

/* -- carrying out ---------------------------------------------------------------------------------- */

static int delete_piece(struct slot *k) {
    Region r = k->r;

    save_dirty(k);
    r.memory_size = 0;
    r.flags = 0;
    int rc = give(&r, k->r.memory_size);
    if (!rc)
        k->r.memory_size = 0;
    return rc;
}

static int add_piece(const Region *part, const struct slot *v) {
    Region r = *part;

    r.slot = free_id(v->r.slot);
    int rc = give(&r, 0);
    if (!rc && !put(&pieces, &r, index_of(v)))
        blind = 1;
    return rc;
}

/* One operation as QEMU asked for it, on however many pieces its slot has. */
static int carry_out(const Region *op) {
    struct slot *v = find(&slots, op->slot);
    Region r = *op;
    int rc = 0;

    if (!op->memory_size) {
        if (!v)
            return give(&r, 0); /* it was there before us */
        for (int i = 0; i < pieces.used && !rc; i++)
            if (is_piece_of(&pieces.at[i], v))
                rc = delete_piece(&pieces.at[i]);
        if (!rc)
            v->r.memory_size = 0;
        return rc;
    }
    if (!v) {
        v = put(&slots, op, 0);
        if (!v) {
            blind = 1;
            return give(&r, 0);
        }
        rc = add_piece(op, v);
        if (rc)
            v->r.memory_size = 0;
        return rc;
    }
    for (int i = 0; i < pieces.used && !rc; i++)
        if (is_piece_of(&pieces.at[i], v)) {
            r = pieces.at[i].r;
            r.flags = op->flags;
            rc = give(&r, 0);
            if (!rc)
                pieces.at[i].r = r;
        }
    if (!rc)
        v->r.flags = op->flags;
    return rc;
}

static void refused(const Region *r) { /* rule 5 */
    fprintf(stderr,
            "qmp-memlistener: KVM refused slot %u, start 0x%llx, size 0x%llx: %s; QEMU was told that "
            "it was done, and ends as it does when it is refused a slot\n",
            r->slot, r->guest_phys_addr, r->memory_size, strerror(errno));
    abort();
}

/* KVM's slots become QEMU's again, while no vCPU runs.  False when one does: then the pieces stay,
 * which together are QEMU's slots as well. */
static _Bool restore(void) {
    static _Bool bad[MAX_SLOTS];
    _Bool any = 0, held = is_parked;

    for (int i = 0; i < slots.used; i++)
        any |= bad[i] = slots.at[i].r.memory_size && !is_whole(&slots.at[i]);
    if (!any)
        return 1;
    if (!park())
        return 0;
    for (int i = 0; i < pieces.used; i++)
        if (pieces.at[i].r.memory_size && bad[pieces.at[i].owner])
            delete_piece(&pieces.at[i]);
    for (int i = 0; i < slots.used; i++)
        if (bad[i] && add_piece(&slots.at[i].r, &slots.at[i]))
            refused(&slots.at[i].r);
    if (!held)
        unpark();
    return 1;
}

/* Rule 1.  The agent may want another mode again, when it has read why. */
static void give_up(uint32_t why) {
    restore();
    atomic_store(&chan->want, OBSERVE);
    set_mode(OBSERVE, why);
}

/* An add overlaps what a delete took away (need_inhibit of kvm_region_commit, QEMU 8.0), or a
 * delete takes a dirty log with it. */
static _Bool needs_park(void) {
    for (int i = 0; i < queued; i++) {
        if (queue[i].memory_size)
            continue;
        struct slot *v = find(&slots, queue[i].slot);
        if (v && is_logged(&v->r))
            return 1;
        for (int j = i + 1; j < queued; j++)
            if (queue[j].memory_size && (!v || overlaps(&v->r, &queue[j])))
                return 1;
    }
    return 0;
}

static void issue_queue(void) { /* in QEMU's order */
    for (int i = 0; i < queued; i++)
        if (carry_out(&queue[i]))
            refused(&queue[i]);
}

static void inhibit(void) {
    _Bool stopped = !needs_park() || park();
    issue_queue();
    if (!stopped)
        give_up(NOT_STOPPED);
}

/* -- hole ------------------------------------------------------------------------------------------ */

struct plan { /* from the slots of before to those after, all of QEMU's; one at a time */
    _Bool dead[MAX_SLOTS];   /* of the slots before */
    Region fresh[MAX_OPS];   /* the slots that are new */
    int nfresh;
    Region part[MAX_OPS];    /* what is left of a piece that is cut */
    int part_of[MAX_OPS], nparts;
    int keeps[MAX_SLOTS];    /* of a piece: which new slot it belongs to; GONE, or OTHER */
    _Bool cuts;
};
enum { OTHER = -2, GONE = -1 };
static struct plan plan;

/* Read the queue.  False when it is not understood: operations on slots that were there before us. */
static _Bool plan_slots(void) {
    memset(plan.dead, 0, sizeof plan.dead);
    plan.nfresh = 0;
    for (int i = 0; i < queued; i++) {
        const Region *op = &queue[i];
        struct slot *v = find(&slots, op->slot);
        int f = plan.nfresh - 1;
        while (f >= 0 && plan.fresh[f].slot != op->slot)
            f--;
        if (v && plan.dead[index_of(v)])
            v = NULL;
        if (op->memory_size && !v && f < 0)
            plan.fresh[plan.nfresh++] = *op;
        else if (op->memory_size && f >= 0)
            plan.fresh[f].flags = op->flags;
        else if (!op->memory_size && f >= 0)
            plan.fresh[f] = plan.fresh[--plan.nfresh];
        else if (!op->memory_size && v)
            plan.dead[index_of(v)] = 1;
        else
            return 0;
    }
    return 1;
}

/* The same memory at the same place, as the same kind. */
static _Bool continues(const Region *k, const Region *r) {
    return overlaps(k, r) && !((k->flags ^ r->flags) & KVM_MEM_READONLY) &&
           k->userspace_addr - k->guest_phys_addr == r->userspace_addr - r->guest_phys_addr;
}

static Region common(const Region *k, const Region *r) {
    Region c = *k;
    uint64_t end = end_of(k) < end_of(r) ? end_of(k) : end_of(r);
    if (r->guest_phys_addr > c.guest_phys_addr) {
        c.userspace_addr += r->guest_phys_addr - c.guest_phys_addr;
        c.guest_phys_addr = r->guest_phys_addr;
    }
    c.memory_size = end - c.guest_phys_addr;
    c.flags = r->flags;
    return c;
}

/* What becomes of the pieces of slots that go. */
static _Bool plan_pieces(void) {
    plan.nparts = 0;
    plan.cuts = 0;
    for (int i = 0; i < pieces.used; i++) {
        const Region *k = &pieces.at[i].r;
        plan.keeps[i] = OTHER;
        if (!k->memory_size || !plan.dead[pieces.at[i].owner])
            continue;
        plan.keeps[i] = GONE;
        for (int f = 0; f < plan.nfresh && plan.keeps[i] == GONE; f++) {
            if (!continues(k, &plan.fresh[f]))
                continue;
            Region c = common(k, &plan.fresh[f]);
            if (c.memory_size == k->memory_size) {
                plan.keeps[i] = f;
            } else if (plan.nparts < MAX_OPS) {
                plan.part_of[plan.nparts] = f;
                plan.part[plan.nparts++] = c;
                plan.cuts = 1;
            } else {
                return 0;
            }
        }
        plan.cuts |= plan.keeps[i] == GONE && is_logged(k);
    }
    /* every new slot may need a piece before, between and behind the old ones */
    return plan.nfresh <= room(&slots) && pieces.used + plan.nparts + 2 * plan.nfresh < MAX_SLOTS;
}

/* The parts of a slot for which KVM has no piece yet. */
static int add_rest(const struct slot *v) {
    int rc = 0;

    for (uint64_t at = v->r.guest_phys_addr; at < end_of(&v->r) && !rc;) {
        uint64_t end = end_of(&v->r);
        _Bool covered = 0;
        for (int i = 0; i < pieces.used && !covered; i++) {
            const Region *k = &pieces.at[i].r;
            if (!is_piece_of(&pieces.at[i], v))
                continue;
            covered = k->guest_phys_addr <= at && at < end_of(k);
            if (covered)
                at = end_of(k);
            else if (k->guest_phys_addr > at && k->guest_phys_addr < end)
                end = k->guest_phys_addr;
        }
        if (covered)
            continue;
        Region r = v->r;
        r.guest_phys_addr = at;
        r.userspace_addr += at - v->r.guest_phys_addr;
        r.memory_size = end - at;
        rc = add_piece(&r, v);
        at = end;
    }
    return rc;
}

static int issue_plan(void) {
    static int now_at[MAX_OPS];
    int rc = 0;

    for (int i = 0; i < slots.used; i++)
        if (plan.dead[i])
            slots.at[i].r.memory_size = 0;
    for (int f = 0; f < plan.nfresh; f++)
        now_at[f] = index_of(put(&slots, &plan.fresh[f], 0));
    for (int i = 0, n = pieces.used; i < n && !rc; i++) {
        struct slot *k = &pieces.at[i];
        int f = plan.keeps[i];
        if (f == GONE) {
            rc = delete_piece(k);
        } else if (f >= 0) {
            k->owner = now_at[f];
            chan->kept++;
            if (k->r.flags != plan.fresh[f].flags) {
                k->r.flags = plan.fresh[f].flags;
                rc = give(&k->r, 0);
            }
        }
    }
    for (int i = 0; i < plan.nparts && !rc; i++)
        rc = add_piece(&plan.part[i], &slots.at[now_at[plan.part_of[i]]]);
    for (int f = 0; f < plan.nfresh && !rc; f++)
        rc = add_rest(&slots.at[now_at[f]]);
    return rc;
}

static void hole(void) {
    if (!plan_slots()) {
        inhibit(); /* and now they are known */
        return;
    }
    if (!plan_pieces()) {
        inhibit();
        give_up(TOO_MANY);
        return;
    }
    if ((plan.cuts || (chan->strict && needs_park())) && !park()) {
        issue_queue();
        give_up(NOT_STOPPED);
        return;
    }
    chan->splits += plan.cuts;
    if (issue_plan())
        give_up(KVM_REFUSED);
}

/* -- transactions ------------------------------------------------------------------------------------ */

static void count_slots(void) {
    chan->slots = MAX_SLOTS - room(&slots);
    chan->pieces = MAX_SLOTS - room(&pieces);
}

static void end_transaction(void) {
    int e = errno;

    mine = 0; /* at once: QEMU's functions that are called here unlock, too */
    pthread_mutex_lock(&lock);
    uint32_t mode = atomic_load(&chan->mode);
    if (mode == HOLE)
        hole();
    else
        inhibit();
    unpark();
    chan->transactions++;
    note(EV_TRANSACTION, NULL, opened_ns, queued, mode);
    queued = 0;
    if (blind && mode != OBSERVE)
        give_up(TOO_MANY);
    count_slots();
    atomic_store(&open_tid, 0);
    pthread_mutex_unlock(&lock);
    errno = e;
}

/* The mode that the agent wants, between two transactions.  `lock` is held. */
static void take_mode(void) {
    uint32_t want = atomic_load(&chan->want), mode = atomic_load(&chan->mode);

    if (want == mode || atomic_load(&open_tid))
        return;
    if (want == OFF || want > HOLE || (want > OBSERVE && (blind || !atomic_load(&chan->armed))))
        give_up(blind ? TOO_MANY : NOT_STOPPED);
    else if (want == HOLE && rings)
        give_up(DIRTY_RINGS);
    else if (mode == HOLE && !restore())
        give_up(NOT_STOPPED);
    else
        set_mode(want, NONE);
    count_slots();
}

static _Bool may_wait(const Region *op) {
    const struct slot *v = find(&slots, op->slot);
    return set_dirty || !v || !is_logged(&v->r);
}

static int set_region(int fd, Region *op) {
    uint64_t t = now();
    int rc = 0;

    if (mine && queued == MAX_OPS)
        end_transaction();
    pthread_mutex_lock(&lock);
    if (vm_fd < 0)
        vm_fd = fd;
    if (fd != vm_fd) { /* another VM of this process: none of ours */
        pthread_mutex_unlock(&lock);
        return raw_ioctl(fd, KVM_SET_USER_MEMORY_REGION, op);
    }
    take_mode();
    uint32_t mode = atomic_load(&chan->mode);
    if (mode != OFF && !atomic_load(&open_tid) && !op->memory_size) {
        if (mode > OBSERVE && !may_wait(op)) {
            give_up(NO_SAVE);
        } else if (mode == PAUSE && !park()) {
            give_up(NOT_STOPPED);
        } else {
            mine = 1;
            opened_ns = t;
            atomic_store(&open_tid, tid());
        }
    }
    if (mine && mode >= INHIBIT)
        queue[queued++] = *op;
    else
        rc = blind ? give(op, 0) : carry_out(op);
    int e = errno;
    if (blind && mode != OBSERVE)
        give_up(TOO_MANY);
    note(EV_QEMU, op, t, rc ? -e : 0, mine);
    count_slots();
    pthread_mutex_unlock(&lock);
    errno = e;
    return rc;
}

static int region2(int fd, Region *op) { /* begins as the former; stamped only */
    uint64_t t = now();

    if (mine)
        end_transaction();
    pthread_mutex_lock(&lock);
    blind = 1;
    if (atomic_load(&chan->mode) > OBSERVE)
        give_up(REGION2_USED);
    int rc = raw_ioctl(fd, REGION2, op), e = errno;
    note(EV_QEMU, op, t, rc < 0 ? -e : 0, 0);
    pthread_mutex_unlock(&lock);
    errno = e;
    return rc;
}

static int dirty_log(int fd, unsigned long request, void *arg) {
    uint32_t id = *(uint32_t *)arg; /* the first field of both */
    int rc;

    for (int i = 0; mine && i < queued; i++)
        if (queue[i].slot == id) { /* of a slot that waits to be added or deleted */
            end_transaction();
            break;
        }
    pthread_mutex_lock(&lock);
    struct slot *v = fd == vm_fd ? find(&slots, id) : NULL;
    if (!v || is_whole(v)) {
        rc = raw_ioctl(fd, request, arg);
    } else {
        chan->translated++;
        rc = (uint32_t)request == KVM_GET_DIRTY_LOG ? get_dirty_log(fd, arg, v)
                                                    : clear_dirty_log(fd, arg, v);
    }
    int e = errno;
    pthread_mutex_unlock(&lock);
    errno = e;
    return rc;
}

/* -- the four imports ---------------------------------------------------------------------------------- */

static int run(int fd, void *arg) {
    if (unlikely(!me) && !enrol(fd))
        return raw_ioctl(fd, KVM_RUN, arg);
    if (unlikely(mine))
        end_transaction();
    if (unlikely(atomic_load_explicit(&chan->want, memory_order_relaxed) !=
                 atomic_load_explicit(&chan->mode, memory_order_relaxed)) &&
        pthread_mutex_trylock(&lock) == 0) {
        take_mode();
        pthread_mutex_unlock(&lock);
    }
    struct vcpu *v = me;
    v->epoch = chan->epoch;
    for (uint64_t since = 0;;) {
        atomic_store(&v->inside, 1);
        if (likely(!atomic_load(&chan->parked)))
            break;
        atomic_store(&v->inside, 0);
        futex(&v->inside, FUTEX_WAKE, 1, 0);
        if (!since)
            since = now();
        while (atomic_load(&chan->parked) && now() - since < RUN_NS)
            futex(&chan->parked, FUTEX_WAIT, 1, 5000000);
        if (now() - since >= RUN_NS) { /* rule 2 */
            atomic_store(&v->inside, 1);
            break;
        }
    }
    v->runs++;
    int r = raw_ioctl(fd, KVM_RUN, arg), e = errno;
    atomic_store(&v->inside, 0);
    if (unlikely(atomic_load(&chan->parked)))
        futex(&v->inside, FUTEX_WAKE, 1, 0);
    errno = e;
    return r;
}

static int our_ioctl(int fd, unsigned long request, void *arg) {
    switch ((uint32_t)request) {
    case KVM_RUN:
        return run(fd, arg);
    case KVM_SET_USER_MEMORY_REGION:
        return set_region(fd, arg);
    case KVM_GET_DIRTY_LOG:
    case KVM_CLEAR_DIRTY_LOG:
        return dirty_log(fd, request, arg);
    case REGION2:
        return region2(fd, arg);
    case RESET_DIRTY_RINGS:
        rings = 1;
        if (atomic_load(&chan->mode) == HOLE)
            atomic_store(&chan->want, INHIBIT);
    }
    return raw_ioctl(fd, request, arg);
}

static int our_unlock(pthread_mutex_t *m) {
    if (unlikely(mine) && !bql_locked())
        end_transaction();
    return next_unlock(m);
}

static int our_wait(pthread_cond_t *c, pthread_mutex_t *m) {
    if (unlikely(mine))
        end_transaction();
    return next_wait(c, m);
}

static int our_timedwait(pthread_cond_t *c, pthread_mutex_t *m, const struct timespec *t) {
    if (unlikely(mine))
        end_transaction();
    return next_timedwait(c, m, t);
}

/* -- into QEMU and out again ----------------------------------------------------------------------------- */

static struct {
    const char *name;
    void *ours, **at, *was;
} imports[] = {
    {"ioctl", our_ioctl, NULL, NULL},
    {"pthread_mutex_unlock", our_unlock, NULL, NULL},
    {"pthread_cond_wait", our_wait, NULL, NULL},
    {"pthread_cond_timedwait", our_timedwait, NULL, NULL},
};
#define IMPORTS (int)(sizeof imports / sizeof *imports)
static uintptr_t relro, relro_end;

static void find_imports(uintptr_t base, const ElfW(Rela) *rela, size_t n, const ElfW(Sym) *symbols,
                         const char *names) {
    for (size_t i = 0; i < n; i++) {
        uint32_t type = ELF64_R_TYPE(rela[i].r_info);
        const char *name = names + symbols[ELF64_R_SYM(rela[i].r_info)].st_name;
        if (type != R_X86_64_JUMP_SLOT && type != R_X86_64_GLOB_DAT)
            continue;
        for (int h = 0; h < IMPORTS; h++)
            if (!imports[h].at && !strcmp(name, imports[h].name))
                imports[h].at = (void **)(base + rela[i].r_offset);
    }
}

static int main_binary(struct dl_phdr_info *info, size_t size, void *data) {
    const ElfW(Dyn) *d = NULL;
    const ElfW(Sym) *symbols = NULL;
    const ElfW(Rela) *plt = NULL, *rela = NULL;
    const char *names = NULL;
    size_t nplt = 0, nrela = 0;

    (void)size, (void)data;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *p = &info->dlpi_phdr[i];
        uintptr_t at = info->dlpi_addr + p->p_vaddr;
        if (p->p_type == PT_DYNAMIC)
            d = (void *)at;
        if (p->p_type == PT_GNU_RELRO) {
            relro = at & ~(PAGE - 1);
            relro_end = (at + p->p_memsz) & ~(PAGE - 1);
        }
    }
    for (; d && d->d_tag; d++)
        switch (d->d_tag) { /* the dynamic linker has relocated these */
        case DT_SYMTAB: symbols = (void *)d->d_un.d_ptr; break;
        case DT_STRTAB: names = (void *)d->d_un.d_ptr; break;
        case DT_JMPREL: plt = (void *)d->d_un.d_ptr; break;
        case DT_PLTRELSZ: nplt = d->d_un.d_val / sizeof *plt; break;
        case DT_RELA: rela = (void *)d->d_un.d_ptr; break;
        case DT_RELASZ: nrela = d->d_un.d_val / sizeof *rela; break;
        }
    if (symbols && names) {
        find_imports(info->dlpi_addr, plt, plt ? nplt : 0, symbols, names);
        find_imports(info->dlpi_addr, rela, rela ? nrela : 0, symbols, names);
    }
    return 1; /* the first object is the main binary: no other is looked at */
}

static int patch(void **at, void *to) {
    uintptr_t page = (uintptr_t)at & ~(PAGE - 1);
    _Bool read_only = page >= relro && page < relro_end;

    if (read_only && mprotect((void *)page, PAGE, PROT_READ | PROT_WRITE))
        return -1;
    atomic_store((_Atomic(void *) *)at, to);
    return read_only ? mprotect((void *)page, PAGE, PROT_READ) : 0;
}

static _Bool open_channel(void) {
    if (chan)
        return 1;
    int fd = memfd_create(CHANNEL_NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    void *p = MAP_FAILED;
    if (fd >= 0 && !ftruncate(fd, sizeof *chan) &&
        !fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)) /* or who cuts it ends QEMU */
        p = mmap(NULL, sizeof *chan, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) {
        if (fd >= 0)
            close(fd);
        return 0;
    }
    chan = p; /* the descriptor stays: the agent finds it by its name */
    chan->size = sizeof *chan;
    chan->magic = CHANNEL_MAGIC;
    return 1;
}

/* Hook QEMU's imports; the mode is observe.  The agent arms it, once no vCPU can be in a KVM_RUN that
 * it did not see, and then wants a mode.  Returns an enum answer. */
static int attach(void) {
    bql_locked = dlsym(RTLD_DEFAULT, "qemu_mutex_iothread_locked");
    if (!bql_locked)
        bql_locked = dlsym(RTLD_DEFAULT, "bql_locked");
    if (!bql_locked || !dlsym(RTLD_DEFAULT, "kvm_state"))
        return NO_QEMU;
    if (atomic_load(&chan->hooked))
        return DONE;
    region_of = dlsym(RTLD_DEFAULT, "memory_region_from_host");
    set_dirty = dlsym(RTLD_DEFAULT, "memory_region_set_dirty");
    if (!region_of)
        set_dirty = NULL;
    dl_iterate_phdr(main_binary, NULL);
    for (int h = 0; h < IMPORTS; h++) {
        if (!imports[h].at)
            return NO_IMPORTS;
        imports[h].was = *imports[h].at;
    }
    next_unlock = imports[1].was;
    next_wait = imports[2].was;
    next_timedwait = imports[3].was;
    slots.used = pieces.used = 0;
    blind = 0;
    atomic_fetch_add(&chan->epoch, 1);
    atomic_store(&chan->want, OBSERVE);
    set_mode(OBSERVE, NONE);
    for (int h = IMPORTS - 1; h >= 0; h--)
        if (patch(imports[h].at, imports[h].ours)) {
            for (; h < IMPORTS; h++)
                patch(imports[h].at, imports[h].was);
            return NO_GOT;
        }
    atomic_store(&chan->hooked, 1);
    return DONE;
}

/* KVM's slots become QEMU's, and the imports what they were.  BUSY when a transaction is open. */
static int detach(void) {
    if (!atomic_load(&chan->hooked))
        return DONE;
    for (uint64_t t = now(); pthread_mutex_trylock(&lock) || atomic_load(&open_tid); usleep(100)) {
        if (atomic_load(&open_tid))
            pthread_mutex_unlock(&lock);
        if (now() - t > CLOSE_NS)
            return BUSY;
    }
    _Bool restored = restore();
    if (restored) {
        atomic_store(&chan->want, OFF);
        set_mode(OFF, NONE);
        for (int h = 0; h < IMPORTS; h++)
            patch(imports[h].at, imports[h].was);
        atomic_store(&chan->armed, 0);
        atomic_store(&chan->hooked, 0);
    }
    pthread_mutex_unlock(&lock);
    return restored ? DONE : BUSY;
}

static int answer(int (*what)(void)) {
    if (!open_channel())
        return NO_CHANNEL;
    int found = what();
    atomic_store(&chan->answer, found);
    atomic_fetch_add(&chan->answers, 1);
    return found;
}

PUBLIC int qmp_memlistener_attach(void) { return answer(attach); }
PUBLIC int qmp_memlistener_detach(void) { return answer(detach); }

/* `qmp-memlistener run`: by LD_PRELOAD, before there are vCPUs. */
__attribute__((constructor)) static void preloaded(void) {
    const char *mode = getenv("QMP_MEMLISTENER_STEER");

    if (!mode || !dlsym(RTLD_DEFAULT, "kvm_state"))
        return;
    int found = qmp_memlistener_attach();
    if (found) {
        fprintf(stderr, "qmp-memlistener: no strategy can be applied here (%d)\n", found);
        return;
    }
    atomic_store(&chan->strict, getenv("QMP_MEMLISTENER_STRICT") != NULL);
    atomic_store(&chan->armed, 1);
    atomic_store(&chan->want, atoi(mode));
}
