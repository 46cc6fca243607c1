/* The interposer between a QEMU and a KVM that are both here: sequences of operations from stdin, one
 * verdict a line.  tools/soak_interposer.py builds it (with sanitizers) and says what to do.
 *
 * A sequence: a uint32_t n, then n words.  The first word chooses what sort of VM it is, each other
 * one is a thing that QEMU, the agent or KVM does.  What must hold:
 *
 *   - at the end of each transaction KVM's memory is what QEMU asked for, page by page
 *   - once the interposer is taken out KVM has exactly QEMU's slots
 *   - a vCPU that runs under pause, inhibit or hole never misses RAM that was there before a
 *     transaction and is there after it
 *   - a page that was written while it was logged is dirty for QEMU in the end
 *   - QEMU is ended only after KVM refused an operation
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MAX_SLOTS 24
#define MAX_OPS 16
#define PARK_NS 200000000ull
#define RUN_NS 2000000000ull
#define CLOSE_NS 40000000ull
static void *fake_dlsym(void *handle, const char *name);
static void fake_abort(void);
#define dlsym fake_dlsym
#define abort fake_abort
#include "../../qmp_memlistener/steer/interposer.c"
#undef dlsym
#undef abort

#define VCPUS 2
#define VM_FD 1000
#define VCPU_FD 2000
#define SPACES 2
#define PAGES 256 /* of a guest's address space */
#define BLOCKS 3
#define BLOCK_PAGES 512
#define IDS 128
#define HVA(b, p) ((1ull << 40) + ((uint64_t)(b) << 32) + (uint64_t)(p) * PAGE)

/* What is at a page: memory of a block, or nothing (block -1). */
struct at {
    int block, page;
    _Bool rom;
};

static struct at map[SPACES][PAGES], base[SPACES][PAGES]; /* QEMU's FlatView, and as it began */
static Region believed[IDS];                              /* QEMU's slots; unused: size 0 */
static _Bool logging[BLOCKS];
static _Bool bql, manual, has_set_dirty = 1, with_rings, use_region2, traced;
static char wrong[400]; /* under `words` */
static pthread_mutex_t words = PTHREAD_MUTEX_INITIALIZER;

/* KVM, under `kvm` */
static pthread_mutex_t kvm = PTHREAD_MUTEX_INITIALIZER;
static Region held[SPACES][IDS];
static uint64_t bits[SPACES][IDS][PAGES / 64];
static uint64_t written[BLOCKS][BLOCK_PAGES], known[BLOCKS][BLOCK_PAGES], clock_;
static _Bool must[SPACES][PAGES]; /* a vCPU that runs does not miss it */
static int fail_in, failed;
static _Bool ended, dirty_counts, watching;
static _Atomic _Bool hold_vcpu, stop_all;
static __thread _Atomic _Bool immediate_exit;

static void say_wrong(const char *format, ...) {
    va_list values;
    va_start(values, format);
    pthread_mutex_lock(&words);
    if (!wrong[0])
        vsnprintf(wrong, sizeof wrong, format, values);
    pthread_mutex_unlock(&words);
    va_end(values);
}

static _Bool is_wrong(void) {
    pthread_mutex_lock(&words);
    _Bool is = wrong[0];
    pthread_mutex_unlock(&words);
    return is;
}

static void trace(const char *format, ...) {
    va_list values;
    va_start(values, format);
    if (traced) {
        vfprintf(stderr, format, values);
        fputc('\n', stderr);
    }
    va_end(values);
}

/* -- KVM --------------------------------------------------------------------------------------------- */

static int fail(int e) {
    errno = e;
    return -1;
}

static int block_of(uint64_t hva) { return (hva - (1ull << 40)) >> 32; }
static int page_of(uint64_t hva) { return (uint32_t)hva / PAGE; }

