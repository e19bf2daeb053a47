"""The detokenizer actor: tokens become text, and a stop string ends a reply.

`Replies` is the logic: one open reply a request, fed with the `Tokens` of each step. Most rows of most steps are plain:
new tokens, neither the first nor the last of their reply, with nothing beside them. Their text goes straight into the
request's mailbox, and no struct is made. Any other row is answered with a `Chunk`. Unknown rids are ignored: a reply
that a stop string ended may still get the token of a step that was already in flight.
"""

from array import array
from collections.abc import Mapping
from time import perf_counter
from types import MappingProxyType

import msgspec

from engine.errors import RequestError
from engine.messages import FromFront, ToDetokenizer
from engine.messages.reply import Chunk, Failed, Finish, TokenLogprob, Tokens
from engine.messages.request import Open, StopHit
from engine.messages.step import Logprobs
from engine.runtime.channel import Outbox, Receiver
from engine.runtime.mailbox import Mailbox
from engine.text.decoding import ReplyDecoder
from engine.text.tokenizer import Text

IMPOSSIBLE = -9999.0  # the log-probability of what cannot be, which JSON has no number for
NOWHERE: Mapping[str, Mailbox] = MappingProxyType({})


class Reply:
    """One request's text so far: what its decoder holds and the counts that go with it."""

    __slots__ = (
        *("box", "cached_tokens", "completion_tokens", "decoder", "echo"),
        *("include_stop", "plain", "plain_decoder", "prompt", "prompt_ids", "prompt_only", "prompt_tokens", "shown"),
    )

    def __init__(self, decoder: ReplyDecoder, opened: Open) -> None:
        self.decoder = decoder
        self.plain_decoder = decoder.decoder
        self.box: Mailbox | None = None  # where plain tokens go, once the first chunk is there
        self.prompt_tokens = opened.prompt_tokens
        self.shown = opened.shown
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


class Beside:
    """What the `Tokens` of a step say beside tokens, by row; `rows` are those that it says anything of."""

    def __init__(self, message: Tokens) -> None:
        self.finishes = {finish.row: finish for finish in message.finishes}
        self.cached, self.prefills = dict(message.cached), dict(message.prefills)
        self.scores = {part.row: part for part in message.logprobs}
        self.prompts = {part.row: part for part in message.prompt_logprobs}
        self.vectors = dict(message.vectors)
        self.rows = {*self.finishes, *self.cached, *self.prefills, *self.scores, *self.prompts, *self.vectors}


class Replies:
    """The open replies, by rid. `boxes` are the mailboxes of requests, by rid too."""

    def __init__(self, text: Text, boxes: Mapping[str, Mailbox] = NOWHERE) -> None:
        self._text = text
        self._boxes = boxes
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

    def tokens(self, message: Tokens, now: float = 0.0) -> tuple[list[Chunk], list[StopHit], list[Failed]]:
        """The chunks of one step, which came at `now`, and the replies that a stop string has ended in it, or an error.

        Plain rows are in their mailboxes already, if they have one."""
        chunks: list[Chunk] = []
        hits: list[StopHit] = []
        failures: list[Failed] = []
        beside = Beside(message)
        told = beside.rows
        flat = array("i", message.tokens).tolist()
        at = 0
        for row, (rid, count) in enumerate(zip(message.rids, array("i", message.counts), strict=True)):
            ids = flat[at : at + count]
            at += count
            reply = self._open.get(rid)
            if reply is None:
                continue
            if ids and row not in told and (box := reply.box) is not None:  # most rows of most steps
                reply.completion_tokens += count
                decoder = reply.plain_decoder
                text = decoder.texts[ids[0]] if count == 1 else None
                box.taker.tokens(decoder.push(ids) if text is None else text, ids, now)
                continue
            try:
                chunk = self._row(rid, reply, ids, row=row, beside=beside, hits=hits)
            except RequestError as error:
                self.close(rid)
                hits.append(StopHit(rid, reply.decoder.used))
                failures.append(Failed.of(rid, error))
                continue
            if chunk is not None:
                chunks.append(chunk)
                if reply.plain:
                    reply.box = self._boxes.get(rid)
        return chunks, hits, failures

    def _row(
        self, rid: str, reply: Reply, ids: list[int], *, row: int, beside: Beside, hits: list[StopHit]
    ) -> Chunk | None:
        """What a row says, None if that is nothing; to `hits` comes a stop in it that the scheduler does not know of.

        Raises RequestError when a stop expression takes too long."""
        if row in beside.cached:
            reply.cached_tokens = beside.cached[row]
        chunk, ended_here = self._advance(rid, reply, ids, beside.finishes.get(row))
        if ended_here:
            hits.append(StopHit(rid, reply.decoder.kept))
        if chunk.finish is not None:
            self.close(rid)
        elif not chunk.text and not chunk.ids:
            return None
        if row in beside.vectors:
            chunk = msgspec.structs.replace(chunk, vector=beside.vectors[row])
        if reply.echo or reply.prompt is not None or reply.prompt_ids or row in beside.scores:
            chunk = self._completed(chunk, reply, beside.scores.get(row), beside.prompts.get(row))
        if row in beside.prefills:
            chunk = msgspec.structs.replace(chunk, prefill_seconds=beside.prefills[row])
        return chunk

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
        counts = (reply.prompt_tokens, reply.cached_tokens, reply.completion_tokens)
        chunk = Chunk(rid, text, ids, reason, matched, *counts, shown=reply.shown)
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
    """Puts replies into `boxes`, the mailboxes of the front of this process, by rid."""

    name = "detokenizer"

    def __init__(
        self,
        text: Text,
        boxes: Mapping[str, Mailbox],
        inbox: Receiver[ToDetokenizer],
        scheduler: Outbox[FromFront],
    ) -> None:
        self.replies = Replies(text, boxes)
        self.boxes = boxes
        self.inbox = inbox
        self.scheduler = scheduler

    async def run(self) -> None:
        async for message in self.inbox:
            match message:
                case Tokens():
                    await self._tell(message)
                case Open():
                    self.replies.open(message)
                case Failed():
                    self.replies.close(message.rid)
                    self._fail(message)

    async def _tell(self, message: Tokens) -> None:
        now = perf_counter()
        chunks, hits, failures = self.replies.tokens(message, now)
        for failure in failures:
            self._fail(failure)
        for chunk in chunks:
            if (box := self.boxes.get(chunk.rid)) is not None:
                box.put(chunk, now)
        for hit in hits:
            await self.scheduler.send(hit)

    def _fail(self, failed: Failed) -> None:
        if (box := self.boxes.get(failed.rid)) is not None:
            box.fail(failed.error)
