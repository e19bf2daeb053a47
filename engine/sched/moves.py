"""The moves between tiers of all copies of attention: which are due, and what came of them.

A move is the scheduler's to send, in this order: what is due before a plan, the plan, and what is due after it. So a
worker knows which steps a page's bytes come from, and which step may write over them.
"""

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from functools import reduce

from msgspec.structs import replace

from engine.cache.names import PageNames
from engine.cache.tiers import Tiers
from engine.messages.control import TierStats
from engine.messages.request import Admit
from engine.messages.step import StepPlan
from engine.messages.tiers import Move, Moved, summed
from engine.sched.batcher import Scheduler

LONG_STEP = 256  # tokens, from which on a step's time is that of its prompts
OLD = 0.9  # how much the times of steps before count
# How long a request waits for a store, beside what it takes to read: as HiCache does.
FETCH_SECONDS = 2.0
FETCH_SECONDS_A_BYTE = 0.1 / 4096  # of ids, four a token
# Of TierCounts, what is added up over the copies.
COUNTED = ("down", "kept", "fetched", "from_device", "from_host", "from_store", "refused", "failed", "computed")


def patience(admit: Admit) -> float:
    """Seconds for which a request waits for what a store has of its prompt, if nothing better is known."""
    return FETCH_SECONDS + len(admit.ids) * FETCH_SECONDS_A_BYTE


