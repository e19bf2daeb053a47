"""The tokenizer actor: what a client sent becomes token ids and a checked `Admit`.

`Admission` is the logic; the actor moves messages. Prompts that come together are rendered in slices, between which
replies go on, and encoded together in a thread, where the tokenizer holds no lock; a short one alone is encoded here
and now. A long prompt is rendered and encoded in a process of the text pool, and shorter prompts that came later go
past it. A request's messages stay in order all the same: its Open comes before its Admit, and an Abort ends it in the
pool or follows its Admit.
"""

import random
import time
from array import array
from collections.abc import Iterable
from typing import Any, Protocol

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread

from engine.cache.keys import keys_with
from engine.conversation.media import Placed, cannot_be_cut, needs_of, scored_after
from engine.errors import RequestError, counted, let_go
from engine.messages import FromFront, ToDetokenizer, ToTokenizer
from engine.messages.assets import Need
from engine.messages.cache import Blocks
from engine.messages.control import WorkerReady
from engine.messages.decoding import tokens_of
from engine.messages.grammars import grammar_need
from engine.messages.reply import Failed, Tokens
from engine.messages.request import Abort, Admit, Embed, Generate, Job, Open
from engine.messages.text import Prepare, Prepared, TextAnswer, TextJob
from engine.params.grammar import Grammar
from engine.params.lengths import THE_INPUT, check_length, check_unicode, prompt_too_long
from engine.params.sampling import HANDED_ON, OPTIONAL, Sampling, SamplingParams
from engine.runtime.actor import first_failure
from engine.runtime.channel import Outbox, Receiver, received
from engine.text.blocks import Widths, blocks_of, is_plain
from engine.text.tokenizer import Prompt, Text, TooWide

MOST_CUT = 1 << 16  # tokens of a prompt of which only the last are kept, as far as its characters tell
Encoded = tuple[Prompt, list[int]]  # and what the tokenizer made of it
SLICE = 0.002  # seconds of rendering after which others have their turn
AT_ONCE = 2_000  # characters that are encoded in the event loop: a thread would take as long to get going
FIRST_TOGETHER, MOST_TOGETHER = 4, 32  # prompts that are encoded at a time: few first, so that the device can begin
MOST_CHARACTERS = 1 << 15  # of those
UNSAMPLED = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)  # of a vector, no token is