/* A log goes with what is in it; in the modes that promise nothing, QEMU knows no better. */
static void forget(int space, int id) {
    const Region *r = &held[space][id];
    for (uint64_t i = 0; i < r->memory_size / PAGE; i++)
        if (bits[space][id][i / 64] >> (i % 64) & 1 && atomic_load(&chan->mode) <= OBSERVE)
            written[block_of(r->userspace_addr)][page_of(r->userspace_addr) + i] = 0;
    memset(bits[space][id], 0, sizeof bits[space][id]);
}

static int kvm_set(const Region *r) {
    int space = r->slot >> 16, id = r->slot & 0xffff;
    Region *old;

    trace("  KVM slot %d:%d gpa %#llx size %#llx hva %#llx flags %u", space, id, r->guest_phys_addr,
          r->memory_size, r->userspace_addr, r->flags);
    if (fail_in && --fail_in == 0) {
        failed++;
        watching = 0;
        return fail(ENOMEM);
    }
    if (space >= SPACES || id >= IDS)
        return fail(EINVAL);
    old = &held[space][id];
    if (!r->memory_size) {
        if (!old->memory_size)
            return fail(EINVAL);
        forget(space, id);
        old->memory_size = 0;
        return 0;
    }
    if (old->memory_size && (old->memory_size != r->memory_size ||
                             old->userspace_addr != r->userspace_addr ||
                             (old->flags ^ r->flags) & KVM_MEM_READONLY))
        return fail(EINVAL);
    for (int i = 0; i < IDS; i++)
        if (i != id && held[space][i].memory_size && overlaps(&held[space][i], r))
            return fail(EEXIST);
    if (!(r->flags & KVM_MEM_LOG_DIRTY_PAGES))
        forget(space, id);
    *old = *r;
    return 0;
}

static int kvm_get_log(struct kvm_dirty_log *log) {
    int space = log->slot >> 16, id = log->slot & 0xffff;

    if (with_rings)
        return fail(ENXIO);
    if (space >= SPACES || id >= IDS)
        return fail(EINVAL);
    if (!held[space][id].memory_size || !(held[space][id].flags & KVM_MEM_LOG_DIRTY_PAGES))
        return fail(ENOENT);
    size_t size = bytes_of(held[space][id].memory_size / PAGE);
    memcpy(log->dirty_bitmap, bits[space][id], size);
    if (!manual)
        memset(bits[space][id], 0, size);
    return 0;
}

static int kvm_clear_log(struct kvm_clear_dirty_log *log) {
    int space = log->slot >> 16, id = log->slot & 0xffff;
    uint64_t pages = held[space][id].memory_size / PAGE;

    if (!pages || !(held[space][id].flags & KVM_MEM_LOG_DIRTY_PAGES))
        return fail(ENOENT);
    if (log->first_page & 63 || log->first_page > pages || log->num_pages > pages - log->first_page ||
        (log->num_pages & 63 && log->num_pages != pages - log->first_page))
        return fail(EINVAL);
    for (uint64_t i = 0; i < log->num_pages; i++)
        if (bit(log->dirty_bitmap, i))
            bits[space][id][(log->first_page + i) / 64] &= ~(1ull << (log->first_page + i) % 64);
    return 0;
}

static void access_memory(unsigned *seed) {
    int space = rand_r(seed) % 8 == 0, page = rand_r(seed) % PAGES;

    for (int id = 0; id < IDS; id++) {
        Region *r = &held[space][id];
        uint64_t gpa = page * PAGE;
        if (!r->memory_size || gpa < r->guest_phys_addr || gpa >= end_of(r))
            continue;
        uint64_t hva = r->userspace_addr + gpa - r->guest_phys_addr, i = (gpa - r->guest_phys_addr) / PAGE;
        if (r->flags & KVM_MEM_READONLY || !(r->flags & KVM_MEM_LOG_DIRTY_PAGES))
            return;
        bits[space][id][i / 64] |= 1ull << (i % 64);
        written[block_of(hva)][page_of(hva)] = ++clock_;
        return;
    }
    if (watching && must[space][page])
        say_wrong("a vCPU misses page %d of space %d", page, space);
}

