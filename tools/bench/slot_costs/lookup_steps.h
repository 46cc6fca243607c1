/* What lookup_array.h and lookup_tree.h share: steps, counted where the caller wants them. */
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Inlined always, so that a caller without counters gets a loop without counting. */
#define INLINE static inline __attribute__((always_inline))

struct steps {
	uint64_t comparisons, read;
};

struct work {
	uint64_t copied, shifted, comparisons, rotations;
};

static void fail(const char *what)
{
	fprintf(stderr, "lookup: %s: %s\n", what, strerror(errno));
	exit(1);
}

INLINE bool holds(uint64_t start, uint64_t end, uint64_t page, struct steps *steps)
{
	if (steps)
		steps->comparisons += page < start ? 1 : 2;
	return page >= start && page < end;
}