class Admission:
    """Turns a job into what the detokenizer and the scheduler need to know of it."""

    def __init__(self, text: Text, grammars: bool = True, *, named: bool = False) -> None:
        self.text = text
        self.grammars = grammars  # whether an engine for them is installed
        self.named = named  # whether the scheduler is told what routers know prompts by
        self._widths = Widths(text.spelling)
        self.max_model_len: int | None = None
        self.vocab_size = text.vocab_size  # the model's, which may have fewer rows, once the worker says so
        self._seeds = random.SystemRandom()

    def written(self, request: Job) -> Prompt | None:
        """The text of `request` as it is encoded; None where it has none, or only its beginning is encoded.

        Raises RequestError: too long a prompt, a bad template."""
        if isinstance(request, Embed):
            whole = request.text is not None and request.first is None
            return self.text.prompt(request.text or "", most=self.max_model_len, name="input") if whole else None
        try:
            return self._written(request)
        except TooWide as error:
            assert self.max_model_len is not None, "requests are let in only once the worker is ready"
            raise prompt_too_long(error.least, self.max_model_len, characters=error.characters) from None

    def _written(self, request: Generate) -> Prompt | None:
        most = self.max_model_len if request.last is None else MOST_CUT
        if request.messages is not None:
            return self.text.conversation(
                request.messages,
                media=request.media,
                opening=request.opening,
                special=bool(request.special),
                most=most,
                tools=request.tools,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
                template_kwargs=request.template_kwargs,
                chat_template=request.chat_template,
            )
        return None if request.text is None else self.text.prompt(request.text, request.special is not False, most=most)

    def admit(self, request: Job, encoded: Encoded | None = None) -> tuple[Open, Admit]:
        """`encoded` is what `written` and the tokenizer have made of it, if they have.

        Raises RequestError: no or too long a prompt, an id outside the vocabulary, a bad template."""
        if encoded is None and (prompt := self.written(request)) is not None:
            encoded = prompt, self.text.encode_prompts([prompt])[0]
        return (
            self._admit_vector(request, encoded) if isinstance(request, Embed) else self._admit_text(request, encoded)
        )

    def _admit_text(self, request: Generate, encoded: Encoded | None) -> tuple[Open, Admit]:
        ids, keys = self._ids_and_keys(request, placed := self._placed(request, encoded))
        params = request.sampling
        default = request.default_max_tokens or self.text.defaults.max_new_tokens
        max_new = self._max_new(len(ids), params.max_tokens, default)
        if params.min_tokens > max_new:
            raise RequestError(
                "{min_tokens} is {least}, but the reply may have {most}; lower it",
                param="min_tokens",
                facts={"least": params.min_tokens, "most": counted(max_new, "token")},
            )
        stop_ids = self._stop_ids(params)
        after = scored_after(request.scored_after, len(ids), placed)
        opened = Open(
            request.rid,
            len(ids),
            params.stop,
            params.stop_regex,
            params.min_tokens,
            self._echo(request, ids) if request.echo else "",
            None if params.prompt_logprobs is None else ids[after:].tobytes(),
            prompt_only=max_new == 0,
            skip_special_tokens=params.skip_special_tokens,
            include_stop=params.include_stop_str_in_output,
            detokenize=params.detokenize,
            show_marks=request.show_marks,
            prompt_ids=ids.tobytes() if request.tell_prompt else b"",
            shown=tokens_of(request.media),
        )
        check_unicode(request.cache_salt, "cache_salt")
        admitted = Admit(
            request.rid,
            ids.tobytes(),
            self._sampling(params, stop_ids),
            stop_ids,
            max(max_new, 1),
            request.priority,
            request.cache_salt,
            self._needs(request, placed),
            keys=keys,
            scored_after=after,
            blocks=self._blocks(request, encoded, ids) if self.named and not keys else None,
            session=request.session,
            program=request.program,
            positions=placed.positions,
        )
        return opened, admitted

    def _echo(self, request: Generate, ids: "array[int]") -> str:
        """What a reply begins with that echoes the prompt."""
        if not request.sampling.detokenize:
            raise RequestError("echo and detokenize: false exclude each other; send one", param="detokenize")
        skips = request.sampling.skip_special_tokens
        return self.text.decode(ids.tolist(), skips) if request.text is None else request.text

    def _blocks(self, request: Generate, encoded: Encoded | None, ids: "array[int]") -> Blocks | None:
        """What routers know the prompt `ids` by, where they can."""
        return blocks_of(request, encoded and encoded[0].text, ids, self._widths) if is_plain(request) else None

    def _needs(self, request: Generate, placed: Placed) -> tuple[Need, ...]:
        """What must be on the device before `request` runs; RequestError where that cannot be."""
        grammar = self._grammar(request)
        media = needs_of(request.media, placed)
        return media if grammar is None else (*media, grammar_need(grammar))

    def _grammar(self, request: Generate) -> Grammar | None:
        """The grammar that is asked for; RequestError where none can be followed."""
        if (grammar := request.grammar) is None:
            return None
        if not self.grammars:
            raise RequestError(
                f"a {grammar.kind} is asked for, and no grammar engine is installed here; pip install llguidance",
                param="grammar",
                code="no_grammar_engine",
            )
        if not self.text.spec.eos_ids:
            raise RequestError(
                f"a {grammar.kind} is asked for, and the model has no end token, so that the reply could not end where "
                "it must; leave it out",
                param="grammar",
                code="no_end_token",
            )
        return grammar

    def _admit_vector(self, request: Embed, encoded: Encoded | None) -> tuple[Open, Admit]:
        assert self.max_model_len is not None, "requests are let in only once the worker is ready"
        ids = self._encode_vector(request, encoded, self.max_model_len)
        self._check_ids(ids, "input")
        if len(ids) > self.max_model_len:
            raise RequestError(
                "{input} has {tokens} tokens, and the model takes at most {most}; shorten it, or send it in parts",
                param="input",
                code="context_length_exceeded",
                facts={**THE_INPUT, "tokens": len(ids), "most": self.max_model_len},
            )
        opened = Open(request.rid, len(ids), (), detokenize=False)
        return opened, Admit(request.rid, ids.tobytes(), UNSAMPLED, (), 0, request.priority)

    def _encode_vector(self, request: Embed, encoded: Encoded | None, most: int) -> "array[int]":
        """The tokens that the vector is made of."""
        if encoded is not None:
            return array("i", self.text.finished(*encoded).ids)
        kept = most if request.first == -1 else request.first
        if request.text is not None and kept is not None:
            return array("i", self.text.encode_first(request.text, kept, most=MOST_CUT, name="input"))
        ids = array("i", request.ids or b"")
        return ids if kept is None else ids[:kept]

    def _sampling(self, params: SamplingParams, stop_ids: tuple[int, ...]) -> Sampling:
        """What the device needs to know of `params`."""
        self._check_known("logit_bias", params.logit_bias)
        self._check_known("allowed_token_ids", params.allowed_token_ids)
        bad_words = self._bad_words(params.bad_words)
        if params.allowed_token_ids:
            banned = {word[0] for word in bad_words if len(word) == 1}
            banned |= set(stop_ids) if params.min_tokens else set()
            if banned.issuperset(params.allowed_token_ids):
                raise RequestError(
                    "bad_words and the tokens that min_tokens holds back leave none of allowed_token_ids; allow more",
                    param="allowed_token_ids",
                )
        used = self.text.defaults.under(params)
        fields: dict[str, Any] = {name: getattr(used, name) for name in OPTIONAL}
        fields |= {name: getattr(params, name) for name in HANDED_ON}
        fields["top_k"] = max(used.top_k, 0)
        return Sampling(
            **fields,
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            bias_ids=array("i", params.logit_bias).tobytes(),
            biases=array("f", params.logit_bias.values()).tobytes(),
            stop_ids=array("i", stop_ids if params.min_tokens else ()).tobytes(),
            bad_words=tuple(array("i", word).tobytes() for word in bad_words),
            allowed_ids=array("i", params.allowed_token_ids).tobytes(),
            logprobs=-1 if params.logprobs is None else params.logprobs,
            prompt_logprobs=-1 if params.prompt_logprobs is None else params.prompt_logprobs,
        )

    def _bad_words(self, words: tuple[str, ...]) -> list[tuple[int, ...]]:
        """The token sequences that say one of `words`: at the beginning of a text, and after a space."""
        for word in words:
            check_unicode(word, "bad_words")
        encoded = (
            tuple(self.text.encode(text, add_special_tokens=False)) for word in words for text in (word, " " + word)
        )
        return [word for word in dict.fromkeys(encoded) if word]

    def _check_known(self, name: str, ids: Iterable[int]) -> None:
        for token in ids:
            if token >= self.vocab_size:
                raise RequestError(
                    f"{{{name}}} holds token id {token}, which is outside the model's vocabulary; use ids from 0 to "
                    f"{self.vocab_size - 1}",
                    param=name,
                    facts={},
                )

    def _placed(self, request: Generate, encoded: Encoded | None) -> Placed:
        """The prompt, with its media in their places."""
        if encoded is not None:
            return self.text.finished(*encoded, request.media)
        return self.text.placed(array("i", request.ids or b""), request.media)

    def _ids_and_keys(self, request: Generate, placed: Placed) -> tuple["array[int]", bytes]:
        """The ids of the prompt and their keys, as Admit has these."""
        ids = array("i", placed.ids)
        self._check_ids(ids, "prompt")
        keys = keys_with(ids, placed.runs)
        first = 0 if request.last is None else -self._kept(request.last, request.sampling.max_tokens)
        if placed.spans and -len(ids) < first < 0:
            raise cannot_be_cut(len(ids), -first)
        return ids[first:], b"" if keys is ids else keys[first:].tobytes()

    def _kept(self, last: int, new: int | None) -> int:
        """How many tokens of a prompt stay; a `last` of -1 leaves room for `new`, or one."""
        assert self.max_model_len is not None, "requests are let in only once the worker is ready"
        return last if last != -1 else max(1, self.max_model_len - (1 if new is None else new))

    def _check_ids(self, ids: "array[int]", name: str) -> None:
        if not ids:
            what = "{input}" if name == "input" else "the {prompt}"
            raise RequestError(f"{what} is empty; send at least one token", param=name, facts=THE_INPUT)
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(token for token in ids if not 0 <= token < self.vocab_size)
            raise RequestError(
                f"token id {wrong} is outside the model's vocabulary; use ids from 0 to {self.vocab_size - 1}",
                param=name,
            )

    def _max_new(self, prompt: int, wanted: int | None, default: int | None) -> int:
        assert self.max_model_len is not None, "requests are let in only once the worker is ready"
        check_length(prompt, 1 if wanted is None else wanted, self.max_model_len)
        if wanted is not None:
            return wanted
        room = self.max_model_len - prompt
        return room if default is None else min(room, default)

    def _stop_ids(self, params: SamplingParams) -> tuple[int, ...]:
        own = () if params.ignore_eos else self.text.spec.eos_ids
        return tuple(dict.fromkeys((*own, *params.stop_token_ids)))


