"""The radix tree against a dictionary from prefixes, as tuples of a salt and pages of tokens, to pages."""

from array import array

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from engine.cache.radix import RadixTree

PAGES = st.lists(st.integers(0, 1), max_size=5).map(tuple)  # few values, so that prefixes meet
PATH = st.tuples(st.sampled_from([b"", b"", b"salt"]), PAGES).map(lambda path: (path[0], *path[1]))


def prefixes(path):
    return [path[: end + 1] for end in range(1, len(path))]


class TreeAgainstDictionary(RuleBasedStateMachine):
    """`pages` is the model: prefix → page, closed under taking prefixes; `used` is when its last lock went."""

    readers = Bundle("readers")

    @initialize(page_size=st.integers(1, 3))
    def start(self, page_size):
        self.page_size = page_size
        self.tree = RadixTree(page_size)
        self.pages, self.used, self.held, self.pinned, self.moving = {}, {}, {}, [], []
        self.next_page = self.next_reader = self.now = 0

    def key(self, path, tail=0):
        tokens = [value for page in path if isinstance(page, int) for value in [*[7] * (self.page_size - 1), page]]
        return array("i", tokens + [7] * tail).tobytes()

    def read(self):
        return {prefix for _, path in self.held.values() for prefix in prefixes(path)}

    def locked(self):
        return self.read() | {prefix for _, path in self.moving for prefix in prefixes(path)}

    @rule(target=readers, path=PATH, tail=st.integers(0, 2))
    def match_and_lock(self, path, tail):
        expected = [self.pages[prefix] for prefix in prefixes(path) if prefix in self.pages]
        key = self.key(path, min(tail, self.page_size - 1))
        assert self.tree.match_length(key, path[0]) == len(expected)
        node, pages = self.tree.match(key, path[0])
        assert pages == expected == self.tree.path(node)
        self.tree.lock(node)
        self.next_reader += 1
        self.held[self.next_reader] = (node, path[: len(expected) + 1])
        return self.next_reader

    @rule(path=PATH)
    def match_only(self, path):
        assert len(self.tree.match(self.key(path), path[0])[1]) == sum(
            prefix in self.pages for prefix in prefixes(path)
        )

    @rule(reader=readers, more=PAGES)
    def extend(self, reader, more):
        node, path = self.held[reader]
        own = list(range(self.next_page, self.next_page + len(more)))
        self.next_page += len(more)
        new = prefixes(path + more)[len(path) - 1 :]
        expected = [self.pages[prefix] for prefix in new if prefix in self.pages]
        node, held = self.tree.extend(node, self.key(more), own)
        assert held == expected
        self.pages |= dict(zip(new[len(held) :], own[len(held) :], strict=True))
        self.held[reader] = (node, path + more)

    @rule(target=readers, reader=consumes(readers))
    def unlock(self, reader):
        node, path = self.held.pop(reader)
        self.tree.unlock(node)
        self.now += 1
        read = self.read()
        self.used |= {prefix: self.now for prefix in prefixes(path) if prefix not in read}
        return multiple()

    @rule(count=st.integers(1, 8), data=st.data())
    def lock_the_coldest(self, count, data):
        """Ends of what gives way next are locked, which is not to use them."""
        expected = self.coldest(count)
        found = self.tree.coldest(count)
        assert sorted(page for _, pages in found for page in pages) == sorted(map(self.pages.__getitem__, expected))
        if found:
            node, pages = found[data.draw(st.integers(0, len(found) - 1))]
            last = data.draw(st.sampled_from(pages))
            node = self.tree.head(node, node.pages.index(last) + 1)
            self.tree.lock(node)
            self.moving.append((node, next(prefix for prefix, page in self.pages.items() if page == last)))

    @precondition(lambda self: self.moving)
    @rule(data=st.data())
    def unlock_as_it_was(self, data):
        node, _ = self.moving.pop(data.draw(st.integers(0, len(self.moving) - 1)))
        self.tree.unlock(node, used=False)

    @rule(reader=readers)
    def pin(self, reader):
        node, path = self.held[reader]
        if node.parent is not None:
            self.tree.pin(node)
            self.pinned.append((node, path))

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data):
        self.tree.unpin(self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1)))[0])

    def coldest(self, count):
        """What gives way next."""
        left, found, locked = dict(self.pages), [], self.locked() | {path for _, path in self.pinned}
        while len(found) < count:
            inner = {prefix[:-1] for prefix in left}
            leaves = [prefix for prefix in left if prefix not in inner and prefix not in locked]
            if not leaves:
                break
            found.append(min(leaves, key=self.used.__getitem__))
            del left[found[-1]]
        return found

    @rule(count=st.integers(0, 8))
    def evict(self, count):
        expected = []
        for prefix in self.coldest(count):
            expected.append(self.pages.pop(prefix))
            del self.used[prefix]
        assert sorted(self.tree.evict(count)) == sorted(expected)

    @precondition(lambda self: len(self.pages) > 4)
    @rule()
    def clear(self):
        for node, _ in self.pinned:
            self.tree.unpin(node)
        self.pinned.clear()
        free = self.pages.keys() - self.locked()
        assert sorted(self.tree.clear()) == sorted(self.pages.pop(prefix) for prefix in free)
        self.used = {prefix: tick for prefix, tick in self.used.items() if prefix not in free}

    @precondition(lambda self: self.pages)
    @rule(path=PATH, count=st.integers(1, 9))
    def remove(self, path, count):
        """What begins with some tokens, unless it is used."""
        tokens = self.key(path)[: 4 * count]
        if not tokens:
            return
        doomed = {prefix for prefix in self.pages if prefix[0] == path[0] and self.key(prefix).startswith(tokens)}
        nodes = self.tree.below(tokens, path[0])
        assert sorted(page for node in nodes for page in node.pages) == sorted(self.pages[each] for each in doomed)
        used = self.locked() | {prefix for _, pinned in self.pinned for prefix in prefixes(pinned)}
        assert any(node.locks or node.pins for node in nodes) == bool(doomed & used)
        if not doomed & used:
            assert sorted(self.tree.remove(nodes)) == sorted(self.pages.pop(prefix) for prefix in doomed)
            self.used = {prefix: tick for prefix, tick in self.used.items() if prefix not in doomed}

    @invariant()
    def tree_is_the_dictionary(self):
        if not hasattr(self, "tree"):
            return
        self.tree.check_integrity()
        assert self.tree.size == len(self.pages)
        assert self.tree.evictable == len(self.pages.keys() - self.locked())
        assert sorted(page for node in self.tree.nodes() for page in node.pages) == sorted(self.pages.values())
        for node, path in [*self.held.values(), *self.pinned, *self.moving]:
            assert self.tree.path(node) == [self.pages[prefix] for prefix in prefixes(path)]


