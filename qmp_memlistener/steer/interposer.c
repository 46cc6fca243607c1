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
 *  2. Nobody waits for long: PARK_NS for vCPUs to leave KVM_RUN, RUN_NS before KVM_RUN, twice CLOSE_NS
 *     to detach.  Time in which QEMU itself is stopped (SIGSTOP, a debugger) does not count.
 *  3. On the way into KVM_RUN nothing is allocated, and no lock is waited for but by a vCPU's first.
 *  4. A bit of a dirty log is never lost: what KVM would forget with a slot is given to QEMU's own
 *     bitmap, while no vCPU runs.  What cannot be read counts as dirty.
 *  5. QEMU is told 0 for an operation that waits.  When KVM then refuses what QEMU asked for, the end
 *     is that of QEMU's own kvm_set_phys_mem: a message and abort().  No other path ends QEMU.
 *  6. `lock` is over everything but the channel's atomics.  It is taken with or without the BQL, and
 *     the BQL is never taken under it.  While it is held no memory of a slot in `slots` goes away:
 *     QEMU deletes the slot first.
 *
 * Slots of before this was attached are not known.  Their deletes go to KVM as they are, with vCPUs
 * kept out; an operation that adds one, or changes its flags, makes it known.
 *
 * Sources: QEMU accel/kvm/kvm-all.c (kvm_set_phys_mem, kvm_cpu_exec), softmmu/cpus.c
 * (qemu_mutex_unlock_iothread: the flag is cleared before the mutex), v7.2.22; Linux
 * Documentation/virt/kvm/api.rst, 4.35 (slots), 4.8 and 4.117 (dirty logs), virt/kvm/kvm_main.c
 * (kvm_get_dirty_log_protect: ENXIO with dirty rings, before the slot is looked at).
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

#ifndef MAX_SLOTS /* a test has smaller ones */
#define MAX_SLOTS 4096
#define MAX_OPS 1024
#define PARK_NS 1000000000ull /* for all vCPUs to leave KVM_RUN */
#define RUN_NS 2000000000ull /* a vCPU is kept out of KVM_RUN */
#define CLOSE_NS 10000000ull /* detach waits, and QEMU's main loop: for the lock, for vCPUs to leave */
#endif
#define STEP_NS 1000000ull   /* all waits look again after this */
#define STOP_NS 100000000ull /* and take QEMU for stopped when that lasted for longer */
#define PAGE 4096ull
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define PUBLIC __attribute__((visibility("default")))
#define REGION2 0x40a0ae49u /* KVM_SET_USER_MEMORY_REGION2, Linux 6.8 */

typedef struct kvm_userspace_memory_region Region; /* unused: memory_size 0 */
struct table {
    Region at[2 * MAX_SLOTS];
    int used; /* entries from here on are unused */
};
#define EACH(r, t) \
    for (Region *r = (t)->at; r < (t)->at + (t)->used; r++) \
        if (r->memory_size)

static struct channel *chan;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* rule 6 */
static struct table slots;  /* what QEMU believes */
static struct table pieces; /* what KVM has of them: each lies in one slot, and has its memory */
static struct table next;   /* `slots` after the transaction */
static Region queue[MAX_OPS], parts[MAX_OPS]; /* what is left of pieces that are cut */
static int queued, nparts, asked; /* asked: operations of the transaction */
static int vm_fd = -1;
static int rings;          /* dirty rings are in use: 0 not known, 1 no, 2 yes */
static _Bool region2_used; /* whose slots are not understood */
static _Bool is_open;      /* a transaction is */
static _Bool waits;        /* its operations do */
static _Bool is_parked;    /* by it */
static uint32_t opened_mode, park_stopped;
static uint64_t opened_ns, park_ns;
static Region last_refused;
static _Atomic uint32_t surprise; /* a refusal for the moment between two transactions */
static __thread struct vcpu *me;
static __thread _Bool mine; /* the open transaction is this thread's */

