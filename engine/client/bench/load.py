"""The load generator: plays conversations against anything that answers, and notes when each piece came.

What answers is an `Ask`, a function from a prompt and a length to a stream of chunks: a server over HTTP or an
engine in the process. Little is done between two pieces (a clock read and an append), so that the client does
not measure itself. With `rate` a request's clock starts when it was due, not when the generator got to it.
"""

import itertools
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing

import anyio
from msgspec import Struct

from engine.client.bench.traffic import Conversation, arrivals
from engine.errors import EngineError
from engine.messages.reply import Chunk

Ask = Callable[[str, int], AsyncGenerator[Chunk, None]]


class Record(Struct):
    """One request as its client saw it. Times are in seconds since the run began; `pieces` has one for each piece
    of text. A count is 0 if the server did not give it."""

    sent: float
    pieces: list[float]
    ended: float = 0.0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

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
    on_reply: Callable[[], None] = lambda: None,
) -> Run:
    """Play `conversations`: at `rate` a second, or else `concurrency` at a time (all at once without either)."""
    records: list[Record] = []
    began = time.perf_counter()

    def now() -> float:
        return time.perf_counter() - began

    async def converse(conversation: Conversation, due: float) -> None:
        history = ""
        for turn in conversation:
            record = Record(due, [])
            records.append(record)
            history += turn.text
            history += await _reply(ask(history, turn.output_len), turn.output_len, record, now)
            on_reply()
            if record.error is not None:
                return
            due = now()

    async def keep_one_open(left: Iterator[Conversation]) -> None:
        for conversation in left:
            await converse(conversation, now())

    async with anyio.create_task_group() as group:
        if rate is not None:
            for conversation, due in zip(conversations, arrivals(rate, seed), strict=False):
                await anyio.sleep(max(0.0, due - now()))
                group.start_soon(converse, conversation, due)
        else:
            left = iter(conversations)
            for _ in range(min(concurrency or len(conversations), len(conversations))):
                group.start_soon(keep_one_open, left)
    first = min((record.sent for record in records), default=0.0)
    last = max((record.ended for record in records), default=0.0)
    return Run(records, sum(map(len, conversations)), last - first)


async def _reply(chunks: AsyncGenerator[Chunk, None], output_len: int, record: Record, now: Callable[[], float]) -> str:
    """Take a whole reply into `record`; its text."""
    texts: list[str] = []
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                if chunk.text:
                    record.pieces.append(now())
                    texts.append(chunk.text)
        if not record.pieces:  # tokens without a text, such as half a character
            record.pieces.append(now())
        record.input_tokens, record.cached_tokens = chunk.prompt_tokens, chunk.cached_tokens
        # A server that counts nothing has said all that was asked for, or each token in a piece of its own.
        uncounted = output_len if chunk.finish == "length" else len(record.pieces)
        record.output_tokens = chunk.completion_tokens or uncounted
    except EngineError as error:
        record.error = str(error)
    record.ended = now()
    return "".join(texts)
