"""What the hosts of one engine say to each other, before and beside the frames of workers.

node n ── Join ─────────────> node 0      over one connection a node, which lasts; Welcome or TurnedAway
       <── StartRanks, EndRanks, Bye ──   and Ping each second, both ways
       ── RankEnded ────────>
node n ── Attach ───────────> node 0      over one connection a rank, whose worker has it from then on
"""

from engine.messages.base import Message


class Join(Message, frozen=True):
    """`node` is there. `alike` is what all nodes must have alike, by what people call it.

    The rest is its own affair: the path of the model, threads of a worker, the log level, and the interface that its
    workers use."""

    node: int
    alike: dict[str, str]
    model: str
    threads: int | None
    log_level: str
    interface: str


class Attach(Message, frozen=True):
    """The first frame of a connection that `rank` of this `life` speaks over from then on."""

    life: int
    rank: int


class Welcome(Message, frozen=True):
    """The node is one of the engine's."""


class TurnedAway(Message, frozen=True):
    """The node cannot be one of the engine's; for people."""

    cause: str


class StartRanks(Message, frozen=True):
    """Start the workers of `ranks`, each on a connection of its own."""

    life: int
    ranks: tuple[int, ...]


class EndRanks(Message, frozen=True):
    """End the workers of a life, if there are any left."""

    life: int


class RankEnded(Message, frozen=True):
    """A worker has ended, or could not be started; why, for people."""

    life: int
    rank: int
    cause: str


class Bye(Message, frozen=True):
    """The engine ends; `cause` says why, if it is not meant."""

    cause: str = ""
