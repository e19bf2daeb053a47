"""/generate, shaped as SGLang's native endpoint: text or token ids in, text and token ids out.

A streamed event holds the reply so far, not what is new: clients of SGLang print the difference. Several prompts in
one request, or several replies to one, are answered with a list. Left out: audio, token_ids_logprob.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar
from uuid import uuid4

import anyio.lowlevel
import msgspec
from aiohttp import web
from msgspec import UNSET, Struct, UnsetType

from engine.errors import RequestError, Words, counted
from engine.http.fields import Rule, unserved
from engine.http.grammars import OWN_FIELDS, OwnGrammar
from engine.http.keys import owner_of
from engine.http.native.media import Given, ImageObject, VideoObject, shown_by
from engine.http.openapi import ErrorReply, Route
from engine.http.request_id import check_id
from engine.http.service import (
    SERVICE,
    answer,
    check_choices,
    pack_ids,
    program_of,
    rid_of,
    salt_of,
    sampled,
    session_of,
    told_apart,
)
from engine.http.sse import DONE, WORDS
from engine.http.wire import Body, Priority, Reply, TokenId, to_json
from engine.messages.reply import Chunk, TokenLogprob
from engine.messages.request import Generate
from engine.params.sampling import INT32_MAX, MAX_REGEXES, NATIVE, SamplingParams, check_sampling

MAX_NEW_TOKENS = 128  # SGLang's default
MAX_EXPRESSIONS = 64  # of stop_regex, in one request


@NATIVE.fields
class NativeSampling(OwnGrammar):
    """`sampling_params`. Null is the same as absent."""

    n: int | None = None
    spaces_between_special_tokens: Any = None
    custom_params: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {
        "spaces_between_special_tokens": unserved(True),
        "custom_params": unserved({}),
    }


class GenerateBody(Body):
    """One request or, where `text` or `input_ids` hold several prompts, a batch: then each of the fields that may be a
    list has an entry for each prompt, or one value for all."""

    text: str | list[str] | None = None
    input_ids: list[TokenId | list[TokenId]] | None = None
    sampling_params: NativeSampling | list[NativeSampling] | None = None
    stream: bool | None = None
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    return_text_in_logprobs: bool | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    program: str | None = None
    priority: Priority | None = None
    input_embeds: Any = None
    image_data: Given[ImageObject] = None
    audio_data: Any = None
    video_data: Given[VideoObject] = None
    token_ids_logprob: Any = None
    return_hidden_states: Any = None
    lora_path: Any = None
    custom_logit_processor: Any = None
    session_params: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {
        "input_embeds": unserved(),
        "audio_data": unserved([]),
        "token_ids_logprob": unserved([]),
        "return_hidden_states": unserved(False),
        "lora_path": unserved(""),
        "custom_logit_processor": unserved(),
        "session_params": unserved({}),
    }


class Stopped(Reply, tag_field="type", tag="stop", frozen=True):
    """`matched` is the stop string, the expression or the stop token id."""

    matched: int | str | None


class TooLong(Reply, tag_field="type", tag="length", frozen=True):
    length: int


class Aborted(Reply, tag_field="type", tag="abort", frozen=True):
    message: str = "the request was aborted"


ScoredToken = tuple[float | None, int, str | None]  # its log-probability, id and, if asked for, text


class MetaInfo(Reply, frozen=True):
    """Log-probabilities are there if asked for: of the prompt from a position on, and of the reply so far."""

    id: str
    finish_reason: Stopped | TooLong | Aborted | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    input_token_logprobs: list[ScoredToken] | UnsetType = UNSET
    input_top_logprobs: list[list[ScoredToken] | None] | UnsetType = UNSET
    output_token_logprobs: list[ScoredToken] | UnsetType = UNSET
    output_top_logprobs: list[list[ScoredToken] | None] | UnsetType = UNSET


class GenerateReply(Reply, frozen=True):
    """One reply. In an event it is the reply so far, and `index` says which of several it is."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | UnsetType = UNSET


