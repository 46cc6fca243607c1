/*
 * The pulse of a Linux guest: every CPU beats in memory that the host maps as well.
 *
 *     pulse-beat RESOURCE PERIOD
 *
 * RESOURCE is resource2 of an ivshmem-plain device in sysfs, at least 4 MiB.  It is written as the
 * bare-metal pulse guest writes its RAM (vm-images/pulse/README.md), so the host reads both alike.
 * PERIOD is the microseconds between two beats; 0 beats without a pause.  README.md says what either
 * sees.  The program beats until it gets SIGTERM.
 *
 * One process a CPU, bound to it.  With a period it runs at a real-time priority, so that nothing
 * but the kernel itself comes between two beats; without one it takes only the time that nobody else
 * wants (SCHED_IDLE), and gaps in which the guest's scheduler took it off the CPU are not noted.
 *
 * No C library: it runs wherever the kernel does, and any compiler for x86-64 builds it.  The layout
 * comes from ../pulse/layout.inc, which build.py turns into macros.
 */

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;

enum { SYS_open = 2, SYS_mmap = 9, SYS_rt_sigprocmask = 14, SYS_nanosleep = 35, SYS_fork = 57,
       SYS_exit = 60, SYS_wait4 = 61, SYS_kill = 62, SYS_getrusage = 98, SYS_rt_sigtimedwait = 128,
       SYS_sched_setscheduler = 144, SYS_mlockall = 151, SYS_prctl = 157, SYS_write = 1,
       SYS_sched_setaffinity = 203, SYS_sched_getaffinity = 204, SYS_clock_gettime = 228 };

enum { O_RDWR = 2, PROT_READ_WRITE = 3, MAP_SHARED = 1, SIG_BLOCK = 0, SIGKILL = 9, SIGTERM = 15,
       SIGCHLD = 17, SCHED_FIFO = 1, SCHED_IDLE = 5, MCL_CURRENT_FUTURE = 3, PR_SET_PDEATHSIG = 1,
       RUSAGE_THREAD = 1, WNOHANG = 1, CLOCK_MONOTONIC = 1 };

enum { FIFO_PRIORITY = 90, RUSAGE_WORDS = 18, RUSAGE_NVCSW = 16, RUSAGE_NIVCSW = 17,
       MASK_WORDS = 16 };

struct timespec { long seconds, ns; };

static long call(long number, long a, long b, long c, long d)
{
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = 0;
    register long r9 __asm__("r9") = 0;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

static long map_shared(long fd)
{
    long result;
    register long r10 __asm__("r10") = MAP_SHARED;
    register long r8 __asm__("r8") = fd;
    register long r9 __asm__("r9") = 0;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(SYS_mmap), "D"(0), "S"(RAM_NEEDED), "d"(PROT_READ_WRITE), "r"(r10),
                       "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

static void __attribute__((noreturn)) leave(const char *why)
{
    u64 length = 0;
    while (why[length])
        length++;
    call(SYS_write, 2, (long)why, length, 0);
    call(SYS_exit, 1, 0, 0, 0);
    __builtin_unreachable();
}

static u64 rdtsc(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high)::"memory");
    return (u64)high << 32 | low;
}

/* The shared memory.  Every store is of one aligned word, in the order of the program. */
static volatile u8 *memory;
#define U32(at) (*(volatile u32 *)(memory + (at)))
#define U64(at) (*(volatile u64 *)(memory + (at)))

static u64 cpu_word(u32 cpu)
{
    return HEADER + H_CPU + 8 * (u64)cpu;
}

static u64 block_of(u32 cpu)
{
    return BLOCKS + (u64)cpu * BLOCK_SIZE;
}

static void clear_page(u64 at)
{
    for (u64 i = 0; i < 0x1000; i += 8)
        U64(at + i) = 0;
}

/* New statistics; counts a generation in the CPU's word. */
static u64 reset_statistics(u32 cpu, u64 threshold)
{
    u64 block = block_of(cpu), now;
    U64(block + HB_GAPS) = 0;
    U64(block + HB_MAX_GAP) = 0;
    U64(block + HB_MAX_GAP_TSC) = 0;
    U64(block + HB_BAR) = 0;
    U64(block + HB_THRESHOLD) = threshold;
    now = rdtsc();
    U64(block + HB_RESET_TSC) = now;
    U64(cpu_word(cpu)) = (U64(cpu_word(cpu)) | CPU_ALIVE) + (1UL << 32);
    return now;
}

