"""Sessions: conversations whose pages stay in the cache for a while after their last request.

Nothing is locked for a session. Each second its pages count as used just now, so that the tree evicts what is of no
session first, then sessions, the one used longest ago first. So no session ever stands in the way of a request: where
pages run short, it loses its own.

    request begins ──> its session lives ── request ends ──> the node where its pages end
                       refresh: each second, until its time is over, or that node is evicted ("released")

A session is known by its owner, its salt and its id together. Left out: which owner asks (engine/http/keys.py); the
tiers below the device, which pages of a session sink into as all others do.
"""

from collections import OrderedDict
from dataclasses import dataclass

from engine.cache.radix import Node, RadixTree
from engine.messages.sessions import KeptSession, SessionUse

MOST_SESSIONS = 1024
Name = tuple[bytes, bytes, str]  # owner, salt, id


@dataclass(slots=True, eq=False)
class Session:
    """One that lives. It ends so many `seconds` after it was `used`, unless a request of it runs."""

    name: Name
    used: float = 0.0
    seconds: float = 0.0
    running: int = 0
    place: tuple[RadixTree, Node] | None = None  # where the pages of its last request end

    def told(self, now: float) -> KeptSession:
        pages = 0 if self.place is None else len(self.place[0].path(self.place[1]))
        return KeptSession(self.name[2], pages, self.running, now - self.used, max(0.0, self.left(now)))

    def left(self, now: float) -> float:
        """Seconds that it has left if it is not used."""
        return self.used + self.seconds - now


class Sessions:
    """At most `most` sessions; times are seconds of the caller's clock."""

    def __init__(self, most: int = MOST_SESSIONS) -> None:
        self.pages = 0  # that sessions have, each counted once
        self.released = 0  # sessions that lost their pages before their time
        self._most = most
        self._sessions: OrderedDict[Name, Session] = OrderedDict()  # the one used longest ago first

    def __len__(self) -> int:
        return len(self._sessions)

    def begin(self, use: SessionUse, salt: bytes, now: float) -> Session:
        """A request begins to run; its session, which begins with it if there is none."""
        name = (use.owner, salt, use.id)
        session = self._sessions.setdefault(name, Session(name))
        session.running += 1
        session.seconds = use.seconds
        self._use(session, now)
        while len(self._sessions) > self._most:
            _, oldest = self._sessions.popitem(last=False)
            self.released += oldest.place is not None
        return session

    def leave(self, session: Session, tree: RadixTree, node: Node | None, now: float) -> None:
        """A request of `session` runs no longer; its pages end at `node` of `tree`, if that has any."""
        session.running -= 1
        if self._sessions.get(session.name) is not session:  # it was ended meanwhile
            return
        self._use(session, now)
        if node is not None and node.parent is not None:
            session.place = tree, node

    def _use(self, session: Session, now: float) -> None:
        session.used = now
        self._sessions.move_to_end(session.name)

    def refresh(self, now: float) -> None:
        """Each second: forget those whose time is over, and count the pages of all others as used."""
        for name, session in list(self._sessions.items()):
            if not session.running and session.left(now) <= 0:
                del self._sessions[name]
        placed = [(session, *session.place) for session in self._sessions.values() if session.place is not None]
        self.pages = 0
        for tree in dict.fromkeys(tree for _, tree, _ in placed):
            its = [(session, node) for session, other, node in placed if other is tree]
            for (session, _), pages in zip(its, tree.touch([node for _, node in its]), strict=True):
                if pages is None:
                    session.place = None
                    self.released += 1
                else:
                    self.pages += pages

    def of(self, owner: bytes, salt: bytes, now: float) -> list[KeptSession]:
        """The sessions of `owner` under `salt`, the one used last first."""
        self.refresh(now)
        return [each.told(now) for name, each in reversed(self._sessions.items()) if name[:2] == (owner, salt)]

    def end(self, owner: bytes, salt: bytes, id: str, now: float) -> bool:
        """End a session: its pages are as all others from now on. False if there is none."""
        self.refresh(now)
        return self._sessions.pop((owner, salt, id), None) is not None

    def lose(self) -> None:
        """The device lost everything, requests that ran among them."""
        self._sessions.clear()
        self.pages = 0