class Pool(Protocol):
    """Who admits what is long: engine.text.pool.TextPool."""

    def is_large(self, job: TextJob, /) -> bool: ...
    async def ask(self, job: TextJob, /) -> TextAnswer: ...


class Underway:
    """A request that is with the pool. Its Abort ends that, or follows its Admit."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True
        self.scope.cancel()


class TokenizerActor:
    name = "tokenizer"

    def __init__(
        self,
        admission: Admission,
        inbox: Receiver[ToTokenizer],
        detokenizer: Outbox[ToDetokenizer],
        scheduler: Outbox[FromFront],
        pool: Pool,
    ) -> None:
        self.admission = admission
        self.inbox = inbox
        self.detokenizer = detokenizer
        self.scheduler = scheduler
        self.pool = pool
        self._underway: dict[str, Underway] = {}

    async def run(self) -> None:
        try:
            async with anyio.create_task_group() as group:
                async for message in self.inbox:
                    messages = received(self.inbox, message)
                    del message  # not held while the next one is waited for
                    await self._take(messages, group)
                    del messages
                group.cancel_scope.cancel()
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from None

    async def _take(self, messages: list[ToTokenizer], group: anyio.abc.TaskGroup) -> None:
        """Do what `messages` ask for, in order; requests that stand together are encoded together."""
        together: list[Job] = []
        for message in messages:
            if isinstance(message, Generate | Embed) and not self._is_large(message):
                together.append(message)
                continue
            await self._admit_all(together)
            together = []
            match message:
                case Generate() | Embed():
                    self._underway[message.rid] = underway = Underway()
                    group.start_soon(self._elsewhere, self._job(message), underway)
                case Abort():
                    if (found := self._underway.get(message.rid)) is not None:
                        found.abort()
                    else:
                        await self.scheduler.send(message)
                case WorkerReady():
                    self.admission.max_model_len = message.max_model_len
                    self.admission.vocab_size = message.vocab_size
        await self._admit_all(together)

    def _job(self, request: Job) -> Prepare:
        length, vocabulary = self.admission.max_model_len, self.admission.vocab_size
        assert length is not None, "requests are let in only once the worker is ready"
        return Prepare(request, length, vocabulary)

    def _is_large(self, request: Job) -> bool:
        return self.pool.is_large(self._job(request))

    async def _admit_all(self, requests: list[Job]) -> None:
        """In order, and so many at a time that the first ones need not wait for all."""
        some: list[tuple[Job, Prompt | None]] = []
        together, characters, began = FIRST_TOGETHER, 0, time.perf_counter()
        for request in requests:
            try:
                prompt = self.admission.written(request)
            except (RequestError, RecursionError) as error:
                await self._refuse(request.rid, error)
                continue
            some.append((request, prompt))
            characters += 0 if prompt is None else len(prompt.text)
            if len(some) >= together or characters > MOST_CHARACTERS:
                await self._admit_some(some, characters)
                some, characters, began = [], 0, time.perf_counter()
                together = min(2 * together, MOST_TOGETHER)
            elif time.perf_counter() - began > SLICE:
                await anyio.lowlevel.checkpoint()
                began = time.perf_counter()
        await self._admit_some(some, characters)

    async def _admit_some(self, some: list[tuple[Job, Prompt | None]], characters: int) -> None:
        """Encode the prompts together, and hand each request on."""
        encode = self.admission.text.encode_prompts
        prompts = [prompt for _, prompt in some if prompt is not None]
        if characters > AT_ONCE:
            ids = iter(await anyio.to_thread.run_sync(encode, prompts))
        else:
            ids = iter(encode(prompts) if prompts else ())
        for request, prompt in some:
            encoded = None if prompt is None else (prompt, next(ids))
            try:
                opened, admitted = self.admission.admit(request, encoded)
            except (RequestError, RecursionError) as error:
                await self._refuse(request.rid, error)
            else:
                await self.detokenizer.send(opened)
                await self.scheduler.send(admitted)

    async def _elsewhere(self, job: Prepare, underway: Underway) -> None:
        """Have the pool do `job`, while others go past it."""
        rid = job.job.rid
        try:
            with underway.scope:
                answer = await self.pool.ask(job)
            if underway.scope.cancelled_caught:
                await self._end(rid)
                return
            assert isinstance(answer, Prepared), f"a Prepare was answered by {type(answer).__name__}"
            await self.detokenizer.send(answer.opened)
            await self.scheduler.send(answer.admitted)
            if underway.aborted:  # meanwhile
                await self.scheduler.send(Abort(rid))
        except RequestError as error:
            await self._refuse(rid, error)
        finally:
            del self._underway[rid]

    async def _end(self, rid: str) -> None:
        """End a request of which the scheduler knows nothing, as it would."""
        await self.detokenizer.send(Open(rid, 0, ()))
        await self.detokenizer.send(Tokens.aborted(rid))

    async def _refuse(self, rid: str, error: RequestError | RecursionError) -> None:
        let_go(error)
        if isinstance(error, RecursionError):
            error = RequestError("the request nests too deeply; flatten it")
        await self.detokenizer.send(Failed.of(rid, error))