/* The ring entry is complete before HB_GAPS counts it. */
static void note_gap(u64 block, u64 end, u64 ticks)
{
    u64 threshold = U64(block + HB_THRESHOLD), largest = U64(block + HB_MAX_GAP);
    if (ticks > largest) {
        U64(block + HB_MAX_GAP_TSC) = end;
        U64(block + HB_MAX_GAP) = largest = ticks;
    }
    if (ticks > threshold) {
        u64 number = U64(block + HB_GAPS);
        u64 entry = block + GAP_RING + 32 * (number % GAP_ENTRIES);
        U64(entry) = end;
        U64(entry + 8) = ticks;
        U64(entry + 16) = U64(block + HB_COUNT);
        U64(entry + 24) = number + 1;
        U64(block + HB_GAPS) = number + 1;
    }
    U64(block + HB_BAR) = largest < threshold ? largest : threshold;
}

/* How often the guest's scheduler took this process off its CPU. */
static u64 switches(void)
{
    u64 usage[RUSAGE_WORDS];
    call(SYS_getrusage, RUSAGE_THREAD, (long)usage, 0, 0);
    return usage[RUSAGE_NVCSW] + usage[RUSAGE_NIVCSW];
}

/* The mailbox: nothing and new statistics are all it knows.  Returns whether CPU 0's began anew. */
static int obey(u32 answered)
{
    u64 block = block_of(0), cpu = U64(block + MB_ARG0), threshold = U64(block + MB_ARG1);
    u32 command = U32(block + MB_COMMAND), status = STATUS_OK, own = 0;
    U64(block + MB_BEGIN_TSC) = rdtsc();
    if (command == CMD_RESET) {
        if (cpu >= U32(HEADER + H_LIVE)) {
            status = STATUS_NO_DEVICE;
        } else if (cpu == 0) {
            own = 1;
            reset_statistics(0, threshold);
        } else if (U64(block_of(cpu) + HB_REQUEST) != REQUEST_NONE) {
            status = STATUS_BUSY;
        } else {
            U64(block_of(cpu) + HB_ARGUMENT) = threshold;
            U64(block_of(cpu) + HB_REQUEST) = REQUEST_RESET;
        }
    } else if (command != CMD_NOP) {
        status = STATUS_UNKNOWN;
    }
    U64(block + MB_RESULT) = 0;
    U64(block + MB_END_TSC) = rdtsc();
    U32(block + MB_STATUS) = status;
    U32(block + MB_ACK) = answered;
    return own;
}

/* CPU number `cpu` of ours, which is number `bound` in the kernel. */
static void __attribute__((noreturn)) beat(u32 cpu, u32 bound, u64 period, u64 threshold)
{
    struct timespec pause = { 0, (long)period * 1000 };
    u64 mask[MASK_WORDS] = { 0 }, block = block_of(cpu), watched = 0, last, seen;
    u32 sequence = 0;
    int priority = period ? FIFO_PRIORITY : 0;

    mask[bound / 64] = 1UL << bound % 64;
    if (call(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0) < 0
        || call(SYS_sched_setaffinity, 0, sizeof mask, (long)mask, 0) < 0
        || call(SYS_sched_setscheduler, 0, period ? SCHED_FIFO : SCHED_IDLE, (long)&priority, 0) < 0
        || call(SYS_mlockall, MCL_CURRENT_FUTURE, 0, 0, 0) < 0)
        leave("pulse-beat: a CPU cannot be taken\n");
    clear_page(block);
    clear_page(block + MAILBOX);
    U64(cpu_word(cpu)) = 0;
    last = reset_statistics(cpu, threshold);
    seen = switches();
    __sync_fetch_and_add((volatile u32 *)(memory + HEADER + H_LIVE), 1);
    for (;;) {
        u64 now, gap;
        if (period)
            call(SYS_nanosleep, (long)&pause, 0, 0, 0);
        now = rdtsc();
        gap = now - last;
        last = now;
        U64(block + HB_LAST_TSC) = now;
        U64(block + HB_COUNT)++;
        if (period && gap > U64(block + HB_BAR) && (long)gap > 0)
            note_gap(block, now, gap);
        if (!period && gap > watched && (long)gap > 0) {
            /* Even a short absence must be known, or the next gap would be taken for one. */
            u64 ever = switches();
            if (ever == seen) {
                note_gap(block, now, gap);
            } else {
                seen = ever;
                last = rdtsc();
            }
            watched = U64(block + HB_THRESHOLD) / 32;
        }
        if (cpu == 0 && U32(block + MB_SEQ) != sequence) {
            sequence = U32(block + MB_SEQ);
            if (obey(sequence))
                last = U64(block + HB_RESET_TSC);
        }
        if (cpu != 0 && U64(block + HB_REQUEST) == REQUEST_RESET) {
            last = reset_statistics(cpu, U64(block + HB_ARGUMENT));
            U64(block + HB_REQUEST) = REQUEST_NONE;
        }
    }
}

