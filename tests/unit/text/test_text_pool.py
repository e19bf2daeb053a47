"""The text pool: the same answers as without it, processes that may be lost, and the order of a request's messages."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest
from house import counted, open_house, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.actors.tokenizer import Admission, TokenizerActor
from engine.config import Config, ModelOptions
from engine.conversation.media import Placed, needs_of
from engine.conversation.parts import Call, Message, said
from engine.conversation.parts import said as said_by
from engine.errors import RequestError
from engine.messages.assets import Bound
from engine.messages.control import WorkerReady
from engine.messages.media import MEDIA, Slice, media_use, sliced
from engine.messages.reply import Failed, Tokens
from engine.messages.request import Abort, Admit, Embed, Generate, Open
from engine.messages.text import Detokenize, Prepare, Prepared, TextJob, Tokenize, Tokenized
from engine.params.sampling import Sampling, SamplingParams
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.registry import Plugins
from engine.runtime import pool as runtime_pool
from engine.runtime.actor import supervise
from engine.runtime.channel import open_channel
from engine.text import pool as text_pool
from engine.text.fallback import text_of
from engine.text.jobs import LARGE, perform, size_of
from engine.text.pool import HUGE, TextPool, bare, processes, with_payloads
from engine.text.tokenizer import Prompt, Text

pytestmark = pytest.mark.anyio
CONFIG = Config(model=ModelOptions(model="echo"))
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}{% endif %}"
    "[{{ m.content }}]{% endfor %}{{ tools | tojson }}"
)
SEEDED = SamplingParams(seed=7, max_tokens=4)


@cache
def text() -> Text:
    plugins = Plugins.load(())
    return text_of(plugins, open_checkpoint(plugins, "echo"), CONFIG, TEMPLATE)


def admission() -> Admission:
    return Admission(text())


def odd_process() -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
    ours, theirs = socket.socketpair()
    command = [sys.executable, str(Path(__file__).parents[2] / "lib" / "odd_text_process.py"), str(theirs.fileno())]
    with theirs:
        return ours, subprocess.Popen(command, pass_fds=[theirs.fileno()])


@asynccontextmanager
async def odd_pool(most: int = 1) -> AsyncIterator[TextPool]:
    pool = TextPool(CONFIG, None, admission(), start=odd_process, most=most)
    async with supervise(pool):
        with anyio.fail_after(60):
            yield pool


async def told(pool: TextPool, what: str, size: int = LARGE) -> int:
    """The process that answered a job which is told `what`."""
    answer = await pool.ask(Tokenize(f"{what} {'x' * size}"))
    assert isinstance(answer, Tokenized)
    return array("i", answer.ids)[0]


# ── the same answers ─────────────────────────────────────────────────────────────────────────


def chat(*contents: str, **options: Any) -> Generate:
    return Generate("r", SEEDED, messages=[said("user", text) for text in contents], **options)


def tool(**schema: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": {"type": "object", **schema}}}


JOBS: list[TextJob] = [
    *(
        Prepare(job, 4096, 257)
        for job in (
            Generate("r", SEEDED, text="some text, é 😀"),
            Generate("r", SEEDED, text="", cache_salt="a"),
            Generate("r", SEEDED, text="x" * 5000),
            Generate("r", SEEDED, text="x" * 50_000),
            Generate("r", SEEDED, ids=array("i", [1, 2, 256]).tobytes(), echo=True),
            Generate("r", SEEDED, ids=array("i", [1, 999]).tobytes()),
            Generate(
                "r", SamplingParams(seed=1, logit_bias={5: 1.5, 6: -100.0}, stop=("a", "b"), min_tokens=1), text="x"
            ),
            Generate("r", SamplingParams(seed=1, logit_bias={999: 1}), text="x"),
            Generate("r", SamplingParams(seed=-(2**63), bad_words=("no way",), allowed_token_ids=(1, 2)), text="x"),
            Generate("r", SamplingParams(seed=1, json_schema='{"maximum": 1e300}', max_tokens=5000), text="x"),
            chat("a", "b", opening="c"),
            chat("no"),
            chat("a", template_kwargs={"messages": 1}),
            chat("a", tools=[tool(maximum=10**30, minimum=-(10**30), default=0.1)]),
            chat("a", chat_template="{{ messages | length }}"),
            chat("a", chat_template="{{"),
            chat(),
            Embed("r", text="a vector"),
            Embed("r", text="x" * 50_000),
            Embed("r", ids=array("i", [3]).tobytes()),
        )
    ),
    Tokenize("some text", special=True, names=True),
    Tokenize("x" * 1000, most=10),
    Tokenize("x" * 40, most=10),
    Tokenize(None, [said("user", "a")], {"tools": [tool()]}, names=True),
    Tokenize(None, [said("user", "no")], special=True),
    Detokenize(array("i", [97, 256]).tobytes()),
    Detokenize(array("i", [97, 256]).tobytes(), skip_special_tokens=True),
    Detokenize(array("i", [97, 300]).tobytes()),
]


def fields(error: RequestError) -> tuple[Any, ...]:
    return error.message, error.param, error.code, error.status


async def test_a_process_answers_as_the_front_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_pool, "LARGE", -1)
    here = admission()
    pool = TextPool(CONFIG, TEMPLATE, admission(), most=1)
    outcomes = {"answers": 0, "errors": 0}
    async with supervise(pool):
        for job in JOBS:
            with anyio.fail_after(60):
                try:
                    expected: Any = perform(here, job)
                except RequestError as error:
                    with pytest.raises(RequestError) as refused:
                        await pool.ask(job)
                    assert fields(refused.value) == fields(error)
                    outcomes["errors"] += 1
                else:
                    assert await pool.ask(job) == expected
                    outcomes["answers"] += 1
    assert outcomes["answers"] > 12 and outcomes["errors"] > 8


def test_slices_stay_behind_and_needs_have_their_pixels() -> None:
    clip = sliced([Slice(b"pixels of 1", 2, b"1"), Slice(b"pixels of 2", 3, b"2")] * 2, (4,), "video")
    job = Prepare(Generate("r", SEEDED, media=(clip,)), 99, 99)
    told = bare(job)
    assert isinstance(told, Prepare) and isinstance(told.job, Generate)
    assert b"pixels" not in msgspec.msgpack.encode(told)
    needs = needs_of(told.job.media, Placed([0] * 10, spans=(((0, 10),),)))
    admit = Admit("r", bytes(40), Sampling(0.0, 0, 1.0, 0.0, 0), (), 1, needs=needs)
    answer = with_payloads(Prepared(Open("r", 10, ()), admit), job)
    assert isinstance(answer, Prepared)
    whole = answer.admitted.needs
    assert [(need.content, need.payload) for need in whole] == [(b"1", b"pixels of 1"), (b"2", b"pixels of 2")]
    assert [media_use(Bound(MEDIA, 1, need.use)).spans for need in whole] == [((0, 2), (5, 2)), ((2, 3), (7, 3))]


async def test_small_jobs_need_no_process() -> None:
    pool = TextPool(CONFIG, TEMPLATE, admission(), start=lambda: pytest.fail("a process was started"))
    async with supervise(pool):
        answer = await pool.ask(Tokenize("abc"))
    assert answer == Tokenized(array("i", [97, 98, 99]).tobytes())


@pytest.mark.parametrize(
    ("job", "large"),
    [
        (Prepare(Generate("r", SEEDED, text="x" * LARGE), 1, 1), False),
        (Prepare(Generate("r", SEEDED, text="x" * (LARGE + 1)), 1, 1), True),
        (Prepare(Generate("r", SEEDED, ids=bytes(4 * 100)), 1, 1), False),
        (Prepare(Generate("r", SEEDED, ids=bytes(4 * 200_000)), 1, 1), True),
        (Prepare(Embed("r", text="x" * (LARGE + 1)), 1, 1), True),
        (Prepare(chat(*["a"] * 20), 1, 1), False),
        (Prepare(chat(*["a"] * 500), 1, 1), True),
        (Prepare(chat("a", tools=[tool()] * 10), 1, 1), False),
        (Prepare(chat("a", tools=[tool()] * 1000), 1, 1), True),
        (Prepare(chat("a", chat_template="{{ messages }}"), 1, 1), True),
        (Tokenize(None, [Message("assistant", (Call("f", "x" * LARGE),))]), True),
        (Tokenize(None, [said("assistant", "", reasoning="x" * LARGE)]), True),
        (Detokenize(bytes(4 * 100)), False),
        (Detokenize(bytes(4 * 30_000)), True),
    ],
)
def test_what_is_large(job: TextJob, large: bool) -> None:
    assert (size_of(job) > LARGE) == large


def test_there_are_at_least_two_so_that_huge_ones_leave_one() -> None:
    assert [processes(cores) for cores in (1, 2, 4, 6, 64)] == [2, 2, 2, 3, 4]


# ── processes come and go ────────────────────────────────────────────────────────────────────


async def test_a_process_goes_on_to_the_next_job() -> None:
    async with odd_pool(most=2) as pool:
        first = await told(pool, "work", HUGE)  # not the first place's
        assert {await told(pool, "work") for _ in range(3)} == {first}


@pytest.mark.parametrize(("what", "cause"), [("die", "it exited with code 3"), ("fatal", "it was told so")])
async def test_a_lost_process_is_named_and_replaced(what: str, cause: str) -> None:
    async with odd_pool() as pool:
        first = await told(pool, "work")
        with pytest.raises(RequestError, match=cause) as lost:  # the second process is sure to have died of it
            await told(pool, what)
        assert (lost.value.status, lost.value.code) == (503, "text_process_lost")
        assert await told(pool, "work") != first


async def test_a_process_that_was_lost_between_two_jobs_costs_nobody_an_answer() -> None:
    async with odd_pool() as pool:
        first = await told(pool, "work")
        os.kill(first, signal.SIGKILL)
        assert await told(pool, "work") != first


async def test_a_job_ends_at_its_deadline() -> None:
    async with odd_pool() as pool:
        first = await told(pool, "work")
        pool._seconds = 1.0
        with pytest.raises(RequestError, match="took over 1 s to render and tokenize") as late:
            await told(pool, "hang")
        pool._seconds = 30.0
        assert (late.value.status, late.value.code) == (400, "text_timeout")
        assert await told(pool, "work") != first


async def test_a_process_that_retires_is_replaced() -> None:
    async with odd_pool() as pool:
        first = await told(pool, "retire")
        assert await told(pool, "work") != first


async def test_no_process_at_all_is_an_answer() -> None:
    def start() -> Any:
        raise OSError("no more processes")

    pool = TextPool(CONFIG, None, admission(), start=start)
    async with supervise(pool):
        for _ in range(3):
            with pytest.raises(RequestError, match="none can be started: no more processes"):
                await told(pool, "work")


async def test_who_leaves_takes_the_job_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of the queue, and out of the process."""
    monkeypatch.setattr(runtime_pool, "GRACE", 0.1)
    async with odd_pool() as pool:
        await told(pool, "work")
        async with anyio.create_task_group() as group:
            for what in ("hang", "hang", "work"):
                group.start_soon(told, pool, what)
            await anyio.sleep(0.1)
            assert len(pool._queue) == 2
            group.cancel_scope.cancel()
        assert not pool._queue and not pool._held
        await told(pool, "work")


