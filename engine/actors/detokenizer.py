"""The detokenizer actor: tokens become text, and a stop string ends a reply.

`Replies` is the logic: one open reply a request, fed with the `Tokens` of each step, answering with one
`Chunk` for each request that has something to say. Unknown rids are ignored: a reply that a stop string
ended may still get the token of a step that was already in flight.
"""

from array import array

import msgspec
from anyio.streams.memory import MemoryObjectReceiveStream

from engine.errors import RequestError
from engine.messages import FromFront, ToDetokenizer, ToHttp
from engine.messages.reply import Chunk, Chunks, Failed, Finish, TokenLogprob, Tokens
from engine.messages.request import Open, StopHit
from engine.messages.step import Logprobs
from engine.runtime.channel import Outbox
from engine.text.decoding import ReplyDecoder
from engine.text.tokenizer import Text

IMPOSSIBLE = -9999.0  # the log-probability of what cannot be, which JSON has no number for


class Reply:
    """One request's text so far: what its decoder holds and the counts that go with it."""

    __slots__ = (
        *("cached_tokens", "completion_tokens", "decoder", "echo"),
        *("include_stop", "plain", "prompt", "prompt_ids", "prompt_only", "prompt_tokens"),
    )

    def __init__(self, decoder: ReplyDecoder, opened: Open) -> None:
        self.decoder = decoder
        self.prompt_tokens = opened.prompt_tokens
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.echo = opened.echo  # until it is sent
        self.prompt = opened.prompt  # until its log-probabilities are sent
        self.prompt_ids = opened.prompt_ids  # until they are sent
        self.prompt_only = opened.prompt_only
        self.include_stop = opened.include_stop
        # Nothing but the scheduler ends it, and its chunks hold nothing but new tokens.
        about_prompt = opened.echo or opened.prompt or opened.prompt_ids or opened.prompt_only
        self.plain = not (opened.stop or opened.stop_regex or about_prompt)