static _Bool (*bql_locked)(void);
/* memory_region_from_host, _size and _set_dirty, as they are in every QEMU since 2.0. */
static void *(*region_of)(void *host, uint64_t *offset);
static uint64_t (*size_of)(void *region);
static void (*set_dirty)(void *region, uint64_t offset, uint64_t size);
static int (*next_ioctl)(int, unsigned long, ...);
static int (*next_unlock)(pthread_mutex_t *);
static int (*next_wait)(pthread_cond_t *, pthread_mutex_t *);
static int (*next_timedwait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void futex(_Atomic uint32_t *word, int op, uint32_t value, uint64_t ns) {
    struct timespec t = {0, ns};
    syscall(SYS_futex, word, op, value, ns ? &t : NULL, NULL, 0);
}

/* Until the word changes, or for a step: what is left of the time then. */
static uint64_t wait_step(_Atomic uint32_t *word, uint32_t value, uint64_t left) {
    uint64_t t = now();
    futex(word, FUTEX_WAIT, value, STEP_NS);
    t = now() - t;
    if (t > STOP_NS)
        t = STOP_NS; /* rule 2: QEMU was stopped; less than that is a busy host, and counts */
    return t < left ? left - t : 0;
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
    e->tid = syscall(SYS_gettid);
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

/* For threads that must not take the lock: give up, as soon as no transaction is open. */
static void give_up_later(uint32_t why) {
    atomic_store(&surprise, why);
    atomic_store(&chan->want, OBSERVE);
}

/* -- vCPUs ----------------------------------------------------------------------------------------- */

static void stop_vcpu(const struct vcpu *v) { /* as kvm_cpu_kick: SIG_IPI, which nothing swallows */
    syscall(SYS_tgkill, getpid(), v->tid, SIGUSR1);
}

static void let_run(void) {
    atomic_store(&chan->parked, 0);
    futex(&chan->parked, FUTEX_WAKE, INT_MAX, 0);
}

/* Keep all vCPUs but this thread's out of KVM_RUN; false when one does not leave it in time. */
static _Bool park_within(uint64_t left) {
    uint32_t n = atomic_load(&chan->vcpus);

    if (is_parked)
        return 1;
    if (!atomic_load(&chan->armed))
        return 0; /* a vCPU may be in a KVM_RUN that we did not see */
    park_ns = now();
    park_stopped = 0;
    atomic_store(&chan->parked, 1);
    for (struct vcpu *v = chan->vcpu; v < chan->vcpu + n; v++)
        if (v != me && atomic_load(&v->inside)) {
            stop_vcpu(v);
            park_stopped++;
        }
    for (struct vcpu *v = chan->vcpu; v < chan->vcpu + n; v++)
        while (v != me && atomic_load(&v->inside)) {
            if (!left) {
                let_run();
                note(EV_PARK, NULL, park_ns, -ETIMEDOUT, park_stopped);
                return 0;
            }
            left = wait_step(&v->inside, 1, left);
            if (atomic_load(&v->inside))
                stop_vcpu(v);
        }
    is_parked = 1;
    return 1;
}

static _Bool park(void) { return park_within(PARK_NS); }

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
        give_up_later(TOO_MANY);
    } else {
        chan->vcpu[n].fd = fd;
        chan->vcpu[n].tid = syscall(SYS_gettid);
        me = &chan->vcpu[n];
        if (n == known)
            atomic_store(&chan->vcpus, n + 1);
    }
    pthread_mutex_unlock(&lock);
    return me;
}

/* -- slots and pieces -------------------------------------------------------------------------------- */

static uint64_t end_of(const Region *r) { return r->guest_phys_addr + r->memory_size; }

static _Bool overlaps(const Region *a, const Region *b) {
    return a->slot >> 16 == b->slot >> 16 && a->guest_phys_addr < end_of(b) &&
           b->guest_phys_addr < end_of(a);
}

static _Bool covers(const Region *a, const Region *b) {
    return overlaps(a, b) && a->guest_phys_addr <= b->guest_phys_addr && end_of(b) <= end_of(a);
}

static _Bool same_extent(const Region *a, const Region *b) { return covers(a, b) && covers(b, a); }

/* The same memory at the same place, as the same kind. */
static _Bool same_memory(const Region *a, const Region *b) {
    return !((a->flags ^ b->flags) & KVM_MEM_READONLY) &&
           a->userspace_addr - a->guest_phys_addr == b->userspace_addr - b->guest_phys_addr;
}

static Region *find(struct table *t, uint32_t id) {
    EACH(r, t)
        if (r->slot == id)
            return r;
    return NULL;
}

static Region *put(struct table *t, const Region *r, int most) {
    int i = 0;
    while (i < t->used && t->at[i].memory_size)
        i++;
    if (i >= most)
        return NULL;
    if (i == t->used)
        t->used++;
    t->at[i] = *r;
    return &t->at[i];
}

static void count_slots(void) {
    chan->slots = chan->pieces = 0;
    EACH(v, &slots)
        chan->slots++;
    EACH(k, &pieces)
        chan->pieces++;
}

/* The slot that a piece is a part of. */
static const Region *slot_of(struct table *t, const Region *k) {
    EACH(v, t)
        if (covers(v, k) && same_memory(v, k))
            return v;
    return NULL;
}

