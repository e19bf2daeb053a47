"""Sessions: conversations whose pages are pinned for a while after their last request (cache/pins.py).

    request begins ──> its session lives ── request ends ──> the node where its pages end is pinned for it,
                                                             until its time is over, or pages run short ("released")

A session is known by its owner, its salt and its id together. One that lost its pages lives on. Where they lie in the
host, they are of those that new ones push out last, and it is told how many these are; nothing pins them there. What a
session remembers for that has a bound, however long its conversation is. Left out: which owner asks
(engine/http/keys.py); stores.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from engine.cache.host import HostPages
from engine.cache.pins import Holder, Pins
from engine.cache.radix import Node
from engine.messages.sessions import EndSession, KeptSession, ListSessions, SessionUse

MOST_SESSIONS = 1024
MOST_NAMES = 256  # of its pages that a session remembers, of about 73 bytes each


class Below:
    """How many pages of a text lie in `host`. Of its `names` so many are remembered at most: where it has more pages,
    each stands for the same number of neighbours. Pages of a text leave from its end, so each end of what lies there is
    known to half of that number."""

    __slots__ = ("_count", "_each", "_host", "_names")

    def __init__(self, host: HostPages, names: Sequence[bytes]) -> None:
        self._host, self._count = host, len(names)
        self._each = max(1, -(-len(names) // MOST_NAMES))
        middles = range(self._each // 2, self._count + self._each // 2, self._each)
        self._names = [names[min(middle, self._count - 1)] for middle in middles]

    def after(self, pages: int) -> int:
        """Those behind the first `pages` of the text."""
        begins = range(0, self._count, self._each)
        return sum(
            max(0, min(begin + self._each, self._count) - max(begin, pages))
            for begin, name in zip(begins, self._names, strict=True)
            if name in self._host.names
        )


@dataclass(slots=True, eq=False)
class Session:
    """One that lives. It ends so many `seconds` after it was `used`, unless a request of it runs."""

    holder: Holder
    used: float = 0.0
    seconds: float = 0.0
    running: int = 0
    pins: Pins | None = None  # of the copy of attention where its last request ended
    below: Below | None = None  # that copy, where something lies there

    def told(self, now: float) -> KeptSession:
        pages = 0 if self.pins is None else self.pins.pages([self.holder])
        below = 0 if self.below is None else self.below.after(pages)
        return KeptSession(self.holder.id, pages, below, self.running, now - self.used, max(0.0, self.until - now))

    @property
    def until(self) -> float:
        """When it ends if it is not used."""
        return self.used + self.seconds


class Sessions:
    """At most `most` sessions; times are seconds of the caller's clock."""

    def __init__(self, most: int = MOST_SESSIONS) -> None:
        self.pages = 0  # that sessions have, each counted once, when they were counted last
        self._most = most
        self._sessions: OrderedDict[Holder, Session] = OrderedDict()  # the one used longest ago first

    def __len__(self) -> int:
        return len(self._sessions)

    def begin(self, use: SessionUse, salt: bytes, now: float) -> Session:
        """A request begins to run; its session, which begins with it if there is none."""
        holder = Holder("session", use.owner, salt, use.id)
        session = self._sessions.setdefault(holder, Session(holder))
        session.running += 1
        session.seconds = use.seconds
        self._use(session, now)
        while len(self._sessions) > self._most:
            _, oldest = self._sessions.popitem(last=False)
            if oldest.pins is not None:
                oldest.pins.release(oldest.holder)
        return session

    def leave(self, session: Session, pins: Pins, node: Node | None, now: float) -> None:
        """A request of `session` runs no longer; its pages end at `node`, if it has any, which is pinned."""
        session.running -= 1
        if self._sessions.get(session.holder) is not session:  # it was ended meanwhile
            return
        self._use(session, now)
        if node is not None and node.parent is not None:
            if session.pins is not None and session.pins is not pins:
                session.pins.end(session.holder)
            session.pins = pins
            pins.keep(session.holder, node, session.seconds, most=1)

    def _use(self, session: Session, now: float) -> None:
        session.used = now
        self._sessions.move_to_end(session.holder)
        if session.pins is not None:
            session.pins.hear(session.holder, session.seconds)

    def _forget(self, session: Session) -> None:
        del self._sessions[session.holder]
        if session.pins is not None:
            session.pins.end(session.holder)

    def expire(self, now: float) -> None:
        """Forget those whose time is over."""
        for session in list(self._sessions.values()):
            if not session.running and session.until <= now:
                self._forget(session)

    def count(self, now: float) -> None:
        """Find out how many `pages` those have that live."""
        self.expire(now)
        holders: dict[Pins, list[Holder]] = {}
        for session in self._sessions.values():
            if session.pins is not None:
                holders.setdefault(session.pins, []).append(session.holder)
        self.pages = sum(pins.pages(its) for pins, its in holders.items())

    def answer(self, message: ListSessions | EndSession, now: float) -> list[KeptSession] | bool:
        """The value of the Answer to `message`."""
        salt = message.cache_salt.encode()
        if isinstance(message, ListSessions):
            return self.of(message.owner, salt, now)
        return self.end(message.owner, salt, message.id, now)

    def of(self, owner: bytes, salt: bytes, now: float) -> list[KeptSession]:
        """The sessions of `owner` under `salt`, the one used last first."""
        self.expire(now)
        each = reversed(self._sessions.values())
        return [it.told(now) for it in each if (it.holder.owner, it.holder.salt) == (owner, salt)]

    def end(self, owner: bytes, salt: bytes, id: str, now: float) -> bool:
        """End a session: its pages are as all others from now on. False if there is none."""
        self.expire(now)
        session = self._sessions.get(Holder("session", owner, salt, id))
        if session is not None:
            self._forget(session)
        return session is not None

    def lose(self) -> None:
        """The device lost everything, requests that ran among them."""
        self._sessions.clear()
        self.pages = 0
