"""Those who follow changes of the cache: each is answered once it has missed some, or at a heartbeat.

Left out: what changed (cache/log.py), and what is held (cache/blocks.py).
"""

import time

import msgspec

from engine.cache.blocks import HeldBlocks
from engine.cache.log import CacheLog
from engine.messages import ToFront
from engine.messages.cache import FollowCache
from engine.messages.control import Answer
from engine.runtime.channel import Outbox


class Followers:
    """Those that `front` has not been answered, and what they follow: the blocks that are `held`."""

    def __init__(self, front: Outbox[ToFront]) -> None:
        self._front = front
        # Numbers of changes grow over the lives of an engine: no life makes one a microsecond.
        self._log = CacheLog(time.time_ns() // 1000)
        self.held = HeldBlocks(self._log)
        self._waiting: list[FollowCache] = []

    def add(self, asked: FollowCache) -> None:
        """One more waits."""
        self._waiting.append(asked)

    async def tell(self, *, all: bool = False) -> None:
        """Answer those who have missed changes of the cache, or all who have asked for any."""
        waiting, self._waiting = self._waiting, []
        for asked in waiting:
            if all or asked.after != self._log.last:
                changes = msgspec.msgpack.encode(self._log.since(asked.after, self.held))
                await self._front.send(Answer(asked.number, changes))
            else:
                self._waiting.append(asked)