static int kvm_run(int fd) {
    static __thread unsigned seed;
    static const struct timespec a_while = {0, 20000};

    seed += fd;
    for (int turn = 0; turn < 40; turn++) {
        while (atomic_load(&hold_vcpu) && fd == VCPU_FD)
            nanosleep(&a_while, NULL);
        if (atomic_exchange(&immediate_exit, 0))
            return fail(EINTR);
        pthread_mutex_lock(&kvm);
        for (int i = 0; i < 6; i++)
            access_memory(&seed);
        pthread_mutex_unlock(&kvm);
        nanosleep(&a_while, NULL);
    }
    return 0;
}

static int fake_ioctl(int fd, unsigned long request, void *arg) {
    int rc;

    if (request == KVM_RUN)
        return kvm_run(fd);
    if (request == KVM_CHECK_EXTENSION)
        return IDS;
    pthread_mutex_lock(&kvm);
    if (request == KVM_SET_USER_MEMORY_REGION || request == REGION2)
        rc = kvm_set(arg);
    else if (request == KVM_GET_DIRTY_LOG)
        rc = kvm_get_log(arg);
    else
        rc = kvm_clear_log(arg);
    int e = errno;
    pthread_mutex_unlock(&kvm);
    errno = e;
    return rc;
}

/* -- QEMU -------------------------------------------------------------------------------------------- */

static _Bool fake_bql_locked(void) { return bql; }
static int fake_unlock(pthread_mutex_t *m) { return (void)m, 0; }
static int fake_wait(pthread_cond_t *c, pthread_mutex_t *m) { return (void)c, (void)m, 0; }
static int fake_timedwait(pthread_cond_t *c, pthread_mutex_t *m, const struct timespec *t) {
    return (void)c, (void)m, (void)t, 0;
}
static void *cells[4] = {fake_ioctl, fake_unlock, fake_wait, fake_timedwait}; /* the GOT */
static char blocks[BLOCKS];

static void *fake_region_of(void *host, uint64_t *offset) {
    *offset = page_of((uintptr_t)host) * PAGE;
    return &blocks[block_of((uintptr_t)host)];
}

static uint64_t fake_size_of(void *region) { return (void)region, BLOCK_PAGES * PAGE; }

static void now_dirty(int block, uint64_t page) { known[block][page] = clock_; }

static void fake_set_dirty(void *region, uint64_t offset, uint64_t size) {
    pthread_mutex_lock(&kvm);
    for (uint64_t p = offset / PAGE; p < (offset + size) / PAGE; p++)
        now_dirty((char *)region - blocks, p);
    pthread_mutex_unlock(&kvm);
}

static void *fake_dlsym(void *handle, const char *name) {
    (void)handle;
    if (!strcmp(name, "qemu_mutex_iothread_locked"))
        return fake_bql_locked;
    if (!strcmp(name, "memory_region_from_host"))
        return fake_region_of;
    if (!strcmp(name, "memory_region_size"))
        return fake_size_of;
    if (!strcmp(name, "memory_region_set_dirty"))
        return has_set_dirty ? fake_set_dirty : NULL;
    if (!strcmp(name, "ioctl"))
        return fake_ioctl;
    if (!strcmp(name, "pthread_mutex_unlock"))
        return fake_unlock;
    if (!strcmp(name, "pthread_cond_wait"))
        return fake_wait;
    if (!strcmp(name, "pthread_cond_timedwait"))
        return fake_timedwait;
    return cells; /* kvm_state */
}

static void fake_abort(void) {
    if (!failed)
        say_wrong("QEMU is ended, and KVM refused nothing of its own accord");
    ended = 1;
}

static int call_ioctl(int fd, unsigned long request, void *arg) {
    int (*at)(int, unsigned long, void *);
    atomic_thread_fence(memory_order_acquire);
    *(void **)&at = atomic_load((_Atomic(void *) *)&cells[0]);
    return at(fd, request, arg);
}

