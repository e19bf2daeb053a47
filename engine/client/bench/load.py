"""The load generator: plays conversations against anything that answers, and notes when each piece came.

What answers is an `Ask`: a server over HTTP (asking.py) or an engine in the process (`of_chunks`). It takes a whole
reply, and gives a function that reads it into the record. Replies whose text nobody waits for are read when the load
is over, so that the client does not measure itself. With `rate` a request's clock starts when it was due, not when the
generator got to it. Left out: several processes (clients.py).
"""

import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing

import anyio
from msgspec import Struct

from engine.client.bench.traffic import Conversation, arrivals
from engine.errors import EngineError
from engine.messages.reply import Chunk

MOST_UNREAD = 4096  # replies that wait for the end of the load


class Record(Struct):
    """One request as its client saw it. Times are in seconds since the run began; `pieces` has one for each piece
    of text, and `events` counts those without a text too. A count is 0 if the server did not give it."""

    sent: float
    pieces: list[float]
    ended: float = 0.0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    events: int = 0

    def count(self, output_tokens: int, finish: str | None, asked: int) -> None:
        """Note what the server counted. One that counts nothing has said all that was asked for, or each token in a
        piece of its own."""
        self.output_tokens = output_tokens or (asked if finish == "length" else len(self.pieces))

    @property
    def first(self) -> float:
        """Time to the first token."""
        return self.pieces[0] - self.sent

    @property
    def whole(self) -> float:
        """Time to the end of the reply."""
        return self.ended - self.sent

    @property
    def gaps(self) -> list[float]:
        """Times between pieces of text."""
        return [after - before for before, after in itertools.pairwise(self.pieces)]

    @property
    def per_token(self) -> float | None:
        """Time for each token after the first, over the whole reply; a single token has none."""
        return (self.pieces[-1] - self.pieces[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else None


class Clock:
    """Seconds since the run began."""

    def __init__(self, began: float) -> None:
        self.began = began  # by perf_counter, which all processes of a machine share

    def __call__(self) -> float:
        return time.perf_counter() - self.began


Read = Callable[[], str]  # reads a reply into its record; its text
# From what client and model have said in turn, and the tokens that are asked for.
Ask = Callable[[Sequence[str], int, Record, Clock], Awaitable[Read]]


class Run(Struct, frozen=True):
    """The outcome of some traffic. `asked` counts every turn; a conversation ends with its first failure."""

    records: list[Record]
    asked: int
    seconds: float

    @property
    def answered(self) -> list[Record]:
        return [record for record in self.records if record.error is None]


async def play(
    conversations: Sequence[Conversation],
    ask: Ask,
    *,
    concurrency: int | None = None,
    rate: float | None = None,
    seed: int = 0,
    share: tuple[int, int] = (0, 1),
    began: float | None = None,
    on_reply: Callable[[], None] = lambda: None,
) -> Run:
    """Play `conversations`: at `rate` a second, or else `concurrency` at a time (all at once without either).

    With `share` (i, n) this is client i of n, each with its part of the arrivals. `began` is when the run began."""
    records: list[Record] = []
    unread: list[Read] = []
    now = Clock(time.perf_counter() if began is None else began)

    async def converse(conversation: Conversation, due: float) -> None:
        said: list[str] = []
        for number, turn in enumerate(conversation, 1):
            record = Record(due, [])
            records.append(record)
            said.append(turn.text)
            read = await ask(said, turn.output_len, record, now)
            on_reply()
            if number == len(conversation) and len(unread) < MOST_UNREAD:
                unread.append(read)
                return
            said.append(read())
            if record.error is not None:
                return
            due = now()

    async def keep_one_open(left: Iterator[Conversation]) -> None:
        for conversation in left:
            await converse(conversation, now())

    async with anyio.create_task_group() as group:
        if rate is not None:
            dues = itertools.islice(arrivals(rate, seed), share[0], None, share[1])
            for conversation, due in zip(conversations, dues, strict=False):
                await anyio.sleep(max(0.0, due - now()))
                group.start_soon(converse, conversation, due)
        else:
            left = iter(conversations)
            for _ in range(min(concurrency or len(conversations), len(conversations))):
                group.start_soon(keep_one_open, left)
    for read in unread:
        read()
    return run_of(records, sum(map(len, conversations)))


def run_of(records: list[Record], asked: int) -> Run:
    """The run that made `records`."""
    first = min((record.sent for record in records), default=0.0)
    last = max((record.ended for record in records), default=0.0)
    return Run(records, asked, last - first)


def of_chunks(stream: Callable[[str, int], AsyncGenerator[Chunk, None]]) -> Ask:
    """Asks what answers a prompt and a length with a stream of chunks."""

    async def ask(said: Sequence[str], length: int, record: Record, now: Clock) -> Read:
        texts: list[str] = []
        try:
            async with aclosing(stream("".join(said), length)) as chunks:
                async for chunk in chunks:
                    record.events += 1
                    if chunk.text:
                        record.pieces.append(now())
                        texts.append(chunk.text)
            if not record.pieces:  # tokens without a text, such as half a character
                record.pieces.append(now())
            record.input_tokens, record.cached_tokens = chunk.prompt_tokens, chunk.cached_tokens
            record.count(chunk.completion_tokens, chunk.finish, length)
        except EngineError as error:
            record.error = str(error)
        record.ended = now()
        return lambda: "".join(texts)

    return ask