/* KVM has this slot as QEMU believes. */
static _Bool is_whole(const Region *v) {
    const Region *k = find(&pieces, v->slot);
    return k && same_extent(k, v) && same_memory(k, v);
}

static int give(Region *r) { /* to KVM */
    const Region *k = r->memory_size ? NULL : find(&pieces, r->slot);
    uint64_t t = now(), gone = k ? k->memory_size / PAGE : 0;
    int rc = next_ioctl(vm_fd, KVM_SET_USER_MEMORY_REGION, r), e = errno;

    note(EV_KVM, r, t, rc ? -e : 0, gone > UINT_MAX ? 0 : gone);
    if (rc)
        last_refused = *r;
    errno = e;
    return rc;
}

/* QEMU takes ids from 0 up; pieces take them from the top down when QEMU's own is in use. */
static uint32_t free_id(uint32_t wanted) {
    static int top;

    if (!find(&pieces, wanted))
        return wanted;
    if (!top) {
        top = next_ioctl(vm_fd, KVM_CHECK_EXTENSION, (void *)KVM_CAP_NR_MEMSLOTS);
        top = top < 32 ? 32 : top > 32764 ? 32764 : top;
    }
    for (int id = top - 1; id >= top / 2; id--) /* QEMU's own of before us are further down */
        if (!find(&pieces, (wanted & 0xffff0000u) | id))
            return (wanted & 0xffff0000u) | id;
    return 0xffff; /* KVM refuses it */
}

/* -- dirty logs -------------------------------------------------------------------------------------- */

static _Bool is_logged(const Region *r) { return r->flags & KVM_MEM_LOG_DIRTY_PAGES; }
static uint64_t pages_of(const Region *r) { return r->memory_size / PAGE; }
static size_t bytes_of(uint64_t pages) { return (pages + 63) / 64 * 8; }
static _Bool bit(const uint64_t *map, uint64_t i) { return map[i / 64] >> (i % 64) & 1; }
static void set_bit(uint64_t *map, uint64_t i) { map[i / 64] |= 1ull << (i % 64); }

static uint64_t *new_map(uint64_t pages) { /* not malloc: this thread may hold its lock */
    void *p = mmap(NULL, bytes_of(pages), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p != MAP_FAILED)
        return p;
    give_up_later(NO_MEMORY);
    return NULL;
}

static void drop_map(uint64_t *map, uint64_t pages) {
    int e = errno;
    if (map)
        munmap(map, bytes_of(pages));
    errno = e;
}

/* KVM forgets a slot's dirty bits with the slot, and QEMU asked for them some time before it deleted
 * it.  The rest goes to QEMU's own bitmap.  Complete only while no vCPU runs.  A slot of before us has
 * no size here, and ends at the latest where its memory does. */
static void save_dirty(const Region *k) {
    uint64_t t = now(), offset = 0, n = 0;
    void *region;

    if (!set_dirty || atomic_load(&chan->mode) <= OBSERVE || (k->memory_size && !is_logged(k)) ||
        !(region = region_of((void *)(uintptr_t)k->userspace_addr, &offset)))
        return;
    uint64_t pages = k->memory_size ? pages_of(k) : (size_of(region) - offset) / PAGE;
    uint64_t *map = new_map(pages);
    struct kvm_dirty_log log = {.slot = k->slot, .dirty_bitmap = map};
    int rc = map ? next_ioctl(vm_fd, KVM_GET_DIRTY_LOG, &log) : 0;
    _Bool none = rc && errno == ENOENT /* not logged */, all = !map || (rc && !none);
    for (uint64_t i = 0, j; i < pages && !none; i = j) {
        for (j = i + 1; j < pages && (all || bit(map, j) == bit(map, i)); j++)
            ;
        if (all || bit(map, i)) {
            set_dirty(region, offset + i * PAGE, (j - i) * PAGE);
            n += j - i;
        }
    }
    drop_map(map, pages);
    if (none)
        return;
    chan->saved += n;
    note(EV_SAVED, k, t, 0, n > UINT_MAX ? UINT_MAX : n);
}

/* For a slot that is split.  A piece that KVM cannot answer for is dirty, if there were others. */
static int get_dirty_log(struct kvm_dirty_log *log, const Region *v) {
    uint64_t *map = new_map(pages_of(v));
    int answered = 0;

    memset(log->dirty_bitmap, 0, bytes_of(pages_of(v)));
    EACH(k, &pieces) {
        if (!covers(v, k))
            continue;
        uint64_t first = (k->guest_phys_addr - v->guest_phys_addr) / PAGE;
        struct kvm_dirty_log part = {.slot = k->slot, .dirty_bitmap = map};
        _Bool all = !map || next_ioctl(vm_fd, KVM_GET_DIRTY_LOG, &part);
        if (all && map && !answered) {
            drop_map(map, pages_of(v));
            return -1;
        }
        answered++;
        for (uint64_t j = 0; j < pages_of(k); j++)
            if (all || bit(map, j))
                set_bit(log->dirty_bitmap, first + j);
    }
    drop_map(map, pages_of(v));
    return 0;
}