TestTree = TreeAgainstDictionary.TestCase
TestTree.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_prompt_inserted_in_chunks_is_one_node():
    tree = RadixTree(1)
    node = tree.match(b"")[0]
    for page in range(5):
        node, held = tree.extend(node, array("i", [page]).tobytes(), [page])
        assert held == []
    assert [n.pages for n in tree.nodes()] == [[0, 1, 2, 3, 4]]


def test_eviction_takes_no_more_than_asked_of_a_long_leaf():
    tree = RadixTree(2)
    key = array("i", range(20)).tobytes()
    node, _ = tree.extend(tree.match(b"")[0], key, list(range(10)))
    assert tree.evict(3) == []
    tree.unlock(node)
    assert tree.evict(3) == [7, 8, 9]
    assert tree.match(key)[1] == list(range(7))


def test_a_prefix_used_again_outlives_one_used_since():
    tree = RadixTree(1)
    first, second = array("i", [1]).tobytes(), array("i", [2]).tobytes()
    for key, page in ((first, 1), (second, 2)):
        tree.unlock(tree.extend(tree.match(b"")[0], key, [page])[0])
    tree.match(second)  # looking is not using
    node, _ = tree.match(first)
    tree.lock(node)
    tree.unlock(node)
    assert tree.evict(1) == [2]


def test_salts_share_nothing_and_leave_nothing():
    tree = RadixTree(1)
    key = array("i", [1, 2]).tobytes()
    first, second = tree.match(key, b"a")[0], tree.match(key, b"a")[0]  # before either has pages
    ends = [tree.extend(node, key, [page, page + 1]) for node, page in ((first, 0), (second, 2))]
    assert [held for _, held in ends] == [[], [0, 1]]
    assert [tree.match_length(key, salt) for salt in (b"a", b"b", b"")] == [2, 0, 0]
    for node, _ in ends:
        tree.unlock(node)
    assert tree.evict(9) == [0, 1]
    tree.check_integrity()
    assert not tree._roots


def test_a_prefix_gives_way_next_once_what_goes_on_from_it_has_also_where_it_was_queued_before():
    tree = RadixTree(1)
    first, second = array("i", [1]).tobytes(), array("i", [2]).tobytes()
    tree.unlock(tree.extend(tree.match(b"")[0], first, [1])[0])  # a leaf, and queued as one
    node = tree.match(first)[0]
    tree.lock(node)
    tree.lock(node)  # of two requests, so that what is added is a node of its own
    tree.unlock(tree.extend(node, second, [2])[0])
    tree.unlock(node)
    assert [pages for _, pages in tree.coldest(2)] == [[2], [1]] == [pages for _, pages in tree.coldest(9)]


def test_what_gives_way_next_is_found_without_a_look_at_all_that_goes_on_from_a_prefix():
    """For each of them, that would be their number squared: a thousand short texts with one beginning are usual."""

    class Children(dict):
        def values(self):
            raise AssertionError("all children are looked at")

    tree = RadixTree(1)
    for number in range(9):
        key = array("i", [1, number]).tobytes()
        node, held = tree.match(key)
        tree.lock(node)
        tree.unlock(tree.extend(node, key[4 * len(held) :], [0, 10 + number][len(held) :])[0])
    above = tree.match(array("i", [1]).tobytes())[0]
    above.children = Children(above.children)
    found = [pages for _, pages in tree.coldest(20)]
    assert found == [[10 + number] for number in range(9)] + [[0]]