async def test_a_full_queue_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_pool, "MOST_WAITING", 2)
    async with odd_pool() as pool, anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(told, pool, "hang")
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        with pytest.raises(RequestError, match="2 long prompts with 6"):
            await told(pool, "work")
        assert isinstance(await pool.ask(Tokenize("small")), Tokenized)
        group.cancel_scope.cancel()


async def test_so_is_too_much_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_pool, "MOST_HELD", 2 * LARGE)
    async with odd_pool() as pool:
        with pytest.raises(RequestError, match="0 long prompts with 0 bytes") as refused:
            await told(pool, "work", 2 * LARGE)
        assert (refused.value.status, refused.value.code) == (503, "queue_full")
        assert await told(pool, "work")


async def test_a_character_counts_as_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_pool, "MOST_HELD", 3 * LARGE)
    async with odd_pool() as pool, anyio.create_task_group() as group:
        group.start_soon(pool.ask, Tokenize("hang " + "😀" * LARGE))
        await anyio.lowlevel.checkpoint()
        with pytest.raises(RequestError, match="0 long prompts with 8"):
            await told(pool, "work")
        group.cancel_scope.cancel()
        await anyio.lowlevel.checkpoint()


async def test_huge_jobs_leave_a_process_to_others() -> None:
    async with odd_pool(most=2) as pool, anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(told, pool, "hang", HUGE)
        await anyio.lowlevel.checkpoint()
        assert await told(pool, "work")
        group.cancel_scope.cancel()


