"""Where things are that one worker holds: stored responses by id, and requests that run and can be aborted.

What this router saw is remembered: the id of a response is read from the first bytes of its answer. What it did not
see (it has started anew, or another router sent the request) is asked of all workers, once. Left out: sessions, which
hold nothing but a cache (`dispatch`).
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

MOST_RESPONSES: Final = 100_000


class Places:
    """Ids of responses and of running requests, and the URLs of the workers that have them. `on_learned` is told of
    each response that is new."""

    def __init__(self) -> None:
        self.on_learned: list[Callable[[str, str], None]] = []
        self._responses: OrderedDict[str, str] = OrderedDict()
        self._running: dict[str, Counter[str]] = {}

    def response(self, id: str) -> str:
        """The URL of the worker that has it; empty if that is not known."""
        return self._responses.get(id, "")

    def learn(self, id: str, url: str, *, told: bool = False) -> None:
        """The worker at `url` has the response `id`; `told` says that another router said so."""
        known = self._responses.get(id) == url
        self._responses[id] = url
        self._responses.move_to_end(id)
        if len(self._responses) > MOST_RESPONSES:
            self._responses.popitem(last=False)
        if not known and not told:
            for each in self.on_learned:
                each(id, url)

    def begin(self, rids: Iterable[str], url: str) -> None:
        """A request that has these ids runs there."""
        for rid in rids:
            self._running.setdefault(rid, Counter())[url] += 1

    def end(self, rids: Iterable[str], url: str) -> None:
        """It no longer does."""
        for rid in rids:
            if (found := self._running.get(rid)) is not None:
                found[url] -= 1
                if found[url] <= 0:
                    del found[url]
                if not found:
                    del self._running[rid]

    def running(self, rid: str) -> list[str]:
        """The URLs of the workers at which requests of this id run."""
        return list(self._running.get(rid, ()))
