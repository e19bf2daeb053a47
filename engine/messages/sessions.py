"""Sessions and programs: names that clients give to conversations, so that their pages stay cached for a while."""

from engine.messages.base import Message, Part


class SessionUse(Part, frozen=True):
    """A request is of the session `id` of `owner`, which is a digest of an API key, or nothing where none is asked for.
    Its pages are kept for `seconds` after its end. Sessions of unlike salts are not the same."""

    owner: bytes
    id: str
    seconds: float


class ProgramUse(Part, frozen=True):
    """A request is a call of the program `id` of `owner`. Programs of unlike salts are not the same."""

    owner: bytes
    id: str


class KeptSession(Part, frozen=True):
    """A session that lives: how many `pages` of the device hold its conversation, how many more that lie `below` in the
    host, and how many of its requests run. It was last used `idle` seconds ago, and lives `left` seconds more if it is
    not used."""

    id: str
    pages: int
    below: int
    running: int
    idle: float
    left: float


class ListSessions(Message, frozen=True):
    """http → scheduler: which sessions has `owner` under `cache_salt`? The Answer's value is a list of KeptSession,
    the one that was used last first."""

    number: int
    owner: bytes
    cache_salt: str


class EndSession(Message, frozen=True):
    """http → scheduler: end the session `id`. The Answer's value says whether there was one."""

    number: int
    owner: bytes
    cache_salt: str
    id: str
