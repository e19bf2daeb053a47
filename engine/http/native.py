"""/generate, shaped as SGLang's native endpoint: text or token ids in, text and token ids out.

A streamed event holds the reply so far, not what is new: clients of SGLang print the difference. Left out: batches
in one request, log probabilities, media, and sampling fields that the engine does not serve yet.
"""

from typing import Any, ClassVar
from uuid import uuid4

from aiohttp import web

from engine.errors import RequestError
from engine.http.openai import Priority, TokenId, pack_ids, stop_strings
from engine.http.service import answer
from engine.http.sse import DONE
from engine.http.wire import Body, BodyDecoder, check_served, to_json
from engine.messages import Chunk, Generate, SamplingParams
from engine.sampling import check_sampling

MAX_NEW_TOKENS = 128  # SGLang's default
MAX_RID_LENGTH = 256
CLIENT_NAMES = {"max_tokens": "max_new_tokens", "seed": "sampling_seed"}


class NativeSampling(Body):
    """`sampling_params`. Null is the same as absent."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    sampling_seed: int | None = None
    max_new_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    n: Any = None
    min_new_tokens: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    repetition_penalty: Any = None
    logit_bias: Any = None
    stop_regex: Any = None
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    structural_tag: Any = None
    skip_special_tokens: Any = None
    spaces_between_special_tokens: Any = None
    no_stop_trim: Any = None
    custom_params: Any = None

    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {
        "n": (1,),
        "min_new_tokens": (0,),
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "repetition_penalty": (1,),
        "logit_bias": ({},),
        "stop_regex": ([],),
        "json_schema": (),
        "regex": (),
        "ebnf": (),
        "structural_tag": (),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "no_stop_trim": (False,),
        "custom_params": ({},),
    }


class GenerateBody(Body):
    text: str | list[str] | None = None
    input_ids: list[TokenId | list[TokenId]] | None = None
    sampling_params: NativeSampling | None = None
    stream: bool | None = None
    rid: str | None = None
    priority: Priority = 0
    input_embeds: Any = None
    image_data: Any = None
    audio_data: Any = None
    video_data: Any = None
    return_logprob: Any = None
    logprob_start_len: Any = None
    top_logprobs_num: Any = None
    token_ids_logprob: Any = None
    return_text_in_logprobs: Any = None
    return_hidden_states: Any = None
    lora_path: Any = None
    custom_logit_processor: Any = None
    session_params: Any = None

    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {
        "input_embeds": (),
        "image_data": ([],),
        "audio_data": ([],),
        "video_data": ([],),
        "return_logprob": (False,),
        "logprob_start_len": (-1,),
        "top_logprobs_num": (0,),
        "token_ids_logprob": ([],),
        "return_text_in_logprobs": (True, False),
        "return_hidden_states": (False,),
        "lora_path": ("",),
        "custom_logit_processor": (),
        "session_params": ({},),
    }


GENERATE = BodyDecoder(GenerateBody)


async def generate(request: web.Request) -> web.StreamResponse:
    """POST /generate"""
    body = GENERATE.decode(await request.read())
    sampling = native_sampling(body.sampling_params or NativeSampling())
    rid = uuid4().hex if body.rid is None else body.rid
    if not 1 <= len(rid) <= MAX_RID_LENGTH or not (rid.isascii() and rid.isprintable()):
        raise RequestError(
            f"rid is {rid[:80]!r} ({len(rid)} characters); send 1 to {MAX_RID_LENGTH} printable ASCII characters",
            param="rid",
        )
    text, ids = prompt_of(body)
    job = Generate(rid, sampling, text=text, ids=ids, priority=body.priority, default_max_tokens=MAX_NEW_TOKENS)
    return await answer(request, job, NativeReply(rid), endpoint="generate", stream=bool(body.stream))


def native_sampling(body: NativeSampling) -> SamplingParams:
    """The checked SamplingParams of a `sampling_params` object, with SGLang's defaults."""
    check_served(body, "sampling_params.")
    fields = ("temperature", "top_p", "top_k", "min_p", "ignore_eos")
    given = {name: value for name in fields if (value := getattr(body, name)) is not None}
    sampling = SamplingParams(
        max_tokens=body.max_new_tokens,
        seed=body.sampling_seed,
        stop=stop_strings(body.stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        **given,
    )
    check_sampling(sampling, CLIENT_NAMES)
    return sampling


def prompt_of(body: GenerateBody) -> tuple[str | None, bytes | None]:
    """The prompt as a text or as int32 token ids: exactly one of them."""
    if (body.text is None) == (body.input_ids is None):
        both = "both text and input_ids are" if body.text is not None else "neither text nor input_ids is"
        raise RequestError(f"{both} given; send exactly one", param="text" if body.text is None else "input_ids")
    if isinstance(body.text, list):
        raise _no_batch("text")
    if body.text is not None:
        return body.text, None
    ids = [item for item in body.input_ids or () if isinstance(item, int)]
    if len(ids) != len(body.input_ids or ()):
        raise _no_batch("input_ids")
    return None, pack_ids(ids, "input_ids")


def _no_batch(param: str) -> RequestError:
    message = f"{param} holds a batch, which is not supported yet; send one request for each prompt"
    return RequestError(message, param=param, code="unsupported_parameter")


class NativeReply:
    """Chunks as SGLang words them. The text and ids so far are kept encoded, so an event escapes only what is new."""

    def __init__(self, rid: str) -> None:
        self._rid = rid
        self._text = bytearray(b'data: {"text":"')
        self._ids = bytearray()

    def event(self, chunk: Chunk) -> bytes:
        """One event with the whole reply so far."""
        self._text += to_json(chunk.text)[1:-1]
        for token in chunk.ids:
            self._ids += b"%d," % token
        meta = to_json(self._meta(chunk))
        done = b"" if chunk.finish is None else DONE
        return b"".join((self._text, b'","output_ids":[', self._ids[:-1], b'],"meta_info":', meta, b"}\n\n", done))

    def whole(self, text: str, ids: list[int], last: Chunk) -> bytes:
        """The object of a reply that is not streamed."""
        return to_json({"text": text, "output_ids": ids, "meta_info": self._meta(last)})

    def _meta(self, chunk: Chunk) -> dict[str, Any]:
        finish: dict[str, Any] | None
        match chunk.finish:
            case None:
                finish = None
            case "stop":
                finish = {"type": "stop", "matched": chunk.matched}
            case "length":
                finish = {"type": "length", "length": chunk.completion_tokens}
            case "abort":
                finish = {"type": "abort", "message": "the request was aborted"}
        return {
            "id": self._rid,
            "finish_reason": finish,
            "prompt_tokens": chunk.prompt_tokens,
            "completion_tokens": chunk.completion_tokens,
            "cached_tokens": chunk.cached_tokens,
        }
