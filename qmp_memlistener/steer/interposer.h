/* The channel between the interposer (in QEMU) and the agent: one shared memory, a memfd of QEMU's
 * named CHANNEL_NAME that the agent opens as /proc/PID/fd/N.  channel.py reads the same layout; a
 * test compares the offsets.
 *
 * Written by the agent: `want`, `strict`, `armed`.  Everything else is written by the interposer
 * alone.  Times are nanoseconds of CLOCK_MONOTONIC, addresses and sizes are bytes.
 */
#ifndef QMP_MEMLISTENER_INTERPOSER_H
#define QMP_MEMLISTENER_INTERPOSER_H

#include <stdatomic.h>
#include <stdint.h>

#define CHANNEL_NAME "qmp-memlistener-steer"
#define CHANNEL_MAGIC 0x6c6d7132u /* "2qml": changes with the layout */
#define RING 16384u               /* a power of two */
#define MAX_VCPUS 1024u

/* OFF while it is hooked: no transaction is opened, so that it can be taken out. */
enum mode { OFF, OBSERVE, PAUSE, INHIBIT, HOLE };

/* Why the mode is OBSERVE although the agent wants more; 0 when nothing is wrong. */
enum refusal {
    NONE,
    NOT_STOPPED,   /* a vCPU did not leave KVM_RUN within PARK_NS */
    TOO_MANY,      /* slots, operations of one transition, or vCPUs: more than there is room for */
    NO_SAVE,       /* dirty logging is on, and this QEMU does not export where its bits are kept */
    KVM_REFUSED,   /* KVM refused an operation of ours; QEMU's own slots were put back */
    REGION2_USED,  /* KVM_SET_USER_MEMORY_REGION2: not understood here */
    DIRTY_RINGS,   /* they carry ids of slots: no hole */
    NO_MEMORY,     /* no memory for a bitmap: all of its pages counted as dirty */
    NOT_READY,     /* not armed, or no such mode */
    HELD,          /* a vCPU was kept out of KVM_RUN for RUN_NS, and then let in */
};

/* What attach and detach return. */
enum answer { DONE, NO_CHANNEL, NO_QEMU, NO_IMPORTS, NO_GOT, BUSY };

enum kind {
    EV_QEMU = 1,    /* an operation as QEMU asked for it; rc is what QEMU was given */
    EV_KVM,         /* an operation that KVM was given; extra: pages that a delete
                     * took away, 0: not known */
    EV_PARK,        /* vCPUs kept out of KVM_RUN; extra: how many had to be stopped */
    EV_TRANSACTION, /* from its first delete to the release of the BQL; rc: operations of QEMU's */
    EV_MODE,        /* rc: the mode from now on; extra: enum refusal */
    EV_SAVED,       /* dirty bits of a slot handed to QEMU; extra: their number */
};

struct event {
    _Atomic uint64_t seq; /* its number + 1, written last; 0 while it is written */
    uint64_t begin_ns, end_ns;
    uint64_t gpa, size, hva;
    uint32_t tid, kind, slot, flags; /* slot: the address space in bits 16 and up */
    int32_t rc;                      /* 0, or -errno */
    uint32_t extra;
};

struct vcpu {
    _Atomic uint32_t inside; /* in KVM_RUN */
    uint32_t tid, fd;
    _Atomic uint32_t epoch; /* of the last attach that this thread has come by since */
    uint64_t runs;
} __attribute__((aligned(64)));

struct channel {
    uint32_t magic, size;
    /* the agent writes these three */
    _Atomic uint32_t want, strict, armed;
    /* the rest is the interposer's */
    _Atomic uint32_t mode, hooked, parked, vcpus, refusal;
    uint32_t slots, pieces; /* what QEMU believes, what KVM has */
    _Atomic uint32_t answers, answer; /* of attach and detach: how many, and the last one */
    _Atomic uint32_t epoch, pad;      /* the number of this attach */
    uint64_t transactions, parks, park_ns, park_max_ns, splits, kept, gave_up, translated, saved;
    uint64_t answered_ns; /* the last answer */
    struct vcpu vcpu[MAX_VCPUS];
    _Atomic uint64_t head __attribute__((aligned(64))); /* the number of the next event */
    struct event ring[RING];
};

#endif
