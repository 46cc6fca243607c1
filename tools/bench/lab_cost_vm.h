/*
 * The VM of lab_cost.c: memory, slots, vCPUs that run and stand, and what the guest reports.
 *
 * As qmp_memlistener/kvmlab has them: `x86` (state of a vCPU), `programs` (report pages),
 * `host_memory`.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define MAX_VCPUS 16
#define LOOK_NS 50000
#define DEADLINE_NS 20000000000u
#define CPUID_ENTRIES 256
#define TSS 0xfeffd000ul /* where kvmlab/x86.py puts them, and QEMU */
#define IDENTITY_MAP 0xfeffc000ul

/* of a report page: kvmlab/programs.py */
#define COUNT 0x00
#define TABLE 0x20
#define IN_USE 0x28

enum name {
	SIZE, SLOTS, VCPUS, TOUCHED,               /* the shape */
	PRIVATE_GPA, HOME, MOVED, OTHERS, PITCH,   /* where slots lie */
	FIRST, REST, CR3, REPORTS, REPORT_PITCH,   /* programs of the first vCPU and of the others */
	HOME_TABLE, MOVED_TABLE, SCRATCH_TABLE,    /* tables of addresses */
	NAMES
};
static const char *const names[NAMES] = {
	"size", "slots", "vcpus", "touched",
	"private_gpa", "home", "moved", "others", "pitch",
	"first", "rest", "cr3", "reports", "report_pitch",
	"home_table", "moved_table", "scratch_table",
};
static uint64_t value[NAMES];

static int vm;
static char *private_memory, *memory;

struct vcpu {
	int fd;
	struct kvm_run *run;
	pthread_t thread;
	atomic_bool stands;
};
static struct vcpu vcpus[MAX_VCPUS];
static size_t vcpu_count;
static atomic_bool held = true;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

static void fail(const char *what)
{
	fprintf(stderr, "lab_cost: %s: %s\n", what, strerror(errno));
	exit(1);
}

static int check(int result, const char *what)
{
	if (result < 0)
		fail(what);
	return result;
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static char *map(size_t size, int flags, int fd)
{
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);

	if (at == MAP_FAILED)
		fail("mmap");
	return at;
}

/* As the lab's host memory: a memfd, whose pages come when they are touched. */
static char *shared_memory(size_t size)
{
	int fd = check(memfd_create("lab_cost", MFD_CLOEXEC), "memfd_create");
	char *at;

	check(ftruncate(fd, (off_t)size), "ftruncate");
	at = map(size, MAP_SHARED | MAP_NORESERVE, fd);
	close(fd);
	return at;
}

static void set_region(uint32_t slot, uint64_t gpa, uint64_t size, char *host, uint32_t flags)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = (uint64_t)host,
	};

	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
}

static void kicked(int number)
{
	(void)number;
}

static void *run_vcpu(void *argument)
{
	struct vcpu *vcpu = argument;

	for (;;) {
		pthread_mutex_lock(&lock);
		vcpu->run->immediate_exit = 0;
		vcpu->stands = true;
		pthread_cond_broadcast(&changed);
		while (held)
			pthread_cond_wait(&changed, &lock);
		vcpu->stands = false;
		pthread_mutex_unlock(&lock);
		while (!held) {
			if (ioctl(vcpu->fd, KVM_RUN, 0) == 0) {
				fprintf(stderr, "lab_cost: the guest left with exit reason %u\n",
					vcpu->run->exit_reason);
				exit(1);
			}
			if (errno != EINTR)
				fail("KVM_RUN");
		}
	}
	return NULL;
}

static void set_state(int fd, uint64_t rip, uint64_t report)
{
	struct kvm_segment data = { .limit = 0xffffffff, .selector = 16, .type = 3, .present = 1,
				    .db = 1, .s = 1, .g = 1 };
	struct kvm_regs regs = { .rip = rip, .rdi = report, .rflags = 2 };
	struct kvm_sregs sregs;

	check(ioctl(fd, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	sregs.cs = (struct kvm_segment){ .limit = 0xffffffff, .selector = 8, .type = 11,
					 .present = 1, .s = 1, .l = 1, .g = 1 };
	sregs.tr = (struct kvm_segment){ .limit = 0xffff, .type = 11, .present = 1 };
	sregs.ldt = (struct kvm_segment){ .unusable = 1 };
	sregs.cr0 = 0x80010011;
	sregs.cr3 = value[CR3];
	sregs.cr4 = 0x20;
	sregs.efer = 0x500;
	check(ioctl(fd, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	check(ioctl(fd, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static void make_vcpus(int kvm)
{
	int size = check(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	struct kvm_cpuid2 *cpuid =
		calloc(1, sizeof(*cpuid) + CPUID_ENTRIES * sizeof(struct kvm_cpuid_entry2));

	if (!cpuid)
		fail("memory");
	cpuid->nent = CPUID_ENTRIES;
	check(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid), "KVM_GET_SUPPORTED_CPUID");
	vcpu_count = value[VCPUS] ? value[VCPUS] : 1;
	for (size_t i = 0; i < vcpu_count; i++) {
		struct vcpu *vcpu = &vcpus[i];

		vcpu->fd = check(ioctl(vm, KVM_CREATE_VCPU, i), "KVM_CREATE_VCPU");
		vcpu->run = (void *)map((size_t)size, MAP_SHARED, vcpu->fd);
		check(ioctl(vcpu->fd, KVM_SET_CPUID2, cpuid), "KVM_SET_CPUID2");
		set_state(vcpu->fd, i ? value[REST] : value[FIRST],
			  value[REPORTS] + i * value[REPORT_PITCH]);
		errno = pthread_create(&vcpu->thread, NULL, run_vcpu, vcpu);
		if (errno)
			fail("pthread_create");
	}
	free(cpuid);
}

static _Atomic uint64_t *report(size_t vcpu, size_t offset)
{
	return (void *)(private_memory + (value[REPORTS] - value[PRIVATE_GPA]) +
			vcpu * value[REPORT_PITCH] + offset);
}

static void look_again(uint64_t since)
{
	struct timespec pause = { .tv_nsec = LOOK_NS };

	if (now_ns() - since > DEADLINE_NS) {
		errno = ETIMEDOUT;
		fail("the guest does not get on");
	}
	nanosleep(&pause, NULL);
}

static void hold(void)
{
	pthread_mutex_lock(&lock);
	held = true;
	for (size_t i = 0; i < vcpu_count; i++) {
		vcpus[i].run->immediate_exit = 1;
		pthread_kill(vcpus[i].thread, SIGUSR1);
	}
	for (size_t i = 0; i < vcpu_count; i++)
		while (!vcpus[i].stands)
			pthread_cond_wait(&changed, &lock);
	pthread_mutex_unlock(&lock);
}

static void release(void)
{
	uint64_t before[MAX_VCPUS], since = now_ns();

	for (size_t i = 0; i < vcpu_count; i++)
		before[i] = *report(i, COUNT);
	pthread_mutex_lock(&lock);
	held = false;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
	for (size_t i = 0; i < vcpu_count; i++)
		while (*report(i, COUNT) == before[i])
			look_again(since);
}

static void visit(uint64_t table)
{
	uint64_t since = now_ns();

	*report(0, TABLE) = table;
	while (*report(0, IN_USE) != table)
		look_again(since);
}

static void touch(enum name table)
{
	if (!value[TOUCHED])
		return;
	visit(value[table]);
	visit(value[SCRATCH_TABLE]);
}
