/*
 * The lab's slot operations in C, beside which its Python is measured: same VM, same guest, same
 * cycle as tools/bench/slot_costs/vm.py.
 *
 *     lab_cost IMAGE NAME=NUMBER...
 *
 * IMAGE is the private slot as the lab lays it out: the guest's programs, report pages, tables of
 * addresses, page tables.  The numbers (all of `names` in lab_cost_vm.h) say where these are.  Then a
 * line of standard input at a time:
 *
 *     cycles COUNT      let the vCPUs run, go through so many cycles, stop them
 *
 * and after each a line `OP NS NS ...` an operation, `logged PAGES`, `done`.  At the end of the
 * input it ends.  Whatever goes wrong ends it with a line on standard error and exit code 1.
 */
#define _GNU_SOURCE
#include "lab_cost_vm.h"

#define MAX_CYCLES 100000

enum op { ADD, SAME, PUNCH, FILL, LOG_ON, LOG_OFF, MOVE, DELETE, OPS };
static const char *const ops[OPS] = {
	"add", "same", "punch", "fill", "log_on", "log_off", "move", "delete",
};
static uint64_t *took[OPS];
static size_t taken;

static void timed_region(enum op op, uint64_t gpa, uint64_t size, uint32_t flags)
{
	uint64_t start = now_ns();

	set_region(1, gpa, size, memory, flags);
	took[op][taken] = now_ns() - start;
}

static void timed_protect(enum op op, int protection)
{
	uint64_t start = now_ns();

	check(mprotect(memory, PAGE, protection), "mprotect");
	took[op][taken] = now_ns() - start;
}

static int logged_pages(void)
{
	uint64_t bytes = (value[SIZE] / PAGE + 63) / 64 * 8;
	uint64_t *bitmap = calloc(1, bytes);
	struct kvm_dirty_log log = { .slot = 1, .dirty_bitmap = bitmap };
	int pages;

	if (!bitmap)
		fail("memory");
	check(ioctl(vm, KVM_GET_DIRTY_LOG, &log), "KVM_GET_DIRTY_LOG");
	pages = __builtin_popcountll(bitmap[0] & ((1ull << value[TOUCHED]) - 1));
	free(bitmap);
	return pages;
}

static int cycle(bool fetch_log)
{
	uint64_t home = value[HOME], size = value[SIZE];
	int logged = 0;

	timed_region(ADD, home, size, 0);
	timed_region(SAME, home, size, 0);
	touch(HOME_TABLE);
	timed_protect(PUNCH, PROT_NONE);
	timed_protect(FILL, PROT_READ | PROT_WRITE);
	touch(HOME_TABLE);
	timed_region(LOG_ON, home, size, KVM_MEM_LOG_DIRTY_PAGES);
	touch(HOME_TABLE);
	if (fetch_log)
		logged = logged_pages();
	timed_region(LOG_OFF, home, size, 0);
	touch(HOME_TABLE);
	timed_region(MOVE, value[MOVED], size, 0);
	touch(MOVED_TABLE);
	timed_region(DELETE, value[MOVED], 0, 0);
	taken++;
	return logged;
}

static void cycles(size_t count)
{
	int logged = 0;

	taken = 0;
	if (value[VCPUS])
		release();
	for (size_t i = 0; i < count; i++)
		logged = cycle(i == count - 1);
	if (value[VCPUS])
		hold();
	for (int op = 0; op < OPS; op++) {
		printf("%s", ops[op]);
		for (size_t i = 0; i < taken; i++)
			printf(" %llu", (unsigned long long)took[op][i]);
		printf("\n");
	}
	printf("logged %d\ndone\n", logged);
	fflush(stdout);
}

/* As in cost_vm.py: the first CPU that we may use is for us alone, the others for vCPUs. */
static void split_cpus(cpu_set_t *own, cpu_set_t *rest)
{
	int first = 0;

	check(sched_getaffinity(0, sizeof(*rest), rest), "sched_getaffinity");
	*own = *rest;
	if (CPU_COUNT(rest) == 1)
		return;
	while (!CPU_ISSET(first, rest))
		first++;
	CPU_ZERO(own);
	CPU_SET(first, own);
	CPU_CLR(first, rest);
}

static uint64_t number(const char *text)
{
	char *end;
	uint64_t found;

	errno = 0;
	found = strtoull(text, &end, 0);
	if (errno || end == text || *end) {
		errno = EINVAL;
		fail(text);
	}
	return found;
}

static void read_numbers(int count, char **arguments)
{
	bool given[NAMES] = { false };

	for (int i = 0; i < count; i++) {
		char *equals = strchr(arguments[i], '=');
		int name = 0;

		errno = EINVAL;
		if (!equals)
			fail(arguments[i]);
		*equals = 0;
		while (name < NAMES && strcmp(names[name], arguments[i]))
			name++;
		if (name == NAMES)
			fail(arguments[i]);
		value[name] = number(equals + 1);
		given[name] = true;
	}
	for (int name = 0; name < NAMES; name++)
		if (!given[name]) {
			errno = EINVAL;
			fail(names[name]);
		}
	if (value[VCPUS] > MAX_VCPUS || value[SLOTS] < 2 || value[TOUCHED] > 63) {
		errno = ERANGE;
		fail("shape");
	}
}

static void load_private(const char *path)
{
	int fd = check(open(path, O_RDONLY | O_CLOEXEC), path);
	off_t size = lseek(fd, 0, SEEK_END);

	private_memory = shared_memory((size_t)size);
	if (pread(fd, private_memory, (size_t)size, 0) != size)
		fail(path);
	close(fd);
	set_region(0, value[PRIVATE_GPA], (uint64_t)size, private_memory, 0);
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = kicked };
	uint64_t others, identity_map = IDENTITY_MAP;
	char *other_memory, line[64];
	cpu_set_t own, rest;
	int kvm;

	if (argc < 2) {
		fprintf(stderr, "usage: lab_cost IMAGE NAME=NUMBER...\n");
		return 2;
	}
	read_numbers(argc - 2, argv + 2);
	sigaction(SIGUSR1, &action, NULL);
	kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	vm = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	check(ioctl(vm, KVM_SET_TSS_ADDR, TSS), "KVM_SET_TSS_ADDR");
	check(ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map), "KVM_SET_IDENTITY_MAP_ADDR");
	load_private(argv[1]);
	memory = shared_memory(value[SIZE]);
	memory[0] = 0;
	others = value[SLOTS] - 2;
	other_memory = others ? shared_memory(others * PAGE) : NULL;
	for (uint64_t i = 0; i < others; i++)
		set_region((uint32_t)(2 + i), value[OTHERS] + i * value[PITCH], PAGE,
			   other_memory + i * PAGE, 0);
	split_cpus(&own, &rest);
	check(sched_setaffinity(0, sizeof(rest), &rest), "sched_setaffinity");
	make_vcpus(kvm);
	check(sched_setaffinity(0, sizeof(own), &own), "sched_setaffinity");
	for (int op = 0; op < OPS; op++) {
		took[op] = calloc(MAX_CYCLES, sizeof(*took[op]));
		if (!took[op])
			fail("memory");
	}
	while (fgets(line, sizeof(line), stdin)) {
		uint64_t count;

		line[strcspn(line, "\n")] = 0;
		if (strncmp(line, "cycles ", 7)) {
			errno = EINVAL;
			fail(line);
		}
		count = number(line + 7);
		if (count > MAX_CYCLES) {
			errno = ERANGE;
			fail(line);
		}
		cycles(count);
	}
	return 0;
}
