"""One call of a program: a gen with its `n` replies, a select with its scores.

A select scores the tokens of each choice behind the prompt. A token may lie across the two (" Par" + "is"): then the
prompt's last token is not the one that the model saw in texts, so the tokens of `prompt + choice` are compared with
the prompt's, and all from the first that differs are scored (token healing). Left out: in which order calls are made
(state.py).
"""

from collections.abc import Callable
from contextlib import aclosing
from itertools import takewhile

import anyio
import msgspec
from msgspec import Struct

from engine.errors import RequestError
from engine.lang.backend import Backend, Scored
from engine.lang.choices import Scores
from engine.lang.expressions import Gen, Select
from engine.lang.transcript import Prompt
from engine.lang.values import Meta
from engine.params.sampling import SamplingParams
from engine.runtime.actor import first_failure

SEEDS = 1 << 64


class Replies(Struct, frozen=True):
    """What a gen has made: a text and its reasoning for each of its `n`."""

    texts: list[str]
    thoughts: list[str]
    meta: Meta


async def generated(
    backend: Backend, prompt: Prompt, gen: Gen, params: SamplingParams, tell: Callable[[str], None]
) -> Replies:
    """The replies to `gen`, all at once; `tell` gets the first of them piece by piece. Raises what `backend` does."""
    backend.check(prompt, params, separate=gen.separate)
    texts, thoughts = [""] * gen.n, [""] * gen.n
    metas = [Meta()] * gen.n

    async def one(index: int) -> None:
        stream = backend.reply(prompt, seeded(params, index), separate=gen.separate)
        async with aclosing(stream) as pieces:
            async for piece in pieces:
                if index == 0 and piece.text:
                    tell(piece.text)
                texts[index] += piece.text
                thoughts[index] += piece.reasoning
                metas[index] = piece.meta or metas[index]
        if metas[index].finish == "abort":
            raise RequestError("the request was aborted; send it again", code="aborted", status=409)

    try:
        if gen.n == 1:
            await one(0)
        else:
            async with anyio.create_task_group() as group:
                for index in range(gen.n):
                    group.start_soon(one, index)
    except BaseExceptionGroup as failures:
        raise first_failure(failures) from None
    return Replies(texts, thoughts, summed(metas))


def seeded(params: SamplingParams, index: int) -> SamplingParams:
    """`params` for reply `index`: of a seeded gen, each has a seed of its own."""
    if params.seed is None or not index:
        return params
    seed = (params.seed + index + SEEDS // 2) % SEEDS - SEEDS // 2
    return msgspec.structs.replace(params, seed=seed)


def summed(metas: list[Meta]) -> Meta:
    """The first, with the tokens of all."""
    totals = {name: sum(getattr(meta, name) for meta in metas) for name in COUNTS}
    return msgspec.structs.replace(metas[0], **totals)


COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens")


async def chosen(backend: Backend, prompt: Prompt, select: Select) -> tuple[str, Meta]:
    """The best choice of `select` behind `prompt`. Its `meta` has the Scores of each."""
    backend.check(prompt, None)
    before, whole = await backend.ids(prompt), [await backend.ids(prompt.with_(each)) for each in select.choices]
    first = [common(before, ids) for ids in whole]
    for choice, ids, at in zip(select.choices, whole, first, strict=True):
        if at == len(ids):
            raise RequestError(f"the choice {choice!r} adds no token to the prompt; offer another", param="choices")
    scored = await backend.score(whole, first)
    behind = [ids[at:] for ids, at in zip(whole, first, strict=True)]
    alone: list[Scored] = []
    if select.method.needs_alone:
        alone = await backend.score(behind, [0] * len(behind))
    scores = [
        Scores(ids, known(with_), known(alone[index]) if alone else None)
        for index, (ids, with_) in enumerate(zip(behind, scored, strict=True))
    ]
    meta = summed([each.meta for each in (*scored, *alone)])
    best = select.method.best(scores)
    return select.choices[best], msgspec.structs.replace(meta, finish="", matched=None, scores=tuple(scores))


def common(one: list[int], other: list[int]) -> int:
    """How many ids both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def known(scored: Scored) -> list[float]:
    """Its log-probabilities; the first of a prompt, which has none, counts as 0."""
    return [logprob or 0.0 for logprob in scored.logprobs]
