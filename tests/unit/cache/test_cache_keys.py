"""Keys of media: the same for the same content and length, unlike any other's, and never a token's id."""

from array import array

from hypothesis import given
from hypothesis import strategies as st

from engine.cache.keys import keys_with, media_keys

HASH = st.binary(min_size=1, max_size=32)
COUNT = st.integers(1, 300)


@given(HASH, COUNT)
def test_the_same_content_has_the_same_keys_which_are_no_token_ids(content: bytes, count: int) -> None:
    keys = media_keys(content, count)
    assert keys == media_keys(content, count) and len(keys) == count
    assert max(keys) < 0 and keys.itemsize == 4


@given(HASH, HASH, COUNT)
def test_other_content_has_other_keys_at_every_place(one: bytes, other: bytes, count: int) -> None:
    same = sum(a == b for a, b in zip(media_keys(one, count), media_keys(other, count), strict=True))
    assert same == count if one == other else same <= 1  # of 31 bits each


@given(HASH, COUNT, COUNT)
def test_a_run_is_not_the_beginning_of_a_longer_one(content: bytes, count: int, other: int) -> None:
    assert count == other or media_keys(content, count)[0] != media_keys(content, other)[0]


def test_keys_are_those_of_this_version() -> None:
    """Fronts and engines of one version agree on them, wherever they run."""
    assert media_keys(b"a picture", 3).tolist() == [-1475542635, -1736281597, -571721414]


def test_runs_take_the_place_of_placeholders() -> None:
    ids = array("i", [5, 9, 9, 6])
    assert keys_with(ids, []) is ids
    assert keys_with(ids, [(1, array("i", [-3, -4]))]).tolist() == [5, -3, -4, 6]
    assert ids.tolist() == [5, 9, 9, 6]