static void release_bql(int how) {
    if (how == 0) {
        bql = 0;
        ((int (*)(pthread_mutex_t *))cells[1])(NULL);
    } else if (how == 1) {
        ((int (*)(pthread_cond_t *, pthread_mutex_t *))cells[2])(NULL, NULL);
        bql = 0;
    } else {
        bql = 0;
        immediate_exit = 1;
        call_ioctl(VCPU_FD + VCPUS, KVM_RUN, NULL);
    }
}

static void qemu_set(Region *r) {
    if (ended)
        return;
    trace(" QEMU slot %#x gpa %#llx size %#llx hva %#llx flags %u", r->slot, r->guest_phys_addr,
          r->memory_size, r->userspace_addr, r->flags);
    if (call_ioctl(VM_FD, use_region2 ? REGION2 : KVM_SET_USER_MEMORY_REGION, r)) {
        if (!failed)
            say_wrong("slot %#x was refused: %s", r->slot, strerror(errno));
        ended = 1; /* QEMU ends itself */
    }
}

static void qemu_sync(const Region *r) {
    uint64_t map[PAGES / 64] = {0};
    struct kvm_dirty_log log = {.slot = r->slot, .dirty_bitmap = map};

    if (ended || !(r->flags & KVM_MEM_LOG_DIRTY_PAGES))
        return;
    if (call_ioctl(VM_FD, KVM_GET_DIRTY_LOG, &log)) {
        if (!with_rings && !ended)
            say_wrong("the log of slot %#x: %s", r->slot, strerror(errno));
        return;
    }
    pthread_mutex_lock(&kvm);
    for (uint64_t i = 0; i < r->memory_size / PAGE; i++)
        if (bit(map, i))
            now_dirty(block_of(r->userspace_addr), page_of(r->userspace_addr) + i);
    pthread_mutex_unlock(&kvm);
}

static void qemu_clear(const Region *r, uint64_t first, uint64_t count) {
    uint64_t map[PAGES / 64], pages = r->memory_size / PAGE;

    if (ended || !manual || !(r->flags & KVM_MEM_LOG_DIRTY_PAGES))
        return;
    memset(map, 0xff, sizeof map);
    first = first % pages & ~63ull;
    count = (count % pages + 64) & ~63ull;
    if (count > pages - first)
        count = pages - first;
    struct kvm_clear_dirty_log log = {
        .slot = r->slot, .first_page = first, .num_pages = count, .dirty_bitmap = map};
    if (call_ioctl(VM_FD, KVM_CLEAR_DIRTY_LOG, &log) && !with_rings)
        say_wrong("clearing the log of slot %#x: %s", r->slot, strerror(errno));
    pthread_mutex_lock(&kvm);
    for (uint64_t i = first; i < first + count; i++) /* it is sent from now on */
        now_dirty(block_of(r->userspace_addr), page_of(r->userspace_addr) + i);
    pthread_mutex_unlock(&kvm);
}

static Region region_at(int space, int from, int to) {
    const struct at *a = &map[space][from];
    return (Region){.slot = space << 16,
                    .flags = (logging[a->block] ? KVM_MEM_LOG_DIRTY_PAGES : 0) |
                             (a->rom ? KVM_MEM_READONLY : 0),
                    .guest_phys_addr = from * PAGE,
                    .memory_size = (to - from) * PAGE,
                    .userspace_addr = HVA(a->block, a->page)};
}

static int sections(Region *found) {
    int n = 0;
    for (int space = 0; space < SPACES; space++)
        for (int from = 0, to; from < PAGES; from = to) {
            const struct at *a = map[space];
            for (to = from + 1; to < PAGES && a[to].block == a[from].block && a[to].rom == a[from].rom &&
                                (a[from].block < 0 || a[to].page == a[from].page + to - from);)
                to++;
            if (a[from].block >= 0)
                found[n++] = region_at(space, from, to);
        }
    return n;
}

static _Bool same(const Region *a, const Region *b) {
    return same_extent(a, b) && same_memory(a, b) && a->flags == b->flags;
}