/* Likewise.  What is not cleared is told again by the next get. */
static int clear_dirty_log(const struct kvm_clear_dirty_log *log, const Region *v) {
    uint64_t *map = new_map(pages_of(v));
    int rc = 0;

    EACH(k, &pieces) {
        uint64_t first = (k->guest_phys_addr - v->guest_phys_addr) / PAGE, pages = pages_of(k);
        uint64_t from = log->first_page, to = log->first_page + log->num_pages;
        if (!map || rc || !covers(v, k) || to <= first || from >= first + pages)
            continue;
        if (from < first)
            from = first;
        if (to > first + pages)
            to = first + pages;
        /* KVM wants a first page that 64 divides; a bit that is not set clears nothing */
        uint64_t begin = (from - first) & ~63ull, end = (to - first + 63) & ~63ull;
        if (end > pages)
            end = pages;
        memset(map, 0, bytes_of(end - begin));
        for (uint64_t p = from; p < to; p++)
            if (bit(log->dirty_bitmap, p - log->first_page))
                set_bit(map, p - first - begin);
        struct kvm_clear_dirty_log part = {
            .slot = k->slot, .first_page = begin, .num_pages = end - begin, .dirty_bitmap = map};
        rc = next_ioctl(vm_fd, KVM_CLEAR_DIRTY_LOG, &part);
    }
    drop_map(map, pages_of(v));
    return rc;
}

/* -- carrying out ---------------------------------------------------------------------------------- */

static int delete_piece(Region *k) {
    Region r = {.slot = k->slot, .guest_phys_addr = k->guest_phys_addr,
                .userspace_addr = k->userspace_addr};

    save_dirty(k);
    int rc = give(&r);
    if (!rc)
        k->memory_size = 0;
    return rc;
}

static int add_piece(const Region *part, int most) {
    Region r = *part;

    r.slot = free_id(part->slot);
    Region *k = put(&pieces, &r, most);
    if (!k) {
        errno = ENOSPC;
        return -1;
    }
    int rc = give(&r);
    if (rc)
        k->memory_size = 0;
    return rc;
}

static int set_flags(Region *k, uint32_t flags) {
    Region r = *k;

    r.flags = flags;
    int rc = give(&r);
    if (!rc)
        k->flags = flags;
    return rc;
}

/* The parts of a slot for which KVM has no piece yet. */
static int add_rest(const Region *v, int most) {
    for (uint64_t at = v ? v->guest_phys_addr : 0; v && at < end_of(v);) {
        Region r = *v;
        uint64_t end = end_of(v), covered = at;
        EACH(k, &pieces) {
            if (!covers(v, k))
                continue;
            if (k->guest_phys_addr <= at && at < end_of(k))
                covered = end_of(k);
            else if (k->guest_phys_addr > at && k->guest_phys_addr < end)
                end = k->guest_phys_addr;
        }
        if (covered == at) {
            r.guest_phys_addr = at;
            r.userspace_addr += at - v->guest_phys_addr;
            r.memory_size = end - at;
            if (add_piece(&r, most))
                return -1;
            covered = end;
        }
        at = covered;
    }
    return 0;
}

/* KVM's slots become those of `slots`: whole, or in pieces. */
static int settle(_Bool whole) {
    int most = whole ? 2 * MAX_SLOTS : MAX_SLOTS; /* as many as QEMU has slots always fit beside */

    EACH(k, &pieces) {
        const Region *v = slot_of(&slots, k);
        if (!v || (whole && !is_whole(v))) {
            if (delete_piece(k))
                return -1;
        } else if (k->flags != v->flags) {
            if (!is_logged(v))
                save_dirty(k);
            if (set_flags(k, v->flags))
                return -1;
        }
    }
    /* what was there first, then in QEMU's order */
    for (int i = 0; i < nparts; i++)
        if (add_piece(&parts[i], most))
            return -1;
    for (int i = 0; i < queued; i++)
        if (queue[i].memory_size && add_rest(find(&slots, queue[i].slot), most))
            return -1;
    EACH(v, &slots)
        if (add_rest(v, most))
            return -1;
    return 0;
}

