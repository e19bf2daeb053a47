"""The detokenizer actor: tokens become text, and a stop string ends a reply.

`Replies` is the logic: one open reply a request, fed with the `Tokens` of each step, answering with one
`Chunk` for each request that has something to say. Unknown rids are ignored: a reply that a stop string
ended may still get the token of a step that was already in flight.
"""

from array import array

from anyio.streams.memory import MemoryObjectReceiveStream

from engine.channel import Outbox
from engine.messages import Chunk, Chunks, Failed, FromFront, Open, StopHit, ToDetokenizer, ToHttp, Tokens
from engine.text import ReplyDecoder, Text


class Reply:
    """One request's text so far: what its decoder holds and the counts that go with it."""

    __slots__ = ("cached_tokens", "completion_tokens", "decoder", "prompt_tokens")

    def __init__(self, decoder: ReplyDecoder, prompt_tokens: int) -> None:
        self.decoder = decoder
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.completion_tokens = 0


class Replies:
    """The open replies, by rid."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._open: dict[str, Reply] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, message: Open) -> None:
        self._open[message.rid] = Reply(self._text.reply(message.stop), message.prompt_tokens)

    def close(self, rid: str) -> None:
        self._open.pop(rid, None)

    def tokens(self, message: Tokens) -> tuple[list[Chunk], list[StopHit]]:
        """The chunks of one step, and the replies that a stop string has ended in it."""
        chunks: list[Chunk] = []
        hits: list[StopHit] = []
        finishes = {finish.row: finish for finish in message.finishes}
        cached = dict(message.cached)
        flat = array("i", message.tokens).tolist()
        at = 0
        for row, (rid, count) in enumerate(zip(message.rids, array("i", message.counts), strict=True)):
            ids = flat[at : at + count]
            at += count
            reply = self._open.get(rid)
            if reply is None:
                continue
            if row in cached:
                reply.cached_tokens = cached[row]
            before = reply.completion_tokens
            reply.completion_tokens += count
            decoder = reply.decoder
            finish = finishes.get(row)
            # The token that ended the reply (an end token, a stop id) is counted and sent but is not text.
            matched: int | str | None = finish.matched if finish else None
            reason = finish.reason if finish else None
            text = decoder.push(ids[:-1] if matched is not None else ids) if ids else ""
            if reason is not None:
                text += decoder.flush()
            if decoder.matched is not None:
                if reason is None:
                    hits.append(StopHit(rid, decoder.kept))
                matched, reason = decoder.matched, "stop"
                reply.completion_tokens = decoder.used
                del ids[decoder.used - before :]
            if reason is not None:
                del self._open[rid]
            elif not text and not ids:
                continue
            chunks.append(
                Chunk(
                    rid,
                    text,
                    ids,
                    reason,
                    matched,
                    reply.prompt_tokens,
                    reply.cached_tokens,
                    reply.completion_tokens,
                )
            )
        return chunks, hits


class DetokenizerActor:
    name = "detokenizer"

    def __init__(
        self,
        replies: Replies,
        inbox: MemoryObjectReceiveStream[ToDetokenizer],
        scheduler: Outbox[FromFront],
        http: Outbox[ToHttp],
    ) -> None:
        self.replies = replies
        self.inbox = inbox
        self.scheduler = scheduler
        self.http = http

    async def run(self) -> None:
        async for message in self.inbox:
            match message:
                case Open():
                    self.replies.open(message)
                case Failed():
                    self.replies.close(message.rid)
                    await self.http.send(message)
                case Tokens():
                    chunks, hits = self.replies.tokens(message)
                    for hit in hits:
                        await self.scheduler.send(hit)
                    if chunks:
                        await self.http.send(Chunks(chunks))