static int free_slot(int space) {
    for (int id = 0; id < IDS / 2; id++) {
        _Bool used = 0;
        for (int i = 0; i < IDS; i++)
            used |= believed[i].memory_size && believed[i].slot == (uint32_t)(space << 16 | id);
        if (!used)
            return space << 16 | id;
    }
    return -1;
}

/* What KVM has at a page. */
static struct at kvm_at(int space, int page, uint32_t *flags) {
    for (int id = 0; id < IDS; id++) {
        const Region *r = &held[space][id];
        uint64_t gpa = page * PAGE;
        if (r->memory_size && gpa >= r->guest_phys_addr && gpa < end_of(r)) {
            uint64_t hva = r->userspace_addr + gpa - r->guest_phys_addr;
            *flags = r->flags;
            return (struct at){block_of(hva), page_of(hva), !!(r->flags & KVM_MEM_READONLY)};
        }
    }
    *flags = 0;
    return (struct at){-1, 0, 0};
}

static void check_map(void) {
    static uint64_t at;

    if (ended)
        return;
    pthread_mutex_lock(&kvm);
    for (int s = 0; s < SPACES; s++)
        for (int p = 0; p < PAGES; p++) {
            uint32_t flags;
            struct at a = kvm_at(s, p, &flags), *b = &map[s][p];
            _Bool log = flags & KVM_MEM_LOG_DIRTY_PAGES;
            if (a.block != b->block || (a.block >= 0 && (a.page != b->page || a.rom != b->rom)))
                say_wrong("page %d of space %d: KVM has %d:%d, QEMU wants %d:%d", p, s, a.block, a.page,
                          b->block, b->page);
            else if (a.block >= 0 && log != logging[a.block])
                say_wrong("page %d of space %d: logged %d", p, s, log);
        }
    pthread_mutex_unlock(&kvm);
    pthread_mutex_lock(&lock);
    for (; at < atomic_load(&chan->head); at++) {
        const struct event *e = &chan->ring[at % RING];
        if (e->kind == EV_PARK && e->rc) /* a vCPU ran meanwhile */
            dirty_counts = 0;
    }
    pthread_mutex_unlock(&lock);
    if (!has_set_dirty && atomic_load(&chan->refusal))
        dirty_counts = 0;
}

/* The operations from `believed` to the sections of `map`, as QEMU 7.2 has them. */
static void commit(const struct at before[SPACES][PAGES], uint32_t word) {
    static Region wanted[SPACES * PAGES];
    int n = sections(wanted), nth = 0, slots_of[SPACES] = {0};

    for (int i = 0; i < n; i++)
        slots_of[wanted[i].slot >> 16]++;
    if (slots_of[0] + slots_of[1] > 40) { /* more than this VM has */
        memcpy(map, before, sizeof map);
        return;
    }
    pthread_mutex_lock(&kvm);
    for (int s = 0; s < SPACES; s++)
        for (int p = 0; p < PAGES; p++)
            must[s][p] = before[s][p].block >= 0 && !memcmp(&before[s][p], &map[s][p], sizeof **map);
    pthread_mutex_unlock(&kvm);
    bql = 1;
    for (int i = 0; i < IDS; i++) {
        Region *old = &believed[i];
        _Bool kept = 0;
        for (int j = 0; j < n && old->memory_size; j++)
            kept |= old->slot >> 16 == wanted[j].slot >> 16 && same(old, &wanted[j]);
        if (!old->memory_size || kept)
            continue;
        Region gone = *old;
        if (!with_rings)
            qemu_sync(old);
        gone.memory_size = 0;
        old->memory_size = 0;
        qemu_set(&gone);
        if (++nth == (int)(word >> 28)) { /* other locks come and go */
            ((int (*)(pthread_mutex_t *))cells[1])(NULL);
        }
    }
    for (int j = 0; j < n; j++) {
        _Bool there = 0;
        int i = 0;
        for (int k = 0; k < IDS; k++)
            there |= believed[k].memory_size && believed[k].slot >> 16 == wanted[j].slot >> 16 &&
                     same(&believed[k], &wanted[j]);
        if (there)
            continue;
        wanted[j].slot = free_slot(wanted[j].slot >> 16);
        while (believed[i].memory_size)
            i++;
        Region op = believed[i] = wanted[j];
        qemu_set(&op);
    }
    if (word >> 24 & 1)
        for (int i = 0; i < IDS; i++)
            if (believed[i].memory_size)
                qemu_sync(&believed[i]);
    release_bql((word >> 26) % 3);
    check_map();
    pthread_mutex_lock(&kvm);
    for (int s = 0; s < SPACES; s++)
        for (int p = 0; p < PAGES; p++)
            must[s][p] = map[s][p].block >= 0;
    pthread_mutex_unlock(&kvm);
}