class Replies:
    """The open replies, by rid."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._open: dict[str, Reply] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, message: Open) -> None:
        decoder = self._text.reply(
            message.stop,
            message.stop_regex,
            message.min_tokens,
            skip_special_tokens=message.skip_special_tokens,
            include_stop=message.include_stop,
            detokenize=message.detokenize,
            show_marks=message.show_marks,
        )
        self._open[message.rid] = Reply(decoder, message)

    def close(self, rid: str) -> None:
        self._open.pop(rid, None)

    def tokens(self, message: Tokens) -> tuple[list[Chunk], list[StopHit], list[Failed]]:
        """The chunks of one step, and the replies that a stop string has ended in it, or an error."""
        chunks: list[Chunk] = []
        hits: list[StopHit] = []
        failures: list[Failed] = []
        finishes = {finish.row: finish for finish in message.finishes}
        cached, prefills = dict(message.cached), dict(message.prefills)
        scores = {part.row: part for part in message.logprobs}
        prompts = {part.row: part for part in message.prompt_logprobs}
        vectors = dict(message.vectors)
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
            finish = finishes.get(row)
            if reply.plain and finish is None and row not in scores and row not in prefills:  # most rows of most steps
                reply.completion_tokens += count
                text, counts = reply.decoder.push(ids), (reply.prompt_tokens, reply.cached_tokens)
                chunks.append(Chunk(rid, text, ids, None, None, *counts, reply.completion_tokens))
                continue
            try:
                chunk, ended_here = self._advance(rid, reply, ids, finish)
            except RequestError as error:
                self.close(rid)
                hits.append(StopHit(rid, reply.decoder.used))
                failures.append(Failed.of(rid, error))
                continue
            if ended_here:
                hits.append(StopHit(rid, reply.decoder.kept))
            if chunk.finish is not None:
                self.close(rid)
            elif not chunk.text and not chunk.ids:
                continue
            if row in vectors:
                chunk = msgspec.structs.replace(chunk, vector=vectors[row])
            if reply.echo or reply.prompt is not None or reply.prompt_ids or row in scores:
                chunk = self._completed(chunk, reply, scores.get(row), prompts.get(row))
            if row in prefills:
                chunk = msgspec.structs.replace(chunk, prefill_seconds=prefills[row])
            chunks.append(chunk)
        return chunks, hits, failures

    def _advance(self, rid: str, reply: Reply, ids: list[int], finish: Finish | None) -> tuple[Chunk, bool]:
        """What the new `ids` of `reply` say, and whether they hold a stop that the scheduler does not know of.

        Raises RequestError when a stop expression takes too long."""
        if reply.prompt_only and ids:
            ids, finish = [], Finish(0, "length")
        before = reply.completion_tokens
        reply.completion_tokens += len(ids)
        decoder = reply.decoder
        # The token that ended the reply (an end token, a stop id) is counted and sent but is text only if asked for.
        matched: int | str | None = finish.matched if finish else None
        reason = finish.reason if finish else None
        silent = matched is not None and not reply.include_stop
        text = decoder.push(ids[:-1] if silent else ids) if ids else ""
        if reason is not None:
            text += decoder.flush()
        unknown = reason is None and decoder.matched is not None
        if decoder.matched is not None:
            matched, reason = decoder.matched, "stop"
            reply.completion_tokens = decoder.used
            del ids[decoder.used - before :]
        chunk = Chunk(
            rid, text, ids, reason, matched, reply.prompt_tokens, reply.cached_tokens, reply.completion_tokens
        )
        return chunk, unknown

    def _completed(self, chunk: Chunk, reply: Reply, scores: Logprobs | None, prompt: Logprobs | None) -> Chunk:
        """`chunk` with the log-probabilities of its ids, and the first one with what is to be said of the prompt."""
        text, reply.echo = reply.echo + chunk.text, ""
        logprobs: tuple[TokenLogprob, ...] = ()
        if scores is not None:
            logprobs = self._spelled(chunk.ids, scores)
        prompt_logprobs: tuple[TokenLogprob, ...] = ()
        if reply.prompt is not None and (chunk.ids or reply.prompt_only):
            first, *rest = array("i", reply.prompt)
            reply.prompt = None
            prompt_logprobs = (self._token(first, None, 0),)
            if prompt is not None:
                prompt_logprobs += self._spelled(rest, prompt)
        ids, reply.prompt_ids = reply.prompt_ids, b""
        return msgspec.structs.replace(
            chunk, text=text, logprobs=logprobs, prompt_logprobs=prompt_logprobs, prompt_ids=ids
        )

    def _spelled(self, ids: list[int], scores: Logprobs) -> tuple[TokenLogprob, ...]:
        """The log-probabilities of `ids`, the first that `scores` holds."""
        own, ranks = array("f", scores.logprobs), array("i", scores.ranks)
        top_ids, top = array("i", scores.top_ids), array("f", scores.top_logprobs)
        wide = len(top_ids) // len(ranks)
        spelled = []
        for index, id in enumerate(ids):
            likeliest = tuple(
                self._token(top_ids[place], top[place], rank)
                for rank, place in enumerate(range(index * wide, (index + 1) * wide), start=1)
            )
            spelled.append(self._token(id, own[index], ranks[index], likeliest))
        return tuple(spelled)

    def _token(self, id: int, logprob: float | None, rank: int, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        spelled = self._text.spelling[id]
        value = None if logprob is None else max(logprob, IMPOSSIBLE)
        return TokenLogprob(id, spelled.decode(errors="replace"), spelled, value, rank, top)


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
                    chunks, hits, failures = self.replies.tokens(message)
                    for hit in hits:
                        await self.scheduler.send(hit)
                    for failure in failures:
                        await self.http.send(failure)
                    if chunks:
                        await self.http.send(Chunks(chunks))