class PromptCost:
    """How many seconds a token of a prompt takes, as the last long steps did: 0 before there was one."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._tokens: deque[int] = deque()  # of the steps in flight

    def planned(self, plan: StepPlan) -> None:
        self._tokens.append(sum(array("i", plan.lengths)))

    def done(self, seconds: float) -> None:
        """The oldest step in flight has taken so long."""
        if (tokens := self._tokens.popleft()) >= LONG_STEP:
            cost = seconds / tokens
            self.seconds = OLD * self.seconds + (1 - OLD) * cost if self.seconds else cost

    def lost(self) -> None:
        """All that was in flight is."""
        self._tokens.clear()


class Moves:
    """Of `copies`, each of which has tiers; one alone is a copy, too."""

    def __init__(self, copies: Sequence[Scheduler]) -> None:
        self._copies = copies
        self.cost = PromptCost()
        self._saved = 0.0  # seconds
        self._said = False  # that a tier fails
        self._needs: dict[int, str] = {}  # that are waited for, and the rids of those who have them
        first, *others = self.tiers
        for each in others:
            each.ceiling = first.ceiling  # what one copy was asked for came before, for all

    @property
    def tiers(self) -> Iterator[Tiers]:
        for copy in self._copies:
            assert copy.tiers is not None, "there is nothing below the device"
            yield copy.tiers

    def lost(self) -> None:
        """The device is, with all that was in flight, and nobody waits for a page any more."""
        self.cost.lost()
        self._needs.clear()

    def before(self) -> list[Move]:
        """Those to be sent before the next plan."""
        return [move for tiers in self.tiers for move in tiers.before()]

    def after(self) -> list[Move]:
        """Those to be sent once all plans are."""
        return [move for tiers in self.tiers for move in tiers.after()]

    def moved(self, message: Moved) -> str:
        """All ranks have answered. Why a page was not moved, for people, unless that was said before."""
        copy = message.number % len(self._copies)
        tiers = list(self.tiers)[copy]
        before, sweeping = tiers.counts.from_host + tiers.counts.from_store, tiers.sweeping
        if tiers.chooses(message.number):
            tiers.fetching.compute = self._copies[0].page_size * self.cost.seconds
        tiers.moved(message)
        self._copies[copy].places.moved()
        if sweeping and not tiers.sweeping:
            self._copies[copy].places.sweep()
        risen = tiers.counts.from_host + tiers.counts.from_store - before
        self._saved += risen * self._copies[0].page_size * self.cost.seconds
        cause, tiers.cause = "" if self._said else tiers.cause, ""
        self._said |= bool(cause)
        return cause

    def tick(self, now: float) -> bool:
        """It is so late, in seconds of the caller's clock. Whether a store is to be offered pages now, or told again
        to forget them."""
        for tiers in self.tiers:
            tiers.keeping.now = tiers.clearing.now = now
            tiers.fetching.tick(now)
        return any(tiers.clearing.due or tiers.keeping.waits for tiers in self.tiers)

    @property
    def clearing(self) -> bool:
        """Whether a store is still to say that it has forgotten what a flush was to clear."""
        return any(tiers.clearing.waits for tiers in self.tiers)

    @property
    def uncleared(self) -> str:
        """Why a store has not."""
        return next((tiers.clearing.cause for tiers in self.tiers if tiers.clearing.cause), "")

    # ── what requests that arrive lack ───────────────────────────────────────────────────────

    def seeks(self, admit: Admit) -> bool:
        """Whether a store may have pages of a prompt that are worth to wait for."""
        tiers = self._copies[0].tiers
        assert tiers is not None
        pages = len(admit.ids) // 4 // self._copies[0].page_size
        return tiers.options.stores and admit.max_new > 0 and pages >= tiers.options.least_fetched

    def named(self, admit: Admit) -> Admit:
        """`admit` with the names of its pages, so that nobody names them again."""
        keys, page_size, salt = admit.keys or admit.ids, self._copies[0].page_size, admit.cache_salt.encode()
        whole = len(keys) // (4 * page_size)
        trees = (copy.places.tree.pages(keys[: 4 * page_size * whole], salt) for copy in self._copies)
        known = max((tiers.device.named(pages) for tiers, pages in zip(self.tiers, trees, strict=True)), key=len)
        names = PageNames(salt, page_size, lambda first, end: keys[4 * first : 4 * end], known)
        return replace(admit, names=tuple(names.upto(whole)))

    def want(self, number: int, admit: Admit) -> None:
        """`settled` names `number` once what stores have of the pages of a prompt that is `named` is there, or does not
        come. They come to the copy that has the most of them."""
        page_size, length = self._copies[0].page_size, len(admit.ids) // 4
        reused = min(length - 1, admit.scored_after if admit.sampling.prompt_logprobs >= 0 else length)
        wanted = admit.names[: reused // page_size]
        salt, packed = admit.cache_salt.encode(), (admit.keys or admit.ids)[: 4 * page_size * len(wanted)]
        held = [copy.places.tree.match_length(packed, salt) for copy in self._copies]
        best = max(range(len(held)), key=lambda copy: (held[copy], -self._copies[copy].running))
        tiers = self._copies[best].tiers
        assert tiers is not None
        tiers.want(number, wanted, held[best])
        self._needs[number] = admit.rid

    def leave(self, *rids: str) -> None:
        """Those requests are gone: nothing is fetched for them any more."""
        gone = set(rids)
        self.give_up(*[number for number, rid in self._needs.items() if rid in gone])

    def give_up(self, *numbers: int) -> None:
        """Nobody waits for these any longer."""
        for tiers in self.tiers:
            for number in numbers:
                tiers.give_up(number)
        for number in numbers:
            self._needs.pop(number, None)

    def patience(self) -> list[tuple[int, float]]:
        """Needs for pages of which more is known by now, and how many seconds from now on they are waited for."""
        found = []
        for tiers in self.tiers:
            found += [each for each in tiers.patience if each[1]]
            tiers.patience.clear()
        return found

    def settled(self) -> list[int]:
        """Those that are."""
        return [number for tiers in self.tiers for number in tiers.needs.settled()]

    def stats(self) -> TierStats:
        """The figures of all copies."""
        tiers = list(self.tiers)
        counts = [each.counts for each in tiers]
        ceiling = tiers[0].ceiling  # that of all
        total = {name: sum(getattr(each, name) for each in counts) for name in COUNTED}
        return TierStats(
            host_pages=sum(each.options.host for each in tiers),
            host_used=sum(len(each.host) for each in tiers),
            store_pages=max(each.store_pages for each in counts),
            store_bytes=max(each.store_bytes for each in counts),
            seconds_up=sum(each.seconds.get("up", 0.0) + each.seconds.get("fetch", 0.0) for each in counts),
            asked_total=ceiling.asked,
            ceiling=ceiling.ratio,
            seconds_saved=self._saved,
            stores=reduce(summed, (each.stores for each in counts)),
            uncleared=any(each.clearing.wanted for each in tiers),
            to_keep=sum(each.keeping.lag for each in tiers),
            **total,
        )
