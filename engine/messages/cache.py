"""What a router is told of the cache: which blocks of texts are in it."""

from typing import Literal

from engine.messages.base import Message, Part

Kind = Literal["stored", "evicted", "reset"]


class Blocks(Part, frozen=True):
    """What a router knows a prompt by: the `hashes` (uint64) of the blocks of its canonical text in `space`, as
    conversation/canonical.py has them, and for each how many tokens of the prompt hold it (`ends`, int32, growing)."""

    space: bytes
    hashes: bytes
    ends: bytes


class CacheChange(Part, frozen=True):
    """Blocks (`hashes`, uint64) of `space` that have come or gone. Of those that have gone no space is told; a reset
    has no blocks: whatever was there is gone."""

    kind: Kind
    space: bytes = b""
    hashes: bytes = b""


class FollowCache(Message, frozen=True):
    """http → scheduler: what changed after the change with the number `after`? The Answer's value is a CacheChanges. It
    comes when there is something to tell, or with the next heartbeat."""

    number: int
    after: int


class CacheChanges(Part, frozen=True):
    """The changes with the numbers from `after` + 1 to `number`. Where those after the one that was asked for are not
    known any more, the first change is a reset, and what follows is all that the cache holds."""

    after: int
    number: int
    changes: tuple[CacheChange, ...]