static void set_logging(int block, _Bool on) {
    bql = 1;
    logging[block] = on;
    for (int i = 0; i < IDS; i++) {
        Region *r = &believed[i];
        if (!r->memory_size || block_of(r->userspace_addr) != block)
            continue;
        Region op = *r;
        op.flags = r->flags = (r->flags & ~KVM_MEM_LOG_DIRTY_PAGES) | (on ? KVM_MEM_LOG_DIRTY_PAGES : 0);
        qemu_set(&op);
    }
    pthread_mutex_lock(&kvm);
    if (!on)
        memset(written[block], 0, sizeof written[block]); /* QEMU does not want to know */
    pthread_mutex_unlock(&kvm);
    release_bql(0);
    check_map();
}

/* -- a sequence -------------------------------------------------------------------------------------- */

static _Bool all_seen(void) {
    uint32_t n = atomic_load(&chan->vcpus);
    _Bool seen = n >= VCPUS;
    for (uint32_t i = 0; i < n && seen; i++)
        if (chan->vcpu[i].fd < VCPU_FD + VCPUS)
            seen &= atomic_load(&chan->vcpu[i].inside) ||
                    atomic_load(&chan->vcpu[i].epoch) == atomic_load(&chan->epoch);
    return seen;
}

static pthread_t threads[VCPUS];

static void come_in(void) {
    static const struct timespec a_while = {0, 20000};

    for (int h = 0; h < IMPORTS; h++)
        imports[h].at = &cells[h];
    if (qmp_memlistener_attach())
        say_wrong("it did not come in");
    while (!all_seen()) {
        for (int i = 0; i < VCPUS; i++)
            pthread_kill(threads[i], SIGUSR1);
        nanosleep(&a_while, NULL);
    }
    atomic_store(&chan->armed, 1);
}

/* `asked`: as the agent does it, so that no transaction is opened any more. */
static void go_out(_Bool asked) {
    int left = 0;

    if (asked)
        atomic_store(&chan->want, OFF);
    while (!ended && qmp_memlistener_detach() && ++left < 50)
        ;
    if (left == 50)
        say_wrong("it did not go out");
    if (ended) { /* and QEMU with it */
        atomic_store(&hold_vcpu, 0);
        pthread_mutex_lock(&lock);
        slots.used = pieces.used = queued = 0;
        is_open = mine = 0;
        unpark();
        pthread_mutex_unlock(&lock);
        qmp_memlistener_detach();
        return;
    }
    check_map();
    int n = 0;
    pthread_mutex_lock(&kvm);
    for (int i = 0; i < IDS; i++) {
        const Region *r = &believed[i], *k = &held[r->slot >> 16][r->slot & 0xffff];
        if (r->memory_size && !(k->memory_size && same(r, k)))
            say_wrong("slot %#x is not as QEMU believes", r->slot);
        n += !!r->memory_size;
    }
    for (int s = 0; s < SPACES; s++)
        for (int i = 0; i < IDS; i++)
            n -= !!held[s][i].memory_size;
    pthread_mutex_unlock(&kvm);
    if (n)
        say_wrong("KVM has %d slots more than QEMU", -n);
}

