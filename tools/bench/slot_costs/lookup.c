/*
 * Slot look-up and update, timed: the sorted array of KVM up to 5.16, and the trees of today.
 *
 *     lookup SLOTS LOOKUPS UPDATES BLOCKS SEED ascending|random
 *
 * Goes through the same steps as lookup_array.py and lookup_tree.py, in the same order for the same
 * seed, and prints them, so that each checks the other; lookup.py says what is looked up.  Lines:
 *
 *     steps KIND STRUCTURE LOOKUPS COMPARISONS MOST SLOTS_READ SUM_OF_IDS
 *     block KIND STRUCTURE LOOKUPS NS
 *     work LAYOUT add|remove UPDATES BYTES_COPIED BYTES_SHIFTED COMPARISONS ROTATIONS
 *     took LAYOUT add|remove NS
 *
 * Each look-up waits for the one before, as the instruction that needs the slot would.  Memory is
 * kept by the allocator, so that a copy of the set costs what copying costs and no page faults.
 */
#define _GNU_SOURCE
#include <malloc.h>
#include <time.h>

#include "lookup_array.h"
#include "lookup_tree.h"

#define LENGTH 16 /* pages of a slot */
#define PITCH 32  /* pages from one slot to the next in the guest; they touch in the host */
#define RUN 16    /* look-ups in the same slot, kind `cached` */
#define MAX_SLOTS 32764

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* splitmix64 */
static uint64_t draw(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15u;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return z ^ (z >> 31);
}

enum kind { RANDOM, MISS, CACHED, HOST, KINDS };
enum structure { ARRAY, TREE, INTERVALS, STRUCTURES };
static const char *const kind_names[] = { "random", "miss", "cached", "host" };
static const char *const structure_names[] = { "array", "tree", "intervals" };

struct sets {
	struct array array;
	struct tree tree, intervals, host;
};

static bool makes_sense(enum kind kind, enum structure structure)
{
	if (kind == CACHED)
		return structure != INTERVALS;
	return kind != HOST || structure != TREE;
}

static void ask(enum kind kind, uint64_t *pages, size_t count, size_t slots, uint64_t *state)
{
	uint64_t slot = 0;

	for (size_t i = 0; i < count; i++) {
		uint64_t r = draw(state);

		if (kind != CACHED || i % RUN == 0)
			slot = r % slots;
		pages[i] = slot * (kind == HOST ? LENGTH : PITCH) + (r >> 40) % LENGTH +
			   (kind == MISS ? LENGTH : 0);
	}
}

INLINE int find(struct sets *sets, enum kind kind, enum structure structure, uint64_t page,
		struct steps *steps)
{
	if (kind == HOST)
		return structure == ARRAY ? array_scan_host(&sets->array, page, steps)
					  : tree_covering(&sets->host, page, steps);
	if (structure == INTERVALS)
		return tree_covering(&sets->intervals, page, steps);
	if (kind == CACHED)
		return structure == ARRAY ? array_find_cached(&sets->array, page, steps)
					  : tree_find_cached(&sets->tree, page, steps);
	return structure == ARRAY ? array_find(&sets->array, page, steps)
				  : tree_find(&sets->tree, page, steps);
}

static volatile uint64_t zero;

INLINE int64_t block(struct sets *sets, enum kind kind, enum structure structure,
		     const uint64_t *pages, size_t count)
{
	uint64_t none = zero;
	int64_t sum = 0;

	for (size_t i = 0; i < count; i++)
		sum += find(sets, kind, structure, pages[i] + ((uint64_t)sum & none), NULL);
	return sum;
}

/* Every combination as a loop of its own, as a compiler would see it in KVM. */
static int64_t run_block(struct sets *sets, enum kind kind, enum structure structure,
			 const uint64_t *pages, size_t count)
{
	switch (kind * STRUCTURES + structure) {
#define CASE(k, s)                   \
	case (k) * STRUCTURES + (s): \
		return block(sets, k, s, pages, count)
		CASE(RANDOM, ARRAY);
		CASE(RANDOM, TREE);
		CASE(RANDOM, INTERVALS);
		CASE(MISS, ARRAY);
		CASE(MISS, TREE);
		CASE(MISS, INTERVALS);
		CASE(CACHED, ARRAY);
		CASE(CACHED, TREE);
		CASE(HOST, ARRAY);
		CASE(HOST, INTERVALS);
#undef CASE
	}
	return 0;
}