static void refused(void) { /* rule 5 */
    const Region *r = &last_refused;
    fprintf(stderr,
            "qmp-memlistener: KVM refused slot %u, start 0x%llx, size 0x%llx: %s; QEMU was told that "
            "it was done, and ends as it does when it is refused a slot\n",
            r->slot, r->guest_phys_addr, r->memory_size, strerror(errno));
    abort();
}

/* Dirty bits of a slot that goes. */
static _Bool may_lose(void) {
    EACH(v, &slots)
        if (is_logged(v) && !set_dirty)
            return 1;
    return 0;
}

/* KVM's slots become QEMU's again, while no vCPU runs, or all the same when it `must` be.  False when
 * they did not: pieces stay, which together are QEMU's slots as well. */
static _Bool restore(_Bool must, uint64_t within) {
    _Bool held = is_parked, any = 0;

    EACH(k, &pieces)
        any |= !slot_of(&slots, k);
    EACH(v, &slots)
        any |= !is_whole(v);
    if (!any)
        return 1;
    if ((may_lose() || !park_within(within)) && !must)
        return 0;
    _Bool whole = !settle(1);
    if (!whole && settle(0))
        refused();
    if (!held)
        unpark();
    return whole;
}

/* Rule 1.  The agent may want another mode again, when it has read why. */
static void give_up(uint32_t why) {
    if (why != NOT_STOPPED) /* then it would be waited for once more */
        restore(1, PARK_NS);
    chan->gave_up++;
    atomic_store(&chan->want, OBSERVE);
    set_mode(OBSERVE, why);
}

/* One operation as QEMU asked for it, on however many pieces its slot has. */
static int carry_out(const Region *op) {
    Region *v = find(&slots, op->slot), r = *op;
    int rc = 0;

    if (!op->memory_size) {
        if (!v) { /* it was there before us */
            save_dirty(op);
            return give(&r);
        }
        EACH(k, &pieces)
            if (!rc && covers(v, k))
                rc = delete_piece(k);
        if (!rc)
            v->memory_size = 0;
    } else if (!v) {
        v = put(&slots, op, MAX_SLOTS);
        if (!v) {
            give_up(TOO_MANY); /* and never known */
            return give(&r);
        }
        rc = add_piece(op, 2 * MAX_SLOTS);
        if (rc)
            v->memory_size = 0;
    } else if (same_extent(v, op) && same_memory(v, op)) {
        EACH(k, &pieces)
            if (!rc && covers(v, k))
                rc = set_flags(k, op->flags);
        if (!rc)
            v->flags = op->flags;
    } else { /* moved, which no QEMU does */
        restore(1, PARK_NS);
        Region *k = find(&pieces, v->slot);
        rc = give(&r);
        if (!rc && k)
            *v = *k = r;
    }
    return rc;
}

/* An add overlaps what a delete took away (need_inhibit of kvm_region_commit, QEMU 8.0), or a
 * delete takes a dirty log with it; or may do so, as nothing is known of the slot. */
static _Bool needs_park(void) {
    for (int i = 0; i < queued; i++) {
        if (queue[i].memory_size)
            continue;
        const Region *v = find(&slots, queue[i].slot);
        if (!v || is_logged(v))
            return 1;
        for (int j = i + 1; j < queued; j++)
            if (queue[j].memory_size && overlaps(v, &queue[j]))
                return 1;
    }
    return 0;
}

static void issue_queue(void) { /* in QEMU's order */
    for (int i = 0; i < queued; i++)
        if (carry_out(&queue[i]))
            refused();
    queued = 0;
}

static void inhibit(void) {
    _Bool stopped = !needs_park() || park();
    issue_queue();
    if (!stopped)
        give_up(NOT_STOPPED);
}

/* The slots after the transaction, in `next`.  False when it is not understood: operations on slots
 * that were there before us, or that KVM is to refuse. */
static _Bool plan(void) {
    next.used = slots.used;
    memcpy(next.at, slots.at, slots.used * sizeof *slots.at);
    for (int i = 0; i < queued; i++) {
        const Region *op = &queue[i];
        Region *v = find(&next, op->slot);
        if (!op->memory_size) {
            if (!v)
                return 0;
            v->memory_size = 0;
        } else if (v) {
            if (!same_extent(v, op) || !same_memory(v, op))
                return 0;
            v->flags = op->flags;
        } else {
            EACH(o, &next)
                if (overlaps(o, op))
                    return 0;
            if (!put(&next, op, MAX_SLOTS))
                return 0;
        }
    }
    return 1;
}

