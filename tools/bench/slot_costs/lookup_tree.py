"""The trees in which KVM has kept its slots since Linux 5.17, counted.  Pure.

Since commit a54d806688fe there is a red-black tree by guest frame, `gfn_tree`, and since commit
ed922739c919 an interval tree by host address, `hva_tree`.  Each is there twice, because one set is
changed while vCPUs read the other.  Here is the shape, not Linux' code: the red-black tree is that
of Cormen et al., Introduction to Algorithms, chapter 13, and with the ends of its subtrees (14.3)
it is an interval tree.
"""

from __future__ import annotations

from collections.abc import Iterable

from .lookup_steps import Found, Interval, UpdateWork, holds

__all__ = ["SlotTree"]


class _Node:
    __slots__ = ("left", "parent", "red", "right", "slot", "subtree_end")

    left: _Node
    right: _Node
    parent: _Node

    def __init__(self, slot: Interval) -> None:
        self.slot = slot
        self.subtree_end = slot.end
        self.red = True


class SlotTree:
    """A red-black tree of slots by start; with `ends`, an interval tree.

    `find` is the search of `gfn_tree` and needs slots that do not overlap.  `covering` is that of
    an interval tree and needs `ends`; of several slots that cover a page it finds the one that
    starts lowest.
    """

    def __init__(self, slots: Iterable[Interval] = (), *, ends: bool = False) -> None:
        """Slots are added one by one, so the shape depends on their order."""
        nil = _Node(Interval(0, 0, -1))
        nil.left = nil.right = nil.parent = nil
        nil.red = False
        self._nil = nil
        self._root = nil
        self._ends = ends
        self._rotations = 0
        self._last_used: Interval | None = None
        for slot in slots:
            self.add(slot)

    def forget(self) -> None:
        """As if nothing had been found yet."""
        self._last_used = None

    def find(self, page: int) -> Found:
        """Down the tree until a slot holds the page."""
        nil = self._nil
        node = self._root
        comparisons = slots_read = 0
        while node is not nil:
            slots_read += 1
            held, compared = holds(node.slot, page)
            comparisons += compared
            if held:
                self._last_used = node.slot
                return Found(node.slot.slot, comparisons, slots_read)
            node = node.left if compared == 1 else node.right
        return Found(None, comparisons, slots_read)

    def find_cached(self, page: int) -> Found:
        """First the slot that was found last; a miss leaves that as it was."""
        last = self._last_used
        if last is None:
            return self.find(page)
        held, compared = holds(last, page)
        if held:
            return Found(last.slot, compared, 1)
        found = self.find(page)
        return Found(found.slot, compared + found.comparisons, 1 + found.slots_read)

    def covering(self, page: int) -> Found:
        """Left where a slot there ends behind the page, else this one, else right."""
        nil = self._nil
        node = self._root
        if node is nil:
            return Found(None, 0, 0)
        comparisons = slots_read = 1
        if page >= node.subtree_end:
            return Found(None, comparisons, slots_read)
        while True:
            left = node.left
            if left is not nil:
                comparisons += 1
                slots_read += 1
                if page < left.subtree_end:
                    node = left
                    continue
            held, compared = holds(node.slot, page)
            comparisons += compared
            if held:
                return Found(node.slot.slot, comparisons, slots_read)
            node = node.right
            if compared == 1 or node is nil:  # all on the right start even later
                return Found(None, comparisons, slots_read)
            comparisons += 1
            slots_read += 1
            if page >= node.subtree_end:
                return Found(None, comparisons, slots_read)

    def add(self, slot: Interval) -> UpdateWork:
        """Hang it in as a leaf, then restore the colours."""
        nil = self._nil
        node = _Node(slot)
        node.left = node.right = nil
        parent, at = nil, self._root
        comparisons = 0
        while at is not nil:
            parent = at
            if self._ends and at.subtree_end < slot.end:
                at.subtree_end = slot.end
            comparisons += 1
            at = at.left if slot.start < at.slot.start else at.right
        node.parent = parent
        if parent is nil:
            self._root = node
        elif slot.start < parent.slot.start:
            parent.left = node
        else:
            parent.right = node
        before = self._rotations
        self._colour_after_add(node)
        return UpdateWork(comparisons=comparisons, rotations=self._rotations - before)

    def remove(self, slot: Interval) -> UpdateWork:
        """Take it out and restore the colours; KVM has the node at hand, so nothing is compared."""
        nil = self._nil
        node = self._node(slot)
        if self._last_used == slot:
            self._last_used = None
        lost_red = node.red
        if node.left is nil:
            filler, changed = node.right, node.parent
            self._replace(node, node.right)
        elif node.right is nil:
            filler, changed = node.left, node.parent
            self._replace(node, node.left)
        else:
            after = node.right
            while after.left is not nil:
                after = after.left
            lost_red, filler = after.red, after.right
            if after.parent is node:
                changed = filler.parent = after
            else:
                changed = after.parent
                self._replace(after, after.right)
                after.right = node.right
                after.right.parent = after
            self._replace(node, after)
            after.left = node.left
            after.left.parent = after
            after.red = node.red
        while self._ends and changed is not nil:
            self._update_end(changed)
            changed = changed.parent
        before = self._rotations
        if not lost_red:
            self._colour_after_remove(filler)
        return UpdateWork(rotations=self._rotations - before)

    def _node(self, slot: Interval) -> _Node:
        node = self._root
        while node is not self._nil and node.slot != slot:
            node = node.left if slot.start < node.slot.start else node.right
        if node is self._nil:
            raise KeyError(slot)
        return node

    def _replace(self, old: _Node, new: _Node) -> None:
        """`new`, with what is below it, where `old` was."""
        if old.parent is self._nil:
            self._root = new
        elif old is old.parent.left:
            old.parent.left = new
        else:
            old.parent.right = new
        new.parent = old.parent

    def _update_end(self, node: _Node) -> None:
        node.subtree_end = max(node.slot.end, node.left.subtree_end, node.right.subtree_end)

    def _rotate(self, node: _Node, *, left: bool) -> None:
        """`node` goes down to its left (or right), the child of its other side comes up."""
        self._rotations += 1
        nil = self._nil
        if left:
            up = node.right
            node.right = up.left
            if up.left is not nil:
                up.left.parent = node
        else:
            up = node.left
            node.left = up.right
            if up.right is not nil:
                up.right.parent = node
        self._replace(node, up)
        if left:
            up.left = node
        else:
            up.right = node
        node.parent = up
        if self._ends:
            up.subtree_end = node.subtree_end
            self._update_end(node)

    def _colour_after_add(self, node: _Node) -> None:
        while node.parent.red:
            parent = node.parent
            grand = parent.parent
            on_left = parent is grand.left
            uncle = grand.right if on_left else grand.left
            if uncle.red:
                parent.red = uncle.red = False
                grand.red = True
                node = grand
                continue
            if node is (parent.right if on_left else parent.left):
                node = parent
                self._rotate(node, left=on_left)
            node.parent.red = False
            grand.red = True
            self._rotate(grand, left=not on_left)
        self._root.red = False

    def _colour_after_remove(self, node: _Node) -> None:
        while node is not self._root and not node.red:
            parent = node.parent
            on_left = node is parent.left
            sibling = parent.right if on_left else parent.left
            if sibling.red:
                sibling.red = False
                parent.red = True
                self._rotate(parent, left=on_left)
                sibling = parent.right if on_left else parent.left
            near, far = (sibling.left, sibling.right) if on_left else (sibling.right, sibling.left)
            if not near.red and not far.red:
                sibling.red = True
                node = parent
                continue
            if not far.red:
                near.red = False
                sibling.red = True
                self._rotate(sibling, left=not on_left)
                sibling, far = near, sibling
            sibling.red = parent.red
            parent.red = False
            far.red = False
            self._rotate(parent, left=on_left)
            node = self._root
        node.red = False