static void begin(uint32_t word) {
    pthread_mutex_lock(&kvm);
    memset(held, 0, sizeof held);
    memset(bits, 0, sizeof bits);
    memset(written, 0, sizeof written);
    memset(known, 0, sizeof known);
    memset(must, 0, sizeof must);
    fail_in = failed = 0;
    ended = watching = 0;
    dirty_counts = 1;
    pthread_mutex_unlock(&kvm);
    memset(believed, 0, sizeof believed);
    memset(logging, 0, sizeof logging);
    atomic_store(&hold_vcpu, 0);
    pthread_mutex_lock(&words);
    wrong[0] = 0;
    pthread_mutex_unlock(&words);
    use_region2 = 0;
    manual = word & 1;
    with_rings = (word >> 1 & 31) == 31;
    has_set_dirty = (word >> 6 & 15) != 15;
    for (int s = 0; s < SPACES; s++)
        for (int p = 0; p < PAGES; p++)
            map[s][p] = p < 200 ? (struct at){0, p, 0} : (struct at){-1, 0, 0};
    memcpy(base, map, sizeof base);
    pthread_mutex_lock(&lock);
    chan->gave_up = 0;
    pthread_mutex_unlock(&lock);
}

static void step(uint32_t word) {
    struct at before[SPACES][PAGES];
    int space = (word >> 4 & 7) == 7, from = (word >> 8) % PAGES, count = 1 + (word >> 16 & 63);

    pthread_mutex_lock(&lock); /* what has gone wrong is known, and promises nothing more */
    _Bool promised = !chan->gave_up && !failed && atomic_load(&chan->mode) > OBSERVE;
    if (atomic_load(&chan->mode) != atomic_load(&chan->want) || atomic_load(&surprise))
        promised = 0;
    pthread_mutex_unlock(&lock);
    pthread_mutex_lock(&kvm);
    watching = promised && has_set_dirty && !use_region2 && !with_rings && !atomic_load(&hold_vcpu);
    pthread_mutex_unlock(&kvm);
    memcpy(before, map, sizeof before);
    switch (word & 15) {
    default: /* another thing is at some pages */
        for (int p = from; p < from + count && p < PAGES; p++)
            switch (word >> 22 & 3) {
            case 0: map[space][p] = (struct at){-1, 0, 0}; break;
            case 1: map[space][p] = (struct at){1, p, 1}; break;
            case 2: map[space][p] = (struct at){2, p, 0}; break;
            case 3: map[space][p] = (struct at){0, p, 0}; break;
            }
        commit(before, word);
        break;
    case 6: /* everything as it began */
    case 7:
        memcpy(map, base, sizeof map);
        commit(before, word);
        break;
    case 8: /* many small holes */
        for (int p = from; p < PAGES; p += 2 + count % 8)
            map[space][p].block = -1, map[space][p].page = 0, map[space][p].rom = 0;
        commit(before, word);
        break;
    case 9:
        set_logging((word >> 4) % BLOCKS, word >> 8 & 3);
        break;
    case 10:
        for (int i = 0; i < IDS; i++)
            if (believed[i].memory_size)
                qemu_sync(&believed[i]);
        break;
    case 11:
        for (int i = 0; i < IDS; i++)
            if (believed[i].memory_size && i % 4 == (int)(word >> 4 & 3))
                qemu_clear(&believed[i], word >> 8 & 255, word >> 16 & 255);
        break;
    case 12:
        atomic_store(&chan->strict, word >> 8 & 1);
        atomic_store(&chan->want, (word >> 4) % 5);
        break;
    case 13: /* KVM refuses one */
        if ((word >> 4 & 3) == 0) {
            pthread_mutex_lock(&kvm);
            fail_in = 1 + (word >> 8 & 7);
            pthread_mutex_unlock(&kvm);
        }
        break;
    case 14: /* a vCPU hangs */
        if ((word >> 4 & 15) == 0)
            atomic_store(&hold_vcpu, 1);
        break;
    case 15:
        if ((word >> 4 & 31) == 0 && !hold_vcpu) {
            use_region2 = 1;
        } else if ((word >> 4 & 3) == 1 && !hold_vcpu && !use_region2 && has_set_dirty) {
            go_out(word >> 9 & 1); /* and in again: what it knew of slots is gone */
            if (!ended)
                come_in();
        }
    }
    pthread_mutex_lock(&lock);
    trace("after %#x: mode %u refusal %u slots %u pieces %u", word, chan->mode, chan->refusal, chan->slots,
          chan->pieces);
    pthread_mutex_unlock(&lock);
}