# ── the order of a request's messages ────────────────────────────────────────────────────────


class ScriptedPool:
    """Answers what begins with "large" after some turns of the loop, with an error if "bad" is in it."""

    def __init__(self, turns: dict[str, int]) -> None:
        self.turns = turns
        self.left: list[str] = []

    def is_large(self, job: Any) -> bool:
        return (job.job.text or "").startswith("large")

    async def ask(self, job: Any) -> Prepared:
        rid = job.job.rid
        try:
            for _ in range(self.turns.get(rid, 0)):
                await anyio.lowlevel.checkpoint()
        except BaseException:
            self.left.append(rid)
            raise
        if "bad" in job.job.text:
            raise RequestError("bad")
        return Prepared(Open(rid, 1, ()), Admit(rid, bytes(4), Sampling(0.0, 0, 1.0, 0.0, 0), (), 1))


class Record:
    """What came to the detokenizer and to the scheduler, in one list. Senders wait some turns, as on a full channel."""

    def __init__(self, said: list[Any], turns: int) -> None:
        self.said = said
        self.turns = turns

    async def send(self, message: Any) -> None:
        for _ in range(self.turns):
            await anyio.lowlevel.checkpoint()
        self.said.append(message)


async def tokenized(script: list[Any], turns: dict[str, int], slow: int = 0) -> list[Any]:
    """What a tokenizer says to `script`, whose numbers are turns of the loop that pass."""
    said: list[Any] = []
    sender, inbox = open_channel()
    actor = TokenizerActor(admission(), inbox, Record(said, slow), Record(said, slow // 2), ScriptedPool(turns))
    async with supervise(actor):
        await sender.send(WorkerReady(1, 1, 1, 1, 4096, 257, 1, "", "", {}))
        for step in script:
            for _ in range(step if isinstance(step, int) else 0):
                await anyio.lowlevel.checkpoint()
            if not isinstance(step, int):
                await sender.send(step)
        for _ in range(100):
            await anyio.lowlevel.checkpoint()
        assert not actor._underway
    return said


async def test_a_small_request_goes_past_a_large_one() -> None:
    script = [Generate("a", SEEDED, text="large"), Generate("b", SEEDED, text="small")]
    said = await tokenized(script, {"a": 20})
    assert [(type(one), one.rid) for one in said] == [(Open, "b"), (Admit, "b"), (Open, "a"), (Admit, "a")]


async def test_an_abort_in_the_pool_ends_the_request_there() -> None:
    said = await tokenized([Generate("a", SEEDED, text="large"), 5, Abort("a")], {"a": 1000})
    opened, ended = said
    assert opened == Open("a", 0, ())
    assert isinstance(ended, Tokens) and ended.rids == ["a"] and ended.finishes[0].reason == "abort"


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.sampled_from(["large", "large bad", "small", ""]), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
    slow=st.integers(0, 6),
)
def test_an_admit_never_comes_after_its_abort(texts: list[str], seed: int, slow: int) -> None:
    chance = random.Random(seed)
    rids = [str(index) for index in range(len(texts))]
    script: list[Any] = []
    aborted = {rid for rid in rids if chance.random() < 0.6}
    for rid, text in zip(rids, texts, strict=True):
        script += [Generate(rid, SEEDED, text=text), chance.randrange(6)]
        if rid in aborted and chance.random() < 0.5:
            script += [Abort(rid), chance.randrange(3)]
    script += [Abort(rid) for rid in aborted]
    said = anyio.run(tokenized, script, {rid: chance.randrange(20) for rid in rids}, slow)
    for rid, text in zip(rids, texts, strict=True):
        of_it = [type(one) for one in said if getattr(one, "rid", "") == rid or rid in getattr(one, "rids", ())]
        told = [kind for kind in of_it if kind is not Abort]
        assert told in ([Open, Admit], [Failed], [Open, Tokens])
        if text != "large bad" and text and rid not in aborted:
            assert told == [Open, Admit]
        if Admit in told and rid in aborted:
            assert of_it[-1] is Abort


class Counting(Text):
    """The echo model's text, which remembers how many prompts were encoded at a time, and in which thread."""

    def __init__(self) -> None:
        self.__dict__.update(text().__dict__)
        self.batches: list[tuple[int, bool]] = []

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        self.batches.append((len(prompts), threading.current_thread() is threading.main_thread()))
        return super().encode_prompts(prompts)


async def admitted(script: list[Any], count: int) -> tuple[list[Any], Counting]:
    """What a tokenizer that gets all of `script` at once says, until that is `count` messages."""
    said: list[Any] = []
    counting = Counting()
    sender, inbox = open_channel()
    for message in [WorkerReady(1, 1, 1, 1, 4096, 257, 1, "", "", {}), *script]:
        sender.send_nowait(message)
    actor = TokenizerActor(Admission(counting), inbox, Record(said, 0), Record(said, 0), ScriptedPool({}))
    async with supervise(actor):
        with anyio.fail_after(60):
            while len(said) < count:
                await anyio.sleep(0.001)
    return said, counting


async def test_prompts_that_come_together_are_encoded_together_beside_the_loop() -> None:
    messages = [[said_by("user", f"{index} {'x' * 500}")] for index in range(80)]
    requests = [Generate(str(index), SEEDED, messages=messages[index]) for index in range(80)]
    requests[5] = Generate("5", SEEDED, messages=[said_by("user", "no")])
    requests[7] = Generate("7", SEEDED, ids=array("i", [1, 2]).tobytes())
    requests[9] = Generate("9", SEEDED, text="y" * 5000)  # more than the model takes
    requests[11] = Generate("11", SEEDED, text="z", special=False)
    said, counting = await admitted([*requests, Abort("79")], 161 - 2)
    assert said[-1] == Abort("79")
    assert [one.rid for one in said if isinstance(one, Failed)] == ["5", "9"]
    alone = admission()
    alone.max_model_len = 4096
    for index in sorted({*range(80)} - {5, 9}):
        opened, admit = (one for one in said if getattr(one, "rid", "") == str(index) and not isinstance(one, Abort))
        assert (opened, admit) == alone.admit(requests[index])
        assert isinstance(opened, Open) and isinstance(admit, Admit)
    order = [int(one.rid) for one in said if isinstance(one, Admit)]
    assert order == sorted(order)
    sizes = [size for size, _ in counting.batches]
    assert sizes[:3] == [4, 7, 16]  # the seventh of eight has ids
    assert max(sizes) <= 32
    assert not any(here for _, here in counting.batches)


async def test_a_short_prompt_alone_is_encoded_at_once() -> None:
    _, counting = await admitted([Generate("a", SEEDED, text="x" * 1000)], 2)
    assert counting.batches == [(1, True)]
    _, counting = await admitted([Generate("a", SEEDED, text="x" * 3000)], 2)
    assert counting.batches == [(1, False)]


async def test_a_long_prompt_is_answered_and_one_may_be_aborted_on_its_way() -> None:
    async with open_house(pages=10_000) as house:
        long = "x" * 25_000
        assert await house.text(prompt(long, "a", max_tokens=3)) == counted("x", 3)

        async def aborted() -> None:
            async for chunk in house.front.generate(prompt("y" * 30_000, "b", max_tokens=3)):
                assert chunk.finish == "abort"

        async with anyio.create_task_group() as group:
            group.start_soon(aborted)
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
            assert house.front.abort("b") == 1
        await house.settled()


# ── the log ──────────────────────────────────────────────────────────────────────────────────


async def test_a_process_does_not_say_again_what_its_front_has_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(text_pool, "LARGE", -1)
    pool = TextPool(CONFIG, TEMPLATE, admission(), most=1)
    async with supervise(pool):
        with anyio.fail_after(60):
            assert isinstance(await pool.ask(Tokenize("abc")), Tokenized)
    assert "parser: " not in capfd.readouterr().err