static _Bool has_rings(void) {
    struct kvm_dirty_log none = {.slot = 0xffff};

    if (!rings)
        rings = next_ioctl(vm_fd, KVM_GET_DIRTY_LOG, &none) && errno == ENXIO ? 2 : 1;
    return rings == 2;
}

/* What is left of a piece in slots that are new.  False when it is too much. */
static _Bool cut(const Region *k) {
    for (int i = 0; i < queued; i++) {
        const Region *v = queue[i].memory_size ? find(&next, queue[i].slot) : NULL;
        if (!v || !overlaps(k, v) || !same_memory(k, v))
            continue;
        if (nparts == MAX_OPS)
            return 0;
        Region part = k->guest_phys_addr < v->guest_phys_addr ? *v : *k;
        uint64_t end = end_of(k) < end_of(v) ? end_of(k) : end_of(v);
        part.slot = v->slot;
        part.flags = v->flags;
        part.memory_size = end - part.guest_phys_addr;
        _Bool known = 0; /* a slot may be in the queue twice, for its flags */
        for (int j = 0; j < nparts; j++)
            known |= overlaps(&parts[j], &part);
        if (!known)
            parts[nparts++] = part;
    }
    return 1;
}

static void hole(void) {
    _Bool forgets = 0, fits = 1;
    uint64_t kept = 0;

    if (has_rings() || !plan()) {
        inhibit(); /* and now the slots are known */
        if (has_rings())
            give_up(DIRTY_RINGS);
        return;
    }
    nparts = 0;
    EACH(k, &pieces) {
        const Region *was = slot_of(&slots, k), *v = slot_of(&next, k);
        forgets |= is_logged(k) && (!v || !is_logged(v));
        kept += v && (!was || !same_extent(v, was));
        fits &= v || cut(k);
    }
    int cuts = nparts;
    uint32_t why = NONE;
    if (!fits)
        why = TOO_MANY;
    else if ((cuts || forgets || (atomic_load(&chan->strict) && needs_park())) && !park())
        why = NOT_STOPPED;
    if (why) {
        nparts = 0;
        if (why == TOO_MANY)
            inhibit();
        else
            issue_queue();
        give_up(why);
        return;
    }
    slots.used = next.used;
    memcpy(slots.at, next.at, next.used * sizeof *next.at);
    int rc = settle(0), e = errno;
    queued = nparts = 0;
    if (rc) {
        give_up(e == ENOSPC ? TOO_MANY : KVM_REFUSED);
        return;
    }
    chan->splits += !!cuts;
    chan->kept += kept;
}

/* -- transactions ------------------------------------------------------------------------------------ */

static void end_transaction(void) {
    int e = errno;

    mine = 0; /* at once: QEMU's functions that are called here unlock, too */
    pthread_mutex_lock(&lock);
    if (waits && opened_mode == HOLE && atomic_load(&chan->mode) == HOLE)
        hole();
    else
        inhibit();
    unpark();
    chan->transactions++;
    note(EV_TRANSACTION, NULL, opened_ns, asked, opened_mode);
    count_slots();
    is_open = 0;
    pthread_mutex_unlock(&lock);
    errno = e;
}

/* What waits goes to KVM at once, and vCPUs are kept out from now to the end, as in `pause`. */
static void wait_no_longer(void) {
    _Bool stopped = park();
    issue_queue();
    waits = 0;
    if (!stopped)
        give_up(NOT_STOPPED);
}

/* The mode that the agent wants, between two transactions.  `lock` is held. */
static void take_mode(void) {
    uint32_t want = atomic_load(&chan->want), mode = atomic_load(&chan->mode), why;

    if (is_open)
        return;
    if ((why = atomic_exchange(&surprise, NONE)))
        give_up(why);
    else if (want == mode)
        return;
    else if (want > HOLE || (want > OBSERVE && !atomic_load(&chan->armed)))
        give_up(NOT_READY);
    else if (want > OBSERVE && region2_used)
        give_up(REGION2_USED);
    else if (want == HOLE && vm_fd >= 0 && has_rings())
        give_up(DIRTY_RINGS);
    else if ((mode == HOLE || want == OFF) && !restore(0, PARK_NS))
        give_up(NOT_STOPPED);
    else
        set_mode(want, NONE);
    if (atomic_load(&chan->mode) == OFF)
        slots.used = pieces.used = 0; /* they go by unseen from now on */
    count_slots();
}

static void open_transaction(void) {
    uint32_t mode = atomic_load(&chan->mode);

    if (mode > OBSERVE && may_lose())
        give_up(NO_SAVE);
    else if (mode == PAUSE && !park())
        give_up(NOT_STOPPED);
    mine = is_open = 1;
    asked = 0;
    opened_mode = atomic_load(&chan->mode);
    waits = opened_mode >= INHIBIT;
}