static void finish(void) {
    for (int b = 0; b < BLOCKS && !has_set_dirty; b++)
        if (logging[b]) /* it would not go */
            set_logging(b, 0);
    atomic_store(&hold_vcpu, 0);
    pthread_mutex_lock(&kvm);
    fail_in = 0;
    pthread_mutex_unlock(&kvm);
    go_out(1);
    if (ended || with_rings)
        return;
    for (int i = 0; i < IDS; i++)
        if (believed[i].memory_size)
            qemu_sync(&believed[i]);
    pthread_mutex_lock(&kvm);
    for (int b = 0; b < BLOCKS; b++)
        for (int p = 0; p < BLOCK_PAGES; p++)
            if (dirty_counts && logging[b] && !failed && written[b][p] > known[b][p]) {
                /* written while QEMU asked: the bit is in a log, and was not asked for since */
                _Bool pending = 0;
                for (int s = 0; s < SPACES; s++)
                    for (int id = 0; id < IDS; id++) {
                        const Region *r = &held[s][id];
                        int i = p - page_of(r->userspace_addr);
                        if (r->memory_size && block_of(r->userspace_addr) == b && i >= 0 &&
                            (uint64_t)i < r->memory_size / PAGE)
                            pending |= bits[s][id][i / 64] >> (i % 64) & 1;
                    }
                if (!pending)
                    say_wrong("page %d of block %d was written, and QEMU does not know", p, b);
            }
    pthread_mutex_unlock(&kvm);
}

static void *vcpu(void *number) {
    while (!atomic_load(&stop_all))
        call_ioctl(VCPU_FD + (int)(intptr_t)number, KVM_RUN, NULL);
    return NULL;
}

static void kicked(int n) {
    (void)n;
    immediate_exit = 1;
}

int main(int argc, char **argv) {
    static uint32_t sequence[4096];
    uint32_t n;
    struct sigaction action = {.sa_handler = kicked};

    traced = argc > 1 && !strcmp(argv[1], "-v");
    sigaction(SIGUSR1, &action, NULL);
    if (!open_channel())
        return 2;
    for (int i = 0; i < VCPUS; i++)
        pthread_create(&threads[i], NULL, vcpu, (void *)(intptr_t)i);
    while (fread(&n, sizeof n, 1, stdin) == 1 && n && n <= 4096 && fread(sequence, sizeof n, n, stdin) == n) {
        begin(sequence[0]);
        struct at nothing[SPACES][PAGES];
        for (int s = 0; s < SPACES; s++)
            for (int p = 0; p < PAGES; p++)
                nothing[s][p] = (struct at){-1, 0, 0};
        if (sequence[0] >> 10 & 1) { /* slots of before */
            commit(nothing, 0);
            come_in();
        } else {
            come_in();
            commit(nothing, 0);
        }
        atomic_store(&chan->strict, sequence[0] >> 11 & 1);
        atomic_store(&chan->want, OBSERVE + (sequence[0] >> 12 & 3));
        if (sequence[0] >> 14 & 1)
            set_logging(0, 1);
        for (uint32_t i = 1; i < n && !ended && !is_wrong(); i++)
            step(sequence[i]);
        if (!is_wrong())
            finish();
        else
            ended = 1, go_out(0);
        if (ended && atomic_load(&chan->hooked))
            go_out(0);
        pthread_mutex_lock(&words);
        printf("%s%s\n", wrong[0] ? "WRONG: " : "ok", wrong);
        pthread_mutex_unlock(&words);
        fflush(stdout);
    }
    atomic_store(&stop_all, 1);
    for (int i = 0; i < VCPUS; i++)
        pthread_join(threads[i], NULL);
    return 0;
}