def words_of(body: GenerateBody, index: int | None = None) -> Words:
    """How errors are told: by the path of a field in `body`, of prompt `index` where there is a list."""
    place = "sampling_params" if index is None else path_of(body, "sampling_params", index)
    names = {name: f"{place}.{own}" for name, own in {**NATIVE.names, "n": "n"}.items()}
    prompt = "text" if body.text is not None else "input_ids"
    top = "top_logprobs_num"
    media = "image_data" if body.image_data or not body.video_data else "video_data"
    if index is not None:
        prompt, top, media = (path_of(body, name, index) for name in (prompt, top, media))
    own = {"logprobs": top, "prompt_logprobs": top, "grammar": place, "prompt": prompt, "messages": media}
    return Words({**names, **own})


def prompt_words(body: GenerateBody, index: int) -> Words:
    """How errors of prompt `index` of several are told: the prompt is named where its sampling_params do not."""
    words = words_of(body, index)
    return words.at(words.names["prompt"])


def path_of(body: GenerateBody, name: str, index: int) -> str:
    """Where `body` has the field `name` of prompt `index`, of a batch."""
    return f"{name}[{index}]" if isinstance(getattr(body, name), list) else name


async def generate(request: web.Request, body: GenerateBody) -> web.StreamResponse:
    """Answer texts or token ids with text and token ids, as SGLang does."""
    request[WORDS] = words_of(body)
    prompts, batch = prompts_of(body)
    count = len(prompts)
    params = spread(body.sampling_params, count, "sampling_params", NativeSampling())
    samples = samples_of(params)
    check_choices(count, samples, "text" if body.text is not None else "input_ids")
    given = [NATIVE.given(each, f"{path_of(body, 'sampling_params', index)}.")[0] for index, each in enumerate(params)]
    check_expressions(given)
    scores = scores_of(body, count)
    rids = spread(body.rid, count, "rid", uuid4().hex)
    for index, each in enumerate(rids):
        check_id(each, path_of(body, "rid", index))
    checked = []
    for index, asks in enumerate(zip(params, given, scores, strict=True)):
        try:
            checked.append(native_sampling(*asks, path_of(body, "sampling_params", index)))
        except RequestError as error:
            raise error.worded(words_of(body, index)) from None
        await anyio.lowlevel.checkpoint()  # a check may take milliseconds, and there may be a thousand
    session = session_of(request, body.session_id)
    model = request.app[SERVICE].front.text
    shown = shown_by(body.image_data, body.video_data, count, model, batch=batch)
    asked = [
        Generate(
            each,
            sampling,
            text=prompt if isinstance(prompt, str) else None,
            ids=None if isinstance(prompt, str) else pack_ids(prompt, f"input_ids[{index}]" if batch else "input_ids"),
            priority=body.priority or 0,
            default_max_tokens=MAX_NEW_TOKENS,
            cache_salt=salt_of(body.cache_salt),
            program=program_of(request, body.program),
            scored_after=score.before,
            session=session,
            shown=seen,
        )
        for index, (each, prompt, sampling, score, seen) in enumerate(
            zip(rids, prompts, checked, scores, shown, strict=True)
        )
    ]
    named = sampled(asked, samples)
    whose = [score for score in scores for _ in range(len(named) // count)]
    reply = NativeReply([job.rid for job in named], whose, listed=batch or len(named) > 1)
    owner = owner_of(request)
    jobs = [msgspec.structs.replace(job, rid=rid_of(owner, job.rid)) for job in named]
    rid = uuid4().hex if isinstance(body.rid, list) else rids[0]
    stream, words = bool(body.stream), partial(prompt_words, body) if batch else None
    async with request.app[SERVICE].claimed([job.rid for job in jobs] if body.rid is not None else ()):
        return await answer(request, rid, jobs, reply, endpoint="generate", stream=stream, samples=samples, words=words)


def samples_of(params: Sequence[NativeSampling]) -> int:
    """How many replies each prompt gets."""
    samples = {1 if each.n is None else each.n for each in params}
    if len(samples) > 1:
        shown = ", ".join(map(str, sorted(samples)[:16]))
        message = f"n is [{shown}] in sampling_params, and must be one for all; send a request for each"
        raise RequestError(message, param="sampling_params")
    return samples.pop()


def check_expressions(given: Sequence[Mapping[str, Any]]) -> None:
    """Raise RequestError when the prompts have too many different expressions: each takes milliseconds to compile."""
    expressions = {pattern for each in given for pattern in each.get("stop_regex", ())[: MAX_REGEXES + 1]}
    if len(expressions) > MAX_EXPRESSIONS:
        raise RequestError(
            f"sampling_params have {len(expressions)} different expressions in stop_regex, and at most "
            f"{MAX_EXPRESSIONS} are taken in one request; send the prompts in several requests",
            param="sampling_params",
        )


class Scores(Struct, frozen=True):
    """What log-probabilities one prompt asks for: of the prompt from `start` (-1: none of it), with `top` likeliest."""

    wanted: bool = False
    start: int = -1
    top: int = 0
    text: bool = False

    @property
    def before(self) -> int:
        """The last position of the prompt that need not be scored."""
        return max(self.start - 1, 0) if self.start >= 0 else INT32_MAX


def scores_of(body: GenerateBody, count: int) -> list[Scores]:
    """What each of `count` prompts asks for."""
    wanted = spread(body.return_logprob, count, "return_logprob", False)
    starts = spread(body.logprob_start_len, count, "logprob_start_len", -1)
    tops = spread(body.top_logprobs_num, count, "top_logprobs_num", 0)
    for index, start in enumerate(starts):
        if start < -1:
            name = path_of(body, "logprob_start_len", index)
            raise RequestError(f"{name} is {start}; it must be -1 (none of the prompt) or more", param=name)
    text = bool(body.return_text_in_logprobs)
    return [Scores(*each, text) for each in zip(wanted, starts, tops, strict=True)]


def native_sampling(
    body: NativeSampling, given: Mapping[str, Any], scores: Scores, place: str = "sampling_params"
) -> SamplingParams:
    """The checked SamplingParams of the `sampling_params` object at `place`; `given` are its sampling fields."""
    grammar, _ = OWN_FIELDS.asked(body, f"{place}.")
    top = scores.top if scores.wanted else None
    about_prompt = top if scores.start >= 0 else None
    if about_prompt is None and given.get("max_tokens") == 0:
        about_prompt = 0  # of no token; a reply of none is a prompt that is read, and cached
    sampling = SamplingParams(**given, logprobs=top, prompt_logprobs=about_prompt, grammar=grammar)
    check_sampling(sampling)
    return sampling


def prompts_of(body: GenerateBody) -> tuple[Sequence[str | list[int]], bool]:
    """The prompts, each a text or token ids, of `text` or of `input_ids`; and whether they came as a batch."""
    if (body.text is None) == (body.input_ids is None):
        both = "both text and input_ids are" if body.text is not None else "neither text nor input_ids is"
        raise RequestError(f"{both} given; send exactly one", param="text" if body.text is None else "input_ids")
    if isinstance(body.text, str):
        return [body.text], False
    if body.text == []:
        raise RequestError("text is an empty list; send at least one prompt", param="text")
    if body.text is not None:
        return body.text, True
    message = "input_ids mixes token ids with lists of them; send one list of ids, or a list of such lists"
    ids, lists = told_apart(body.input_ids or [], RequestError(message, param="input_ids"))
    return (lists, True) if lists else ([ids], False)


Value = TypeVar("Value")


def spread(value: Value | list[Value] | None, count: int, name: str, default: Value) -> list[Value]:
    """A value for each of `count` prompts: from a list of as many, or the same for all."""
    if not isinstance(value, list):
        return [default if value is None else value] * count
    if len(value) != count:
        given, prompts = counted(len(value), "entry", "entries"), counted(count, "prompt")
        message = f"{name} has {given} for {prompts}; send as many, or one value for all"
        raise RequestError(message, param=name)
    return value


class NativeReply:
    """Chunks as SGLang words them, for one reply or a list of them."""

    def __init__(self, rids: Sequence[str], scores: Sequence[Scores], *, listed: bool) -> None:
        self._listed = listed
        self._replies = [
            OneReply(rid, asked, index if listed else None)
            for index, (rid, asked) in enumerate(zip(rids, scores, strict=True))
        ]
        self._open = len(self._replies)

    def event(self, part: tuple[int, Chunk]) -> bytes:
        """One event with all of one reply so far, and DONE after the last reply."""
        index, chunk = part
        self._open -= chunk.finish is not None
        return self._replies[index].event(chunk) + (DONE if not self._open else b"")

    def plain(self, index: int) -> None:
        """Each event has the counts of tokens, so none is plain."""

    def whole(self, replies: Sequence[Chunk]) -> bytes:
        """The object of a reply that is not streamed, or the list of them."""
        objects = [one.whole(chunk) for one, chunk in zip(self._replies, replies, strict=True)]
        return to_json(objects if self._listed else objects[0])


class OneReply:
    """One reply. Its text and ids so far are kept encoded, so an event escapes only what is new."""

    def __init__(self, rid: str, scores: Scores, index: int | None) -> None:
        self._rid = rid
        self._scores = scores
        self._index = index
        self._text = bytearray(b'data: {"text":"')
        self._ids = bytearray()
        self._prompt: list[TokenLogprob] = []
        self._tokens: list[TokenLogprob] = []

    def event(self, chunk: Chunk) -> bytes:
        """One event with the whole reply so far; `index` says which of several it is."""
        self._text += to_json(chunk.text)[1:-1]
        for token in chunk.ids:
            self._ids += b"%d," % token
        meta = to_json(self._meta(chunk))
        index = b"" if self._index is None else b',"index":%d' % self._index
        return b"".join((self._text, b'","output_ids":[', self._ids[:-1], b'],"meta_info":', meta, index, b"}\n\n"))

    def whole(self, chunk: Chunk) -> GenerateReply:
        """The object of a reply that is not streamed."""
        return GenerateReply(chunk.text, chunk.ids, self._meta(chunk))

    def _meta(self, chunk: Chunk) -> MetaInfo:
        """Of the reply so far, with the log-probabilities of `chunk`."""
        told: dict[str, Any] = {}
        if self._scores.wanted:
            if self._scores.start >= 0:
                self._prompt += chunk.prompt_logprobs[self._scores.start - self._scores.before :]
            self._tokens += chunk.logprobs
            for name, tokens in (("input", self._prompt), ("output", self._tokens)):
                told[f"{name}_token_logprobs"] = [self._entry(token) for token in tokens]
                if self._scores.top:
                    told[f"{name}_top_logprobs"] = [self._likeliest(token) for token in tokens]
        counts = (chunk.prompt_tokens, chunk.completion_tokens, chunk.cached_tokens)
        return MetaInfo(self._rid, finished(chunk), *counts, **told)

    def _likeliest(self, token: TokenLogprob) -> list[ScoredToken] | None:
        return None if token.logprob is None else [self._entry(likely) for likely in token.top]

    def _entry(self, token: TokenLogprob) -> ScoredToken:
        return token.logprob, token.id, token.text if self._scores.text else None


def finished(chunk: Chunk) -> Stopped | TooLong | Aborted | None:
    """Why the reply ended with `chunk`, None if it did not."""
    match chunk.finish:
        case None:
            return None
        case "stop":
            return Stopped(chunk.matched)
        case "length":
            return TooLong(chunk.completion_tokens)
        case "abort":
            return Aborted()


ROUTES = (
    Route(
        "POST",
        "/generate",
        generate,
        takes=GenerateBody,
        gives=GenerateReply | list[GenerateReply],
        events=(GenerateReply, ErrorReply),
    ),
)
