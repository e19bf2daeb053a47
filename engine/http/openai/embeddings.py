"""/v1/embeddings, shaped as OpenAI's, /v1/score and /v1/rerank, shaped as vLLM's: vectors, and how alike texts are.

Each input is a request of its own, so inputs of all clients share steps; a long list is fed in a window. Left out:
cross-encoders, which score two texts at once.
"""

import time
from array import array
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from math import sqrt
from operator import mul
from typing import Annotated, Any, ClassVar, Literal
from uuid import uuid4

import anyio
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from engine.errors import RequestError, counted
from engine.http.fields import LABEL, Rule, unserved
from engine.http.keys import owner_of
from engine.http.openapi import Route
from engine.http.request_id import called
from engine.http.service import SERVICE, Service, check_kept, pack_ids, told_apart
from engine.http.sse import OURS
from engine.http.wire import Body, Priority, Reply, TokenId, json_response
from engine.messages.reply import Chunk
from engine.messages.request import Embed
from engine.params.sampling import INT32_MAX
from engine.runtime.actor import first_failure

MAX_INPUTS = 2048  # texts of one request, as OpenAI has it
Input = str | list[TokenId]
Kept = Annotated[int, Meta(ge=-1, le=INT32_MAX)]


# ── bodies and replies ───────────────────────────────────────────────────────────────────────