static int set_region(int fd, Region *op) {
    uint64_t t = now();
    int rc = 0;

    if (atomic_load(&chan->mode) == OFF && atomic_load(&chan->want) == OFF)
        return next_ioctl(fd, KVM_SET_USER_MEMORY_REGION, op);
    pthread_mutex_lock(&lock);
    if (vm_fd < 0)
        vm_fd = fd;
    if (fd != vm_fd) { /* another VM of this process: none of ours */
        pthread_mutex_unlock(&lock);
        return next_ioctl(fd, KVM_SET_USER_MEMORY_REGION, op);
    }
    take_mode();
    if (atomic_load(&chan->mode) == OFF) { /* what is not followed is not known either */
        pthread_mutex_unlock(&lock);
        return next_ioctl(fd, KVM_SET_USER_MEMORY_REGION, op);
    }
    if (!is_open && !op->memory_size) {
        open_transaction();
        opened_ns = t;
    }
    if (mine && queued == MAX_OPS) {
        wait_no_longer();
        give_up_later(TOO_MANY);
    }
    if (mine && waits)
        queue[queued++] = *op;
    else
        rc = carry_out(op);
    int e = errno;
    asked += mine;
    note(EV_QEMU, op, t, rc ? -e : 0, mine);
    count_slots();
    pthread_mutex_unlock(&lock);
    errno = e;
    return rc;
}

static int region2(int fd, Region *op) { /* begins as the former; stamped only */
    if (mine)
        end_transaction();
    pthread_mutex_lock(&lock);
    region2_used = 1;
    if (atomic_load(&chan->mode) > OBSERVE)
        give_up(REGION2_USED);
    uint64_t t = now();
    int rc = next_ioctl(fd, REGION2, op), e = errno;
    note(EV_KVM, op, t, rc ? -e : 0, 0);
    note(EV_QEMU, op, t, rc ? -e : 0, 0);
    pthread_mutex_unlock(&lock);
    errno = e;
    return rc;
}

static int dirty_log(int fd, unsigned long request, void *arg) {
    uint32_t id = *(uint32_t *)arg; /* the first field of both */
    int rc;

    pthread_mutex_lock(&lock);
    for (int i = 0; mine && i < queued; i++)
        if (queue[i].slot == id)
            wait_no_longer();
    const Region *v = fd == vm_fd ? find(&slots, id) : NULL;
    if (!v || is_whole(v)) {
        rc = next_ioctl(fd, request, arg);
    } else {
        chan->translated++;
        rc = (uint32_t)request == KVM_GET_DIRTY_LOG ? get_dirty_log(arg, v)
                                                    : clear_dirty_log(arg, v);
    }
    int e = errno;
    pthread_mutex_unlock(&lock);
    errno = e;
    return rc;
}

/* -- the four imports ---------------------------------------------------------------------------------- */

static int run(int fd, void *arg) {
    struct vcpu *v = likely(me) ? me : enrol(fd);

    if (unlikely(mine))
        end_transaction();
    if (unlikely(atomic_load_explicit(&chan->want, memory_order_relaxed) !=
                 atomic_load_explicit(&chan->mode, memory_order_relaxed)) &&
        pthread_mutex_trylock(&lock) == 0) {
        take_mode();
        pthread_mutex_unlock(&lock);
    }
    if (unlikely(!v))
        return next_ioctl(fd, KVM_RUN, arg);
    v->epoch = chan->epoch;
    for (uint64_t left = RUN_NS;;) {
        atomic_store(&v->inside, 1);
        if (likely(!atomic_load(&chan->parked)) || !left)
            break;
        atomic_store(&v->inside, 0);
        futex(&v->inside, FUTEX_WAKE, 1, 0);
        while (atomic_load(&chan->parked) && left)
            left = wait_step(&chan->parked, 1, left);
        if (!left) { /* rule 2 */
            note(EV_PARK, NULL, now() - RUN_NS, -EBUSY, 0);
            give_up_later(HELD);
        }
    }
    v->runs++;
    int r = next_ioctl(fd, KVM_RUN, arg), e = errno;
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
    }
    return next_ioctl(fd, request, arg);
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
    {.name = "ioctl", .ours = our_ioctl},
    {.name = "pthread_mutex_unlock", .ours = our_unlock},
    {.name = "pthread_cond_wait", .ours = our_wait},
    {.name = "pthread_cond_timedwait", .ours = our_timedwait},
};
#define IMPORTS (int)(sizeof imports / sizeof *imports)
static uintptr_t relro, relro_end, binary, binary_end;

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
        if (p->p_type == PT_LOAD && p->p_flags & PF_X) {
            binary = at;
            binary_end = at + p->p_memsz;
        }
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