/* TSC ticks in a microsecond, measured over 20 ms. */
static u64 ticks_per_us(void)
{
    struct timespec pause = { 0, 20000000 }, begin, end;
    u64 tsc, ticks, ns;
    call(SYS_clock_gettime, CLOCK_MONOTONIC, (long)&begin, 0, 0);
    tsc = rdtsc();
    call(SYS_nanosleep, (long)&pause, 0, 0, 0);
    call(SYS_clock_gettime, CLOCK_MONOTONIC, (long)&end, 0, 0);
    ticks = rdtsc() - tsc;
    ns = (u64)(end.seconds - begin.seconds) * 1000000000 + (u64)(end.ns - begin.ns);
    return ticks / (ns / 1000);
}

static u64 number_of(const char *text)
{
    u64 value = 0;
    for (; *text; text++) {
        if (*text < '0' || *text > '9' || value > 100000)
            leave("pulse-beat: the period is not a number of microseconds below 1000000\n");
        value = value * 10 + (u64)(*text - '0');
    }
    return value;
}

/* A new page; `boots` counts on when there was one before. */
static void write_header(u32 cpus)
{
    static const char magic[8] = "QMPPULSE";
    u64 name = *(const u64 *)magic, boots = 0;
    if (U64(HEADER + H_MAGIC) == name)
        boots = U32(HEADER + H_BOOTS);
    clear_page(HEADER);
    U32(HEADER + H_BOOTS) = (u32)boots + 1;
    U32(HEADER + H_VERSION) = LAYOUT_VERSION;
    U32(HEADER + H_STATE) = STATE_BOOTING;
    U32(HEADER + H_EXPECTED) = cpus;
    U64(HEADER + H_ENTRY_TSC) = rdtsc();
    U64(HEADER + H_MAGIC) = name;
}

static __attribute__((noreturn, used)) void begin(const long *stack)
{
    char *const *argument = (char *const *)(stack + 1);
    u64 mask[MASK_WORDS] = { 0 }, period, threshold, signals;
    u32 bound[MAX_CPUS], cpus = 0;
    long child[MAX_CPUS], fd, ended;

    if (stack[0] != 3)
        leave("usage: pulse-beat RESOURCE PERIOD\n");
    period = number_of(argument[2]);
    fd = call(SYS_open, (long)argument[1], O_RDWR, 0, 0);
    if (fd < 0)
        leave("pulse-beat: the device cannot be opened\n");
    memory = (volatile u8 *)map_shared(fd);
    if ((u64)memory > -4096UL)
        leave("pulse-beat: the device cannot be mapped; is its memory smaller than 4 MiB?\n");
    if (call(SYS_sched_getaffinity, 0, sizeof mask, (long)mask, 0) < 0)
        leave("pulse-beat: the CPUs are not known\n");
    for (u32 i = 0; i < 64 * MASK_WORDS && cpus < MAX_CPUS; i++)
        if (mask[i / 64] >> i % 64 & 1)
            bound[cpus++] = i;
    threshold = DEFAULT_THRESHOLD + period * ticks_per_us();

    signals = 1UL << (SIGTERM - 1) | 1UL << (SIGCHLD - 1);
    call(SYS_rt_sigprocmask, SIG_BLOCK, (long)&signals, 0, sizeof signals);
    write_header(cpus);
    for (u32 i = 0; i < cpus; i++) {
        child[i] = call(SYS_fork, 0, 0, 0, 0);
        if (child[i] == 0)
            beat(i, bound[i], period, threshold);
    }
    while (U32(HEADER + H_LIVE) < cpus) {
        struct timespec soon = { 0, 1000000 };
        if (call(SYS_wait4, -1, 0, WNOHANG, 0) != 0)
            goto end;
        call(SYS_nanosleep, (long)&soon, 0, 0, 0);
    }
    U64(HEADER + H_READY_TSC) = rdtsc();
    U32(HEADER + H_STATE) = STATE_READY;
    do
        ended = call(SYS_rt_sigtimedwait, (long)&signals, 0, 0, sizeof signals);
    while (ended < 0);
end:
    /* The host must not take what lies there for a guest that beats. */
    U32(HEADER + H_STATE) = STATE_BOOTING;
    for (u32 i = 0; i < cpus; i++) {
        call(SYS_kill, child[i], SIGKILL, 0, 0);
        call(SYS_wait4, child[i], 0, 0, 0);
        U64(cpu_word(i)) &= ~(u64)CPU_ALIVE;
    }
    call(SYS_exit, 0, 0, 0, 0);
    __builtin_unreachable();
}

__asm__(".globl _start\n_start:\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall begin\n");
