"""Follows the cache events of every worker that has them (`cache_feed`), from when it is ready until it leaves.

A worker without such a route is asked once in each of its lives: an engine that was started anew may have it now. What
its policy is told passes here, so that evictions are counted.
"""

import asyncio
from collections.abc import Sequence
from contextvars import Context
from functools import partial

from engine.router.cache_feed import CacheFeed
from engine.router.dispatch import tell
from engine.router.keys import WorkerKeys
from engine.router.policy import RoutingPolicy
from engine.router.workers import Fleet, Worker


class Counting:
    """The policy, with one worker's evictions counted. If it fails, the feed goes on."""

    def __init__(self, policy: RoutingPolicy, worker: Worker) -> None:
        self.stored = partial(tell, policy.stored)
        self.reset = partial(tell, policy.reset)
        self._policy = policy
        self._counts = worker.counts

    def evicted(self, worker: str, blocks: Sequence[int]) -> None:
        self._counts.evictions += len(blocks)
        tell(self._policy.evicted, worker, blocks)


class Feeds:
    """One feed for each worker of a fleet."""

    def __init__(self, fleet: Fleet, policy: RoutingPolicy, keys: WorkerKeys) -> None:
        self._fleet = fleet
        self._policy = policy
        self._keys = keys
        self._feeds: dict[str, CacheFeed] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        fleet.on_ready.append(self._begin)
        fleet.on_reset.append(self._forget)
        fleet.on_removed.append(self._end)

    def _begin(self, worker: Worker) -> None:
        task = self._tasks.get(worker.url)
        if task is not None and not task.done():
            return
        assert self._fleet.session is not None, "it is opened with the router"
        key = self._keys.of(worker.url)
        headers = None if key is None else {"Authorization": f"Bearer {key}"}
        feed = CacheFeed(worker.url, Counting(self._policy, worker), self._fleet.session, headers)
        self._feeds[worker.url] = feed
        self._tasks[worker.url] = asyncio.get_running_loop().create_task(feed.run(), context=Context())

    def _forget(self, url: str) -> None:
        """The policy was told that nothing is known of the worker."""
        if (feed := self._feeds.get(url)) is not None:
            feed.forget()

    def _end(self, url: str) -> None:
        self._feeds.pop(url, None)
        if (task := self._tasks.pop(url, None)) is not None:
            task.cancel()

    def close(self) -> None:
        """End all of them."""
        for url in list(self._tasks):
            self._end(url)