static void print_steps(struct sets *sets, enum kind kind, enum structure structure,
			const uint64_t *pages, size_t count)
{
	struct steps all = { 0 };
	uint64_t most = 0;
	int64_t sum = 0;

	for (size_t i = 0; i < count; i++) {
		struct steps steps = { 0 };

		sum += find(sets, kind, structure, pages[i], &steps);
		all.comparisons += steps.comparisons;
		all.read += steps.read;
		if (steps.comparisons > most)
			most = steps.comparisons;
	}
	printf("steps %s %s %zu %llu %llu %llu %lld\n", kind_names[kind],
	       structure_names[structure], count, (unsigned long long)all.comparisons,
	       (unsigned long long)most, (unsigned long long)all.read, (long long)sum);
}

static void look_up(struct sets *sets, size_t slots, size_t lookups, int blocks, uint64_t seed)
{
	uint64_t *pages = calloc(lookups, sizeof(*pages));
	uint64_t states[KINDS];
	volatile int64_t sink = 0;

	if (!pages)
		fail("memory");
	for (int b = -1; b < blocks; b++) /* the first is counted, the others are timed */
		for (int kind = 0; kind < KINDS; kind++) {
			if (b < 0)
				states[kind] = seed + ((uint64_t)kind << 56);
			ask(kind, pages, lookups, slots, &states[kind]);
			for (int i = 0; i < STRUCTURES; i++) {
				int structure = (i + b + 1) % STRUCTURES;
				size_t count = lookups;
				uint64_t start;

				if (!makes_sense(kind, structure))
					continue;
				sets->array.last_used = 0;
				sets->tree.last_used = &sets->tree.nil;
				if (b < 0) {
					print_steps(sets, kind, structure, pages, count);
					continue;
				}
				if (kind == HOST && structure == ARRAY && count > 32)
					count = 32; /* each reads all slots */
				start = now_ns();
				sink += run_block(sets, kind, structure, pages, count);
				printf("block %s %s %zu %llu\n", kind_names[kind],
				       structure_names[structure], count,
				       (unsigned long long)(now_ns() - start));
			}
		}
	free(pages);
}

static const struct layout layouts[] = {
	{ "array_5_7", 8 + 2 * 512 + 8, 509, 1 },
	{ "array_5_14", 8 + 2 * 32767 + 2 + 8, MAX_SLOTS, 2 },
};

static void print_work(const char *layout, const char *op, size_t updates, const struct work *work)
{
	printf("work %s %s %zu %llu %llu %llu %llu\n", layout, op, updates,
	       (unsigned long long)work->copied, (unsigned long long)work->shifted,
	       (unsigned long long)work->comparisons, (unsigned long long)work->rotations);
}

static void update_array(const struct layout *layout, const struct array *from, const size_t *ids,
			 size_t slots, size_t updates)
{
	struct array array = array_new(layout, slots);
	struct work adds = { 0 }, removes = { 0 };

	for (size_t i = 0; i < slots; i++)
		array_put(&array, i, &from->slots[i]);
	array.used = slots;
	for (size_t i = 0; i < updates; i++) {
		size_t at = slots - 1 - ids[i];
		struct array_slot slot = array.slots[at];
		uint64_t start = now_ns(), between, end;

		array_remove(&array, at, &removes);
		between = now_ns();
		array_add(&array, &slot, &adds);
		end = now_ns();
		printf("took %s remove %llu\ntook %s add %llu\n", layout->name,
		       (unsigned long long)(between - start), layout->name,
		       (unsigned long long)(end - between));
	}
	print_work(layout->name, "remove", updates, &removes);
	print_work(layout->name, "add", updates, &adds);
	free(array.memory);
}

static struct node node_at(size_t id, size_t pitch)
{
	struct node node = { .start = id * pitch, .end = id * pitch + LENGTH, .id = (int16_t)id };

	return node;
}

static struct tree_slot *slot_new(size_t id)
{
	struct tree_slot *slot = malloc(sizeof(*slot));

	if (!slot)
		fail("memory");
	slot->guest[0] = slot->guest[1] = node_at(id, PITCH);
	slot->host[0] = slot->host[1] = node_at(id, LENGTH);
	return slot;
}

