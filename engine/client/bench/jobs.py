"""What the processes of the load generator tell each other."""

from engine.client.bench.asking import Target
from engine.client.bench.load import Record
from engine.client.bench.traffic import Turn
from engine.messages.base import Message


class Job(Message, frozen=True):
    """parent → client: play these conversations, as client `number` of `clients`. It answers Ready."""

    target: Target
    conversations: list[tuple[Turn, ...]]
    concurrency: int | None
    rate: float | None
    seed: int
    number: int
    clients: int


class Ready(Message, frozen=True):
    """client → parent: the load can begin."""


class Begin(Message, frozen=True):
    """parent → client: begin at that time of perf_counter, which all processes of a machine share."""

    at: float


class Replied(Message, frozen=True):
    """client → parent: so many replies have ended since the last of these."""

    count: int


class Played(Message, frozen=True):
    """client → parent: the load is over. `cpu` is the share of a core that the client used while it lasted; `late` is
    by how many seconds its event loop woke too late, the 99th percentile and the largest."""

    records: list[Record]
    asked: int
    cpu: float
    late: tuple[float, float]


ToClient = Job | Begin
FromClient = Ready | Replied | Played
