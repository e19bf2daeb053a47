"""The page pool against a set of page numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cache.pool import PagePool


@given(st.integers(0, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 13), st.randoms(use_true_random=False))))
def test_pool_is_a_set_of_pages(size, steps):
    pool, taken = PagePool(size), set()
    for take, count, random in steps:
        if take:
            pages = pool.take(count)
            assert (pages is None) == (count > size - len(taken))
            pages = pages or []
            assert len(pages) in (0, count)
            assert not taken & set(pages) and set(pages) <= set(range(size))
            taken |= set(pages)
        else:
            pages = random.sample(sorted(taken), min(count, len(taken)))
            pool.give(pages)
            taken -= set(pages)
        assert pool.free_pages == size - len(taken)
        pool.check_integrity([[page] for page in taken])


def test_a_page_freed_twice_is_a_bug():
    pool = PagePool(3)
    pages = pool.take(2)
    pool.give(pages[:1])
    with pytest.raises(AssertionError, match="twice"):
        pool.give(pages[:1])
    with pytest.raises(AssertionError, match="twice"):
        pool.give([pages[1], pages[1]])


@pytest.mark.parametrize("owners", [[[0, 1], [1]], [[0]], [[0, 1], [2]]])
def test_integrity_sees_shared_leaked_and_stolen_pages(owners):
    pool = PagePool(3)
    assert sorted(pool.take(2)) == [0, 1]
    pool.check_integrity([[0], [1]])
    with pytest.raises(AssertionError):
        pool.check_integrity(owners)


def test_pages_that_were_neighbours_are_taken_as_neighbours_again():
    pool = PagePool(6)
    first, second = pool.take(3), pool.take(2)
    assert (first, second) == ([0, 1, 2], [3, 4])
    pool.give(second)
    pool.give(first)
    assert (pool.take(2), pool.take(4), pool.take(0)) == ([0, 1], [2, 3, 4, 5], [])