static void update_trees(const size_t *order, const size_t *ids, size_t slots, size_t updates)
{
	struct tree guest[2], host[2];
	struct tree_slot **by_id = calloc(slots, sizeof(*by_id));
	struct work adds = { 0 }, removes = { 0 }, built = { 0 };

	if (!by_id)
		fail("memory");
	for (int set = 0; set < 2; set++) {
		tree_init(&guest[set], false);
		tree_init(&host[set], true);
	}
	for (size_t i = 0; i < slots; i++) {
		by_id[order[i]] = slot_new(order[i]);
		for (int set = 0; set < 2; set++) {
			tree_add(&guest[set], &by_id[order[i]]->guest[set], &built);
			tree_add(&host[set], &by_id[order[i]]->host[set], &built);
		}
	}
	for (size_t i = 0; i < updates; i++) {
		struct tree_slot *slot = by_id[ids[i]];
		uint64_t start = now_ns(), between, end;

		for (int set = 0; set < 2; set++) {
			tree_remove(&guest[set], &slot->guest[set], &removes);
			tree_remove(&host[set], &slot->host[set], &removes);
		}
		free(slot);
		between = now_ns();
		slot = slot_new(ids[i]);
		for (int set = 0; set < 2; set++) {
			tree_add(&guest[set], &slot->guest[set], &adds);
			tree_add(&host[set], &slot->host[set], &adds);
		}
		end = now_ns();
		by_id[ids[i]] = slot;
		printf("took tree_5_17 remove %llu\ntook tree_5_17 add %llu\n",
		       (unsigned long long)(between - start), (unsigned long long)(end - between));
	}
	print_work("tree_5_17", "remove", updates, &removes);
	print_work("tree_5_17", "add", updates, &adds);
	for (size_t i = 0; i < slots; i++)
		free(by_id[i]);
	free(by_id);
}

static size_t number(const char *text, size_t least, size_t most)
{
	char *end;
	unsigned long long value;

	errno = 0;
	value = strtoull(text, &end, 10);
	if (errno || *end || value < least || value > most) {
		errno = EINVAL;
		fail(text);
	}
	return (size_t)value;
}

int main(int argc, char **argv)
{
	size_t slots, lookups, updates, blocks, *order, *ids;
	struct node *nodes;
	struct work built = { 0 };
	struct sets sets;
	uint64_t seed, state;

	if (argc != 7) {
		fprintf(stderr, "usage: lookup SLOTS LOOKUPS UPDATES BLOCKS SEED ORDER\n");
		return 2;
	}
	slots = number(argv[1], 1, MAX_SLOTS);
	lookups = number(argv[2], 1, 1 << 20);
	updates = number(argv[3], 0, 1 << 20);
	blocks = number(argv[4], 0, 1 << 20);
	seed = number(argv[5], 0, UINT32_MAX);
	mallopt(M_MMAP_THRESHOLD, 1 << 28);
	mallopt(M_TRIM_THRESHOLD, 1 << 28);

	order = calloc(slots, sizeof(*order));
	ids = calloc(updates + 1, sizeof(*ids));
	nodes = calloc(3 * slots, sizeof(*nodes));
	if (!order || !ids || !nodes)
		fail("memory");
	state = seed + ((uint64_t)KINDS << 56);
	for (size_t i = 0; i < slots; i++)
		order[i] = i;
	if (!strcmp(argv[6], "random"))
		for (size_t i = slots - 1; i > 0; i--) { /* Fisher and Yates */
			size_t j = draw(&state) % (i + 1), other = order[j];

			order[j] = order[i];
			order[i] = other;
		}
	for (size_t i = 0; i < updates; i++)
		ids[i] = draw(&state) % slots;

	sets.array = array_new(&layouts[1], slots);
	sets.array.used = slots;
	tree_init(&sets.tree, false);
	tree_init(&sets.intervals, true);
	tree_init(&sets.host, true);
	for (size_t i = 0; i < slots; i++) {
		size_t id = order[i];
		struct array_slot slot = { .start = id * PITCH,
					   .pages = LENGTH,
					   .host_start = id * LENGTH,
					   .id = (int16_t)id };

		array_put(&sets.array, slots - 1 - id, &slot);
		nodes[3 * i] = nodes[3 * i + 1] = node_at(id, PITCH);
		nodes[3 * i + 2] = node_at(id, LENGTH);
		tree_add(&sets.tree, &nodes[3 * i], &built);
		tree_add(&sets.intervals, &nodes[3 * i + 1], &built);
		tree_add(&sets.host, &nodes[3 * i + 2], &built);
	}
	look_up(&sets, slots, lookups, (int)blocks, seed);
	for (size_t i = 0; i < sizeof(layouts) / sizeof(layouts[0]); i++)
		if (slots <= layouts[i].most_slots)
			update_array(&layouts[i], &sets.array, ids, slots, updates);
	update_trees(order, ids, slots, updates);
	free(sets.array.memory);
	free(nodes);
	free(ids);
	free(order);
	return 0;
}