/* What the imports are bound to, once: threads may be on their way through it ever after. */
static _Bool find_next(void) {
    void *to[IMPORTS];

    dl_iterate_phdr(main_binary, NULL);
    for (int h = 0; h < IMPORTS; h++) {
        if (!imports[h].at)
            return 0;
        to[h] = imports[h].was = *imports[h].at;
        /* not bound yet: the binder would write over our hook */
        if ((uintptr_t)to[h] >= binary && (uintptr_t)to[h] < binary_end)
            to[h] = dlsym(RTLD_NEXT, imports[h].name);
        if (!to[h])
            return 0;
    }
    next_ioctl = to[0];
    next_unlock = to[1];
    next_wait = to[2];
    next_timedwait = to[3];
    return 1;
}

static int patch(void **at, void *to) {
    uintptr_t page = (uintptr_t)at & ~(PAGE - 1);
    _Bool read_only = page >= relro && page < relro_end;

    if (read_only && mprotect((void *)page, PAGE, PROT_READ | PROT_WRITE))
        return -1;
    atomic_store((_Atomic(void *) *)at, to);
    return read_only ? mprotect((void *)page, PAGE, PROT_READ) : 0;
}

static void in_child(void) { mine = 0; } /* of fork: it has no part in a transaction */

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
    __atomic_store_n(&chan->magic, CHANNEL_MAGIC, __ATOMIC_RELEASE); /* now it is one */
    pthread_atfork(NULL, NULL, in_child);
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
    if (!next_ioctl && !find_next())
        return NO_IMPORTS;
    pthread_mutex_lock(&lock); /* a thread may be late on its way out of the last time */
    region_of = dlsym(RTLD_DEFAULT, "memory_region_from_host");
    size_of = dlsym(RTLD_DEFAULT, "memory_region_size");
    set_dirty = region_of && size_of ? dlsym(RTLD_DEFAULT, "memory_region_set_dirty") : NULL;
    slots.used = pieces.used = rings = 0;
    vm_fd = -1;
    region2_used = 0;
    atomic_store(&surprise, NONE);
    atomic_fetch_add(&chan->epoch, 1);
    atomic_store(&chan->want, OBSERVE);
    set_mode(OBSERVE, NONE);
    pthread_mutex_unlock(&lock);
    for (int h = IMPORTS - 1; h >= 0; h--)
        if (patch(imports[h].at, imports[h].ours)) {
            for (; h < IMPORTS; h++)
                patch(imports[h].at, imports[h].was);
            return NO_GOT;
        }
    atomic_store(&chan->hooked, 1);
    return DONE;
}

/* KVM's slots become QEMU's, and the imports what they were.  BUSY when a transaction is open: when
 * the agent wants OFF before, none is. */
static int detach(void) {
    uint64_t t = now();

    if (!atomic_load(&chan->hooked))
        return DONE;
    while (pthread_mutex_trylock(&lock)) {
        if (now() - t > CLOSE_NS)
            return BUSY;
        nanosleep(&(struct timespec){0, 100000}, NULL);
    }
    _Bool restored = !is_open && restore(0, CLOSE_NS);
    if (restored) {
        atomic_store(&chan->want, OFF);
        if (atomic_load(&chan->mode) != OFF)
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
    chan->answered_ns = now();
    atomic_fetch_add(&chan->answers, 1);
    return found;
}

PUBLIC int qmp_memlistener_attach(void) { return answer(attach); }
PUBLIC int qmp_memlistener_detach(void) { return answer(detach); }

/* Preloaded by `qmp-memlistener run`, before there are vCPUs; or loaded into a QEMU that runs, which
 * has its kvm_state: then the agent arms it. */
__attribute__((constructor)) static void loaded(void) {
    const char *mode = getenv("QMP_MEMLISTENER_STEER");
    void *const *kvm = dlsym(RTLD_DEFAULT, "kvm_state");

    if (mode && !kvm)
        return; /* another program that QEMU has started */
    int found = qmp_memlistener_attach();
    if (!mode || *kvm)
        return;
    if (found) {
        fprintf(stderr, "qmp-memlistener: no strategy can be applied here (%d)\n", found);
        return;
    }
    atomic_store(&chan->strict, getenv("QMP_MEMLISTENER_STRICT") != NULL);
    atomic_store(&chan->armed, 1);
    atomic_store(&chan->want, atoi(mode));
}
