"""Programs call an engine in this process, without HTTP."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from anyio.from_thread import BlockingPortal

from engine.conversation.parsers import assembled
from engine.conversation.parts import read_messages
from engine.conversation.reading import Reader, Wanted, reading_of
from engine.errors import RequestError
from engine.lang.backend import Backend, Offer, Piece, Spoken
from engine.lang.tools import ToolCall
from engine.lang.transcript import Prompt
from engine.lang.values import Meta, ScoredToken, summed
from engine.media.store import showing
from engine.messages.reply import Chunk, TokenLogprob
from engine.messages.request import Generate
from engine.messages.sessions import ProgramUse
from engine.messages.text import Tokenize, Tokenized
from engine.params.sampling import SamplingParams
from engine.plugin.parsing import Reasoning
from engine.runtime.choices import Scores, planned
from engine.runtime.decisions import Question, job_of
from engine.runtime.front import joined
from engine.runtime.offline import AsyncEngine
from engine.runtime.together import together


class Local(Backend):
    """An AsyncEngine; `portal` is that of the Engine that it is in, if it is in one."""

    def __init__(self, engine: AsyncEngine, portal: BlockingPortal | None = None) -> None:
        self._engine = engine
        self._portal = portal

    @property
    def portal(self) -> BlockingPortal | None:
        return self._portal

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        return self._engine.loop

    def check(self, prompt: Prompt, params: SamplingParams | None, *, separate: bool = False) -> None:
        if not prompt.messages:
            if separate:
                raise RequestError(
                    "separate_reasoning needs roles: where reasoning ends, the chat template of the model says"
                )
        elif not self._engine.has_chat_template:
            raise RequestError("the model has no chat template; write the program without roles, or pass one")

    async def reply(
        self, prompt: Prompt, params: SamplingParams, *, separate: bool, stream: bool, program: str
    ) -> AsyncGenerator[Piece, None]:
        rid = uuid.uuid4().hex
        if prompt.text is not None:
            request, reader = Generate(rid, params, text=prompt.text, program=program_use(program)), None
        else:
            request, reader = self._chat(rid, prompt, params, separate, program)
        async with aclosing(self._engine.front.generate(request)) as chunks:
            scored: list[TokenLogprob] = []
            about: tuple[TokenLogprob, ...] = ()
            async for chunk in chunks:
                scored += chunk.logprobs
                about = about or chunk.prompt_logprobs
                text, thought = (chunk.text, "") if reader is None else read(reader, chunk)
                yield Piece(text, thought, None if chunk.finish is None else meta_of(chunk, scored, about))

    def _chat(
        self, rid: str, prompt: Prompt, params: SamplingParams, separate: bool, program: str
    ) -> tuple[Generate, Reader | None]:
        messages, options = read_messages(prompt.messages), written(prompt)
        reading = reading_of(self._engine.front.text, params, messages, options, Wanted(), separate=separate)
        return Generate(
            rid, messages=messages, program=program_use(program), **options, **reading.job
        ), reading.reader()

    async def answer(
        self, prompt: Prompt, params: SamplingParams, offer: Offer, *, separate: bool, program: str
    ) -> Spoken:
        messages, options, text = read_messages(prompt.messages), written(prompt), self._engine.front.text
        tools = [tool.described["function"] for tool in offer.tools]
        wanted = msgspec.convert({"tools": tools, "mode": offer.choice}, Wanted)
        reading = reading_of(text, params, messages, options, wanted, separate=separate)
        request = Generate(uuid.uuid4().hex, messages=messages, program=program_use(program), **options, **reading.job)
        whole = joined([chunk async for chunk in self._engine.front.generate(request)])
        if (reader := reading.reader()) is None:
            return Spoken(whole.text, "", (), meta_of(whole, whole.logprobs, whole.prompt_logprobs))
        found = assembled(reader.read(whole))
        calls = tuple(ToolCall(call.name, call.arguments, call.id) for call in found.calls)
        meta = meta_of(whole, whole.logprobs, whole.prompt_logprobs)
        return Spoken(found.content, found.reasoning, calls, meta)

    async def scores(
        self, prompt: Prompt, choices: Sequence[str], *, alone: bool, program: str
    ) -> tuple[list[Scores], Meta]:
        if prompt.text is not None:
            job = Tokenize(prompt.text, special=True, endings=tuple(choices))
        else:
            job = Tokenize(None, read_messages(prompt.messages), written(prompt), endings=tuple(choices))
        return await self._scored(job, choices, alone=alone, program=program)

    async def decide(
        self, messages: Sequence[dict[str, Any]], question: Question, *, program: str
    ) -> tuple[list[float], Meta]:
        job = job_of(read_messages(messages), question)
        scores, meta = await self._scored(job, question.texts, alone=False, program=program)
        return question.probabilities(scores), meta

    async def _scored(
        self, job: Tokenize, choices: Sequence[str], *, alone: bool, program: str
    ) -> tuple[list[Scores], Meta]:
        front, rid = self._engine.front, uuid.uuid4().hex
        assert front.texts is not None, "the engine is ready"

        async def one(job: Generate) -> Chunk:
            return joined([chunk async for chunk in front.generate(job)])

        async with showing(front.media, rid, job.messages or ()) as (messages, media):
            answer = await front.texts.ask(msgspec.structs.replace(job, messages=messages or None))
            assert isinstance(answer, Tokenized), f"a Tokenize was answered by {type(answer).__name__}"
            plan = planned(answer, choices, rid, alone=alone, media=media, program=program_use(program))
            replies = await together(one, plan.jobs)
        metas = [meta_of(reply) for reply in replies]
        return plan.read(replies), summed(metas)

    async def end(self, program: str) -> None:
        await self._engine.front.end_programs(b"", "", [program])


def program_use(program: str) -> ProgramUse | None:
    """What the engine knows a program by: it is nobody's, as where a server asks for no key."""
    return ProgramUse(b"", program) if program else None


def written(prompt: Prompt) -> dict[str, Any]:
    """How the chat template writes the messages of `prompt`, as Generate and Tokenize take it."""
    return {"add_generation_prompt": not prompt.begun, "continue_final_message": prompt.begun}


def read(reader: Reader, chunk: Chunk) -> tuple[str, str]:
    """What `chunk` adds to the content, and to the reasoning."""
    events = reader.read(chunk)
    thought = "".join(event.text for event in events if isinstance(event, Reasoning))
    return "".join(getattr(event, "text", "") for event in events if not isinstance(event, Reasoning)), thought


def meta_of(chunk: Chunk, scored: Sequence[TokenLogprob] = (), about_prompt: Sequence[TokenLogprob] = ()) -> Meta:
    """What the last chunk says of its reply, whose tokens are `scored`."""
    counts = chunk.prompt_tokens, chunk.cached_tokens, chunk.completion_tokens
    both = (
        tuple(scored_token(each) for each in tokens if each.logprob is not None) for tokens in (scored, about_prompt)
    )
    return Meta(chunk.finish or "", chunk.matched, *counts, *both)


def scored_token(token: TokenLogprob) -> ScoredToken:
    """`token` as programs see it."""
    assert token.logprob is not None, "only a prompt's first token has no log-probability"
    top = tuple(map(scored_token, token.top))
    return ScoredToken(token.text, token.bytes, token.logprob, token.id, token.rank, top)
