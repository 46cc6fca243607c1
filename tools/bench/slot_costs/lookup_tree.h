/* The trees of slots, in the steps of lookup_tree.py, which says what they are. */

struct node {
	struct node *left, *right, *parent;
	uint64_t start, end, subtree_end;
	bool red;
	int16_t id;
};

struct tree {
	struct node nil, *root, *last_used;
	bool ends;
};

/* One of KVM's slots: two nodes by guest frame, two by host address; allocated one by one. */
struct tree_slot {
	struct node guest[2], host[2];
};

static void tree_init(struct tree *tree, bool ends)
{
	memset(tree, 0, sizeof(*tree));
	tree->nil.left = tree->nil.right = tree->nil.parent = tree->root = &tree->nil;
	tree->nil.id = -1;
	tree->last_used = &tree->nil;
	tree->ends = ends;
}

static void replace(struct tree *tree, struct node *old, struct node *new)
{
	if (old->parent == &tree->nil)
		tree->root = new;
	else if (old == old->parent->left)
		old->parent->left = new;
	else
		old->parent->right = new;
	new->parent = old->parent;
}

static void update_end(struct node *node)
{
	uint64_t end = node->end;

	if (node->left->subtree_end > end)
		end = node->left->subtree_end;
	if (node->right->subtree_end > end)
		end = node->right->subtree_end;
	node->subtree_end = end;
}

static void rotate(struct tree *tree, struct node *node, bool left, struct work *work)
{
	struct node *up = left ? node->right : node->left;
	struct node *across = left ? up->left : up->right;

	work->rotations++;
	if (left)
		node->right = across;
	else
		node->left = across;
	if (across != &tree->nil)
		across->parent = node;
	replace(tree, node, up);
	if (left)
		up->left = node;
	else
		up->right = node;
	node->parent = up;
	if (tree->ends) {
		up->subtree_end = node->subtree_end;
		update_end(node);
	}
}

static void tree_add(struct tree *tree, struct node *node, struct work *work)
{
	struct node *parent = &tree->nil, *at = tree->root;

	node->left = node->right = &tree->nil;
	node->subtree_end = node->end;
	node->red = true;
	while (at != &tree->nil) {
		parent = at;
		if (tree->ends && at->subtree_end < node->end)
			at->subtree_end = node->end;
		work->comparisons++;
		at = node->start < at->start ? at->left : at->right;
	}
	node->parent = parent;
	if (parent == &tree->nil)
		tree->root = node;
	else if (node->start < parent->start)
		parent->left = node;
	else
		parent->right = node;

	while (node->parent->red) {
		struct node *grand;
		bool on_left;

		parent = node->parent;
		grand = parent->parent;
		on_left = parent == grand->left;
		at = on_left ? grand->right : grand->left;
		if (at->red) {
			parent->red = at->red = false;
			grand->red = true;
			node = grand;
			continue;
		}
		if (node == (on_left ? parent->right : parent->left)) {
			node = parent;
			rotate(tree, node, on_left, work);
		}
		node->parent->red = false;
		grand->red = true;
		rotate(tree, grand, !on_left, work);
	}
	tree->root->red = false;
}

static void colour_after_remove(struct tree *tree, struct node *node, struct work *work)
{
	while (node != tree->root && !node->red) {
		struct node *parent = node->parent;
		bool on_left = node == parent->left;
		struct node *sibling = on_left ? parent->right : parent->left;
		struct node *near, *far;

		if (sibling->red) {
			sibling->red = false;
			parent->red = true;
			rotate(tree, parent, on_left, work);
			sibling = on_left ? parent->right : parent->left;
		}
		near = on_left ? sibling->left : sibling->right;
		far = on_left ? sibling->right : sibling->left;
		if (!near->red && !far->red) {
			sibling->red = true;
			node = parent;
			continue;
		}
		if (!far->red) {
			near->red = false;
			sibling->red = true;
			rotate(tree, sibling, !on_left, work);
			far = sibling;
			sibling = near;
		}
		sibling->red = parent->red;
		parent->red = false;
		far->red = false;
		rotate(tree, parent, on_left, work);
		node = tree->root;
	}
	node->red = false;
}

static void tree_remove(struct tree *tree, struct node *node, struct work *work)
{
	struct node *nil = &tree->nil, *filler, *changed;
	bool lost_red = node->red;

	if (tree->last_used == node)
		tree->last_used = nil;
	if (node->left == nil || node->right == nil) {
		filler = node->left == nil ? node->right : node->left;
		changed = node->parent;
		replace(tree, node, filler);
	} else {
		struct node *after = node->right;

		while (after->left != nil)
			after = after->left;
		lost_red = after->red;
		filler = after->right;
		if (after->parent == node) {
			changed = filler->parent = after;
		} else {
			changed = after->parent;
			replace(tree, after, filler);
			after->right = node->right;
			after->right->parent = after;
		}
		replace(tree, node, after);
		after->left = node->left;
		after->left->parent = after;
		after->red = node->red;
	}
	for (; tree->ends && changed != nil; changed = changed->parent)
		update_end(changed);
	if (!lost_red)
		colour_after_remove(tree, filler, work);
}

INLINE int tree_find(struct tree *tree, uint64_t page, struct steps *steps)
{
	struct node *node = tree->root;

	while (node != &tree->nil) {
		if (steps)
			steps->read++;
		if (holds(node->start, node->end, page, steps)) {
			tree->last_used = node;
			return node->id;
		}
		node = page < node->start ? node->left : node->right;
	}
	return -1;
}

INLINE int tree_find_cached(struct tree *tree, uint64_t page, struct steps *steps)
{
	struct node *last = tree->last_used;

	if (last != &tree->nil) {
		if (steps)
			steps->read++;
		if (holds(last->start, last->end, page, steps))
			return last->id;
	}
	return tree_find(tree, page, steps);
}

INLINE int tree_covering(const struct tree *tree, uint64_t page, struct steps *steps)
{
	const struct node *nil = &tree->nil, *node = tree->root;

	if (node == nil)
		return -1;
	if (steps)
		steps->read++, steps->comparisons++;
	if (page >= node->subtree_end)
		return -1;
	for (;;) {
		const struct node *left = node->left;

		if (left != nil) {
			if (steps)
				steps->read++, steps->comparisons++;
			if (page < left->subtree_end) {
				node = left;
				continue;
			}
		}
		if (holds(node->start, node->end, page, steps))
			return node->id;
		if (page < node->start || node->right == nil)
			return -1;
		node = node->right;
		if (steps)
			steps->read++, steps->comparisons++;
		if (page >= node->subtree_end)
			return -1;
	}
}
