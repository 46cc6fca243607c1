/* The sorted array of slots, in the steps of lookup_array.py, which says what it is. */
#include "lookup_steps.h"

struct array_slot {
	uint64_t start, pages;
	void *dirty_bitmap;
	uint64_t arch[6];
	uint64_t host_start;
	uint32_t flags;
	int16_t id;
	uint16_t as_id;
};
_Static_assert(sizeof(struct array_slot) == 88, "as struct kvm_memory_slot of 5.7 to 5.16");

struct layout {
	const char *name;
	size_t header, most_slots;
	int copies_to_remove;
};

/* The header ends with last_used and used; before them are the generation and the id table. */
struct array {
	const struct layout *layout;
	char *memory;
	struct array_slot *slots;
	int16_t *place; /* by id */
	size_t used, last_used;
};

static struct array array_new(const struct layout *layout, size_t room)
{
	struct array array = { .layout = layout };

	array.memory = calloc(1, layout->header + room * sizeof(struct array_slot));
	if (!array.memory)
		fail("memory");
	array.slots = (void *)(array.memory + layout->header);
	array.place = (void *)(array.memory + 8);
	return array;
}

/* A set of its own, installed in place of the old one. */
static void array_copy(struct array *array, size_t room, struct work *work)
{
	size_t bytes = array->layout->header + array->used * sizeof(struct array_slot);
	struct array copy = array_new(array->layout, room);

	memcpy(copy.memory, array->memory, bytes);
	copy.used = array->used;
	copy.last_used = array->last_used;
	free(array->memory);
	*array = copy;
	work->copied += bytes;
}

static void array_put(struct array *array, size_t at, const struct array_slot *slot)
{
	array->slots[at] = *slot;
	array->place[slot->id] = (int16_t)at;
}

static void array_add(struct array *array, const struct array_slot *slot, struct work *work)
{
	size_t at;

	array_copy(array, array->used + 1, work);
	for (at = array->used++; at > 0; at--) {
		work->comparisons++;
		if (slot->start < array->slots[at - 1].start)
			break;
		array_put(array, at, &array->slots[at - 1]);
		work->shifted += sizeof(*slot);
	}
	array_put(array, at, slot);
}

static void array_remove(struct array *array, size_t at, struct work *work)
{
	for (int i = 0; i < array->layout->copies_to_remove; i++)
		array_copy(array, array->used, work);
	array->used--;
	for (; at < array->used; at++) {
		array_put(array, at, &array->slots[at + 1]);
		work->shifted += sizeof(struct array_slot);
	}
	if (array->last_used >= array->used)
		array->last_used = 0;
}

INLINE bool array_holds(const struct array_slot *slot, uint64_t page, struct steps *steps)
{
	if (steps)
		steps->read++;
	return holds(slot->start, slot->start + slot->pages, page, steps);
}

INLINE int array_find(struct array *array, uint64_t page, struct steps *steps)
{
	const struct array_slot *slots = array->slots;
	size_t low = 0, high = array->used;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (steps)
			steps->comparisons++, steps->read++;
		if (page >= slots[middle].start)
			high = middle;
		else
			low = middle + 1;
	}
	if (low == array->used || !array_holds(&slots[low], page, steps))
		return -1;
	array->last_used = low;
	return slots[low].id;
}

INLINE int array_find_cached(struct array *array, uint64_t page, struct steps *steps)
{
	const struct array_slot *last = &array->slots[array->last_used];

	if (array_holds(last, page, steps))
		return last->id;
	return array_find(array, page, steps);
}

/* A host address: any slot may map it, so all are asked, and the lowest of those that do is kept. */
INLINE int array_scan_host(const struct array *array, uint64_t page, struct steps *steps)
{
	int found = -1;

	for (size_t i = 0; i < array->used; i++) {
		const struct array_slot *slot = &array->slots[i];

		if (steps)
			steps->read++;
		if (holds(slot->host_start, slot->host_start + slot->pages, page, steps))
			found = slot->id;
	}
	return found;
}
