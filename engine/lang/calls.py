"""One call of a program: a gen with its `n` replies, a select with its scores.

Left out: in which order calls are made (state.py), how the tokens of a choice are found (engine/runtime/choices.py).
"""

from collections.abc import Callable
from contextlib import aclosing

import anyio
import msgspec
from msgspec import Struct

from engine.errors import ProgramError, RequestError
from engine.lang.backend import Backend, Offer
from engine.lang.expressions import Decide, Gen, Select
from engine.lang.tools import Tool, ToolCall
from engine.lang.transcript import Prompt, Transcript
from engine.lang.values import Decision, Meta, summed
from engine.params.sampling import SamplingParams
from engine.runtime.actor import first_failure
from engine.runtime.together import together

SEEDS = 1 << 64


class Called(Struct, frozen=True):
    """A tool that the model called: its arguments as JSON, and what it returned as text."""

    name: str
    arguments: str
    result: str


class Replies(Struct, frozen=True):
    """What a gen has made: a text and its reasoning for each of its `n`."""

    texts: list[str]
    thoughts: list[str]
    meta: Meta
    calls: list[Called] = []


async def generated(
    backend: Backend,
    prompt: Prompt,
    gen: Gen,
    params: SamplingParams,
    tell: Callable[[str], None],
    *,
    stream: bool,
    program: str,
) -> Replies:
    """The replies to `gen`, all at once; `tell` gets the first of them, with `stream` piece by piece as they come.
    Raises what `backend` does."""
    check(backend, prompt, gen, params)
    texts, thoughts = [""] * gen.n, [""] * gen.n
    metas = [Meta()] * gen.n

    async def one(index: int) -> None:
        followed, own = stream and index == 0, seeded(params, index)
        reply = backend.reply(prompt, own, separate=gen.separate, stream=followed, program=program)
        async with aclosing(reply) as pieces:
            async for piece in pieces:
                if index == 0 and piece.text:
                    tell(piece.text)
                texts[index] += piece.text
                thoughts[index] += piece.reasoning
                metas[index] = piece.meta or metas[index]
        check_whole(metas[index])

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


def check(backend: Backend, prompt: Prompt, gen: Gen, params: SamplingParams) -> None:
    """Raise RequestError, in the words of the program, for what `backend` cannot do."""
    try:
        backend.check(prompt, params, separate=gen.separate)
    except RequestError as error:
        raise error.worded(gen.words) from None


def check_whole(meta: Meta) -> None:
    """Raise RequestError for a reply that was aborted."""
    if meta.finish == "abort":
        raise RequestError("the request was aborted; send it again", code="aborted", status=409)


async def with_tools(
    backend: Backend, transcript: Transcript, gen: Gen, params: SamplingParams, program: str
) -> Replies:
    """The reply to `gen` after all calls of tools, which `transcript` then has as messages. Raises what `backend` does,
    and ProgramError where the assistant has begun to speak."""
    if (prompt := transcript.prompt()).begun or prompt.text is not None:
        raise ProgramError("a gen with tools must be all of an assistant(...): the model calls before it speaks")
    called: list[Called] = []
    metas: list[Meta] = []
    choice = gen.tool_choice
    while True:
        check(backend, prompt, gen, params)
        offer = Offer(tuple(gen.tools.values()), choice)
        spoken = await backend.answer(prompt, params, offer, separate=gen.separate, program=program)
        check_whole(spoken.meta)
        metas.append(spoken.meta)
        if not spoken.calls or choice == "none":
            return Replies([spoken.text], [spoken.reasoning], summed(metas[::-1]), called)
        results = await together(lambda call: _result(gen.tools, call), spoken.calls)
        transcript.called(spoken.text, spoken.calls, results)
        called += [
            Called(call.name, call.arguments, result) for call, result in zip(spoken.calls, results, strict=True)
        ]
        prompt, choice = transcript.prompt(), "auto" if len(metas) < gen.rounds else "none"


async def _result(tools: dict[str, Tool], call: ToolCall) -> str:
    if call.name not in tools:
        return f"Error: there is no tool {call.name}; there is {', '.join(tools)}"
    return await tools[call.name].call(call.arguments)


def seeded(params: SamplingParams, index: int) -> SamplingParams:
    """`params` for reply `index`: of a seeded gen, each has a seed of its own."""
    if params.seed is None or not index:
        return params
    seed = (params.seed + index + SEEDS // 2) % SEEDS - SEEDS // 2
    return msgspec.structs.replace(params, seed=seed)


async def decided(backend: Backend, prompt: Prompt, decide: Decide, program: str) -> tuple[Decision, Meta]:
    """The answer to `decide` about all that `prompt` says."""
    messages = prompt.messages or ({"role": "user", "content": prompt.text},)
    likely, meta = await backend.decide(messages, decide.question, program=program)
    best = max(range(len(likely)), key=likely.__getitem__)
    score = sum(place * share for place, share in enumerate(likely)) if decide.question.kind == "score" else None
    shares = dict(zip(decide.values, likely, strict=True))
    return Decision(decide.values[best], likely[best], shares, score), meta


async def chosen(backend: Backend, prompt: Prompt, select: Select, program: str) -> tuple[str, Meta]:
    """The best choice of `select` behind `prompt`. Its `meta` has the Scores of each."""
    backend.check(prompt, None)
    scores, meta = await backend.scores(prompt, select.choices, alone=select.method.needs_alone, program=program)
    best = select.method.best(scores)
    return select.choices[best], msgspec.structs.replace(meta, finish="", matched=None, scores=tuple(scores))
