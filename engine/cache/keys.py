"""Keys: what the radix tree compares in the place of token ids.

A key is an int32 a token. For text it is the token's id. A picture or a clip stands in `ids` as a run of one and the
same placeholder, whatever it shows, so its keys come from the hash of its content:

    ids     12   7   9   9   9   9   4           9: the placeholder of an image of four tokens
    keys    12   7  -a  -b  -c  -d   4           -a .. -d: derived from the hash of what it shows

Keys are int32, as ids are, so text needs no second array and the tree's memory and comparisons stay as they are. Keys
of media are less than -1, and no token id is, so neither is ever taken for the other. Each value has 31 bits of a hash
over content and length, so a page that holds k tokens of another picture is taken for its own once in 2^(31 k). A page
of -1 alone is no text: behind a prefix it stands for the state of a recurrent model there (sched/states.py).
"""

import hashlib
from array import array
from collections.abc import Iterable

STATE = -1  # the key of what is no token


def media_keys(content: bytes, count: int) -> "array[int]":
    """The keys of `count` tokens (1 or more) that show what `content` is the hash of.

    The hash covers all that the embeddings follow from: what is shown, and how it was resized. `count` takes part as
    well, so a run is never the beginning of a longer one."""
    assert count > 0, "a medium takes at least one token"
    drawn = array("I", hashlib.shake_256(count.to_bytes(4, "little") + content).digest(4 * count))
    return array("i", [max(-2 - (value >> 1), -(1 << 31)) for value in drawn])


def keys_with(ids: "array[int]", runs: Iterable[tuple[int, "array[int]"]]) -> "array[int]":
    """The keys of `ids` (int32), in which each of `runs` takes the place of what begins at its index.

    Where there are none it is `ids` itself, not a copy."""
    keys = ids
    for start, run in runs:
        assert 0 <= start <= len(ids) - len(run), f"a run of {len(run)} keys at {start} leaves {len(ids)} ids"
        keys = array("i", ids) if keys is ids else keys
        keys[start : start + len(run)] = run
    return keys