class EmbeddingBody(Body):
    input: str | list[TokenId | str | list[TokenId]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    priority: Priority | None = None
    user: Any = None
    truncate_prompt_tokens: Kept | None = None

    rules: ClassVar[Mapping[str, Rule]] = {"user": LABEL}


class ScoreBody(Body):
    """`text_1` is one text, or as many as `text_2`."""

    text_1: str | list[str]
    text_2: str | list[str]
    model: str | None = None
    priority: Priority | None = None
    user: Any = None
    truncate_prompt_tokens: Kept | None = None

    rules: ClassVar[Mapping[str, Rule]] = {"user": LABEL}


class RerankDocument(Body):
    text: str


class RerankBody(Body):
    """`top_n` 0 or null keeps all documents. Their texts are sent back unless `return_documents` is false."""

    query: str
    documents: list[str | RerankDocument]
    model: str | None = None
    top_n: Annotated[int, Meta(ge=0)] | None = None
    return_documents: bool | None = None
    priority: Priority | None = None
    user: Any = None
    rank_fields: Any = None
    max_chunks_per_doc: Any = None
    max_tokens_per_doc: Any = None
    truncate_prompt_tokens: Kept | None = None

    rules: ClassVar[Mapping[str, Rule]] = {
        "user": LABEL,
        "rank_fields": unserved(["text"]),
        "max_chunks_per_doc": unserved(),
        "max_tokens_per_doc": unserved(),
    }


Asked = EmbeddingBody | ScoreBody | RerankBody


class EmbeddingUsage(Reply, frozen=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingData(Reply, frozen=True):
    """`embedding` is a list of numbers, or their little-endian float32 bytes in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(Reply, frozen=True):
    object: Literal["list"]
    data: list[EmbeddingData]
    model: str
    usage: EmbeddingUsage


class ScoreData(Reply, frozen=True):
    object: Literal["score"]
    index: int
    score: float


class ScoreList(Reply, frozen=True):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ScoreData]
    usage: EmbeddingUsage


class RankedText(Reply, frozen=True):
    text: str


class Ranked(Reply, frozen=True):
    """`index` is the document's place in the request."""

    index: int
    relevance_score: float
    document: RankedText | UnsetType = UNSET


class RerankReply(Reply, frozen=True):
    """`results` have the most relevant document first."""

    id: str
    model: str
    usage: EmbeddingUsage
    results: list[Ranked]


# ── handlers ─────────────────────────────────────────────────────────────────────────────────


async def embeddings(request: web.Request, body: EmbeddingBody) -> web.Response:
    """Make a vector of each input."""
    service = request.app[SERVICE]
    service.check_model(body.model)
    check_dimensions(service, body.dimensions)
    rid = f"embd-{uuid4().hex}"
    chunks = await vectors_of(request, rid, inputs_of(body.input), body, "embeddings")
    encoded = b64 if body.encoding_format == "base64" else numbers
    data = [EmbeddingData("embedding", index, encoded(chunk.vector)) for index, chunk in enumerate(chunks)]
    reply = EmbeddingList("list", data, service.model, usage_of(chunks))
    return json_response(reply)


async def score(request: web.Request, body: ScoreBody) -> web.Response:
    """Say how alike texts are, pair by pair: the cosine of their vectors."""
    service = request.app[SERVICE]
    service.check_model(body.model)
    firsts, seconds = named(body.text_1, "text_1"), named(body.text_2, "text_2")
    if len(firsts) not in (1, len(seconds)):
        raise RequestError(
            f"text_1 has {counted(len(firsts), 'text')} and text_2 {len(seconds)}; send one text_1 for all, or one for "
            "each",
            param="text_1",
        )
    rid = f"score-{uuid4().hex}"
    chunks = await vectors_of(request, rid, firsts | seconds, body, "score")
    made = [array("f", chunk.vector) for chunk in chunks]
    left, right = made[: len(firsts)], made[len(firsts) :]
    if len(left) == 1:
        left *= len(right)
    data = [ScoreData("score", index, cosine(*pair)) for index, pair in enumerate(zip(left, right, strict=True))]
    reply = ScoreList(rid, "list", int(time.time()), service.model, data, usage_of(chunks))
    return json_response(reply)


async def rerank(request: web.Request, body: RerankBody) -> web.Response:
    """Order documents by how alike they are to a query: by the cosine of their vectors and its own."""
    service = request.app[SERVICE]
    service.check_model(body.model)
    texts = [one if isinstance(one, str) else one.text for one in body.documents]
    rid = f"rerank-{uuid4().hex}"
    inputs = {"query": body.query} | named(texts, "documents")
    query, *made = chunks = await vectors_of(request, rid, inputs, body, "rerank")
    wanted = array("f", query.vector)
    scores = [cosine(wanted, array("f", chunk.vector)) for chunk in made]
    order = sorted(range(len(texts)), key=lambda index: (-scores[index], index))[: body.top_n or None]
    shown = body.return_documents is not False
    results = [Ranked(index, scores[index], RankedText(texts[index]) if shown else UNSET) for index in order]
    return json_response(RerankReply(rid, service.model, usage_of(chunks), results))


# ── inputs ───────────────────────────────────────────────────────────────────────────────────


def inputs_of(given: str | list[int | str | list[int]]) -> dict[str, Input]:
    """The texts or lists of token ids in `given`, by what its client calls each."""
    if isinstance(given, str):
        return {"input": given}
    message = "input mixes token ids with whole inputs; send one list of ids, or a list of inputs"
    ids, inputs = told_apart(given, RequestError(message, param="input"))
    return {"input": ids} if ids else named(inputs, "input")


def named(given: str | Sequence[Input], name: str) -> dict[str, Input]:
    """The inputs in `given`, by their place in the field `name`."""
    if isinstance(given, str):
        return {name: given}
    if not 1 <= len(given) <= MAX_INPUTS:
        raise RequestError(f"{name} has {len(given)} entries; send 1 to {MAX_INPUTS}", param=name)
    return {f"{name}[{index}]": item for index, item in enumerate(given)}


def check_dimensions(service: Service, asked: int | None) -> None:
    """Raise RequestError for a size that the model's vectors have not: its numbers mean nothing without the rest."""
    info = service.front.info
    if asked is not None and info is not None and info.embedding_size and asked != info.embedding_size:
        raise RequestError(
            f"dimensions is {asked}, but {service.model} makes vectors of {info.embedding_size}, which cannot be cut; "
            "leave it out",
            param="dimensions",
        )


# ── vectors ──────────────────────────────────────────────────────────────────────────────────


async def vectors_of(
    request: web.Request, rid: str, inputs: dict[str, Input], asked: Asked, endpoint: str
) -> list[Chunk]:
    """A chunk with a vector for each of `inputs`, in order; what one raises, named as its client did, ends all."""
    service = request.app[SERVICE]
    rids = [rid] if len(inputs) == 1 else [f"{rid}-{index}" for index in range(len(inputs))]
    check_kept(asked.truncate_prompt_tokens)
    jobs = [job_of(own, *item, asked) for own, item in zip(rids, inputs.items(), strict=True)]
    info = service.front.info
    # One step's worth runs, the next waits in the queue; more would only fill that.
    window = anyio.Semaphore(1 if info is None else min(2 * info.slots, service.front.most_open))
    chunks: dict[str, Chunk] = {}

    async def one(name: str, job: Embed) -> None:
        async with window, aclosing(service.generate(job, endpoint)) as stream:
            try:
                chunks[name] = await anext(stream)
            except RequestError as error:
                raise error.worded(OURS.at(name, "input", "prompt")) from None
        if chunks[name].finish == "abort":
            message = "the request was ended by /abort_request; send it again"
            raise RequestError(message, code="aborted", status=409)

    with service.known_as(owner_of(request), {called(request, rid), rid}, jobs):
        try:
            async with anyio.create_task_group() as group:
                for name, job in zip(inputs, jobs, strict=True):
                    group.start_soon(one, name, job)
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from None
    return [chunks[name] for name in inputs]


def job_of(rid: str, name: str, given: Input, asked: Asked) -> Embed:
    text = given if isinstance(given, str) else None
    ids = pack_ids(given, name) if not isinstance(given, str) else None
    return Embed(rid, text, ids, asked.priority or 0, asked.truncate_prompt_tokens)


def usage_of(chunks: Sequence[Chunk]) -> EmbeddingUsage:
    total = sum(chunk.prompt_tokens for chunk in chunks)
    return EmbeddingUsage(total, total)


def numbers(vector: bytes) -> list[float]:
    return array("f", vector).tolist()


def b64(vector: bytes) -> str:
    return b64encode(vector).decode()


def cosine(left: "array[float]", right: "array[float]") -> float:
    """That of two vectors; 0 where one has no length."""
    size = sqrt(sum(map(mul, left, left)) * sum(map(mul, right, right)))
    return sum(map(mul, left, right)) / size if size else 0.0


ROUTES = (
    Route("POST", "/v1/embeddings", embeddings, takes=EmbeddingBody, gives=EmbeddingList),
    Route("POST", "/v1/score", score, takes=ScoreBody, gives=ScoreList),
    Route("POST", "/score", score, takes=ScoreBody, gives=ScoreList),
    Route("POST", "/v1/rerank", rerank, takes=RerankBody, gives=RerankReply),
    Route("POST", "/v2/rerank", rerank, takes=RerankBody, gives=RerankReply),
    Route("POST", "/rerank", rerank, takes=RerankBody, gives=RerankReply),
)
