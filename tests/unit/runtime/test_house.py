"""The actors together, without a device: what a client sees, and what must be left when it is gone."""

from array import array
from contextlib import aclosing

import anyio
import anyio.lowlevel
import pytest
from house import counted, open_house, prompt

from engine.errors import RequestError
from engine.messages.control import Answer, Flushed
from engine.messages.questions import CountExperts, Echo
from engine.messages.request import Generate
from engine.params.sampling import SamplingParams

pytestmark = pytest.mark.anyio


async def test_a_reply_counts_on_from_its_prompt() -> None:
    async with open_house() as house:
        async with aclosing(house.front.generate(prompt("a", max_tokens=20))) as stream:
            chunks = [chunk async for chunk in stream]
        assert "".join(chunk.text for chunk in chunks) == counted("a", 20)
        assert [token for chunk in chunks for token in chunk.ids] == list(range(98, 118))
        assert [chunk.finish for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        last = chunks[-1]
        assert (last.finish, last.prompt_tokens, last.completion_tokens) == ("length", 1, 20)
        await house.settled()


async def test_many_replies_at_once_do_not_mix() -> None:
    async with open_house(max_running=8) as house:
        texts: dict[str, str] = {}

        async def one(letter: str, count: int) -> None:
            texts[letter] = await house.text(prompt(letter, rid=letter, max_tokens=count))

        wanted = {chr(33 + index): 5 + index for index in range(40)}
        async with anyio.create_task_group() as group:
            for letter, count in wanted.items():
                group.start_soon(one, letter, count)
        assert texts == {letter: counted(letter, count) for letter, count in wanted.items()}
        await house.settled()


async def test_a_long_prompt_is_cut_into_steps_and_then_cached() -> None:
    async with open_house(max_step_tokens=16) as house:
        text = "z" * 199 + "a"
        assert await house.text(prompt(text, max_tokens=4)) == "bcde"
        async with aclosing(house.front.generate(prompt(text, max_tokens=4))) as stream:
            chunks = [chunk async for chunk in stream]
        assert "".join(chunk.text for chunk in chunks) == "bcde"
        assert chunks[-1].cached_tokens == 196
        await house.settled()


@pytest.mark.parametrize(
    ("params", "text", "finish", "matched", "completion"),
    [
        ({"max_tokens": 50, "stop": ("fg",)}, "bcde", "stop", "fg", 6),
        ({"max_tokens": 50, "stop": ("xyz", "d")}, "bc", "stop", "d", 3),
        ({"max_tokens": 50, "stop_token_ids": (102,)}, "bcde", "stop", 102, 5),
        ({"max_tokens": 3, "stop": ("cdX",)}, "bcd", "length", None, 3),
        ({"max_tokens": 50, "stop": ("c", "f"), "min_tokens": 3}, "bcde", "stop", "f", 5),
        ({"max_tokens": 50, "stop_regex": ("e[a-z]", "gh")}, "bcd", "stop", "e[a-z]", 5),
    ],
)
async def test_ends_of_a_reply(params: dict, text: str, finish: str, matched: object, completion: int) -> None:
    async with open_house() as house:
        async with aclosing(house.front.generate(prompt("a", **params))) as stream:
            chunks = [chunk async for chunk in stream]
        assert "".join(chunk.text for chunk in chunks) == text
        assert (chunks[-1].finish, chunks[-1].matched) == (finish, matched)
        assert chunks[-1].completion_tokens == sum(len(chunk.ids) for chunk in chunks) == completion
        await house.settled()


async def test_a_stop_expression_that_takes_too_long_fails_its_request_alone() -> None:
    async with open_house() as house:
        with pytest.raises(RequestError, match=r"stop_regex .* took over .* simplify") as error:
            await house.text(prompt("a", max_tokens=100, stop_regex=(r"(\w|\w)*!",)))
        assert (error.value.status, error.value.param) == (400, "stop_regex")
        assert await house.text(prompt("a", rid="other", max_tokens=3)) == "bcd"
        await house.settled()


async def test_clients_that_leave_free_their_pages() -> None:
    async with open_house(seconds=0.001) as house:
        for index in range(50):
            async with aclosing(house.front.generate(prompt("a" * (1 + index), max_tokens=3000))) as stream:
                await anext(stream)
        await house.settled()
        assert not house.front._open


async def test_pages_are_free_within_the_steps_in_flight() -> None:
    async with open_house(seconds=0.02) as house:
        logic = house.scheduler.scheduler
        async with aclosing(house.front.generate(prompt("a" * 100, max_tokens=3000))) as stream:
            await anext(stream)
            assert logic.counts()["running"] == 1
            planned = logic.counts()["steps"]
        with anyio.fail_after(60):
            while logic.counts()["running"]:
                await anyio.lowlevel.checkpoint()
        assert logic.counts()["steps"] <= planned + 1
        assert logic.counts()["pages_free"] + logic.counts()["pages_cached"] == 1024


@pytest.mark.parametrize(("seconds", "most"), [(0.02, 2), (0.001, 3)])
async def test_a_third_step_is_in_flight_where_steps_are_short(seconds: float, most: int) -> None:
    async with open_house(seconds=seconds) as house:
        seen = []
        house.front.on_stats.append(lambda stats: seen.append(house.scheduler.in_flight))
        async for _ in house.front.generate(prompt("a", max_tokens=12)):
            seen.append(house.scheduler.in_flight)
        assert max(seen) == most
        await house.settled()


async def test_abort_by_id_ends_the_reply_with_abort() -> None:
    async with open_house(seconds=0.001) as house:
        stream = house.front.generate(prompt("a", rid="mine", max_tokens=3000))
        async with aclosing(stream):
            await anext(stream)
            assert house.front.abort("other") == 0
            assert house.front.abort("mine") == 1
            finishes = [chunk.finish async for chunk in stream]
        assert finishes[-1] == "abort"
        await house.settled()


async def test_a_rid_in_use_is_refused_and_free_again_at_once() -> None:
    async with open_house(seconds=0.001) as house:
        async with aclosing(house.front.generate(prompt("a", rid="x", max_tokens=3000))) as stream:
            await anext(stream)
            with pytest.raises(RequestError, match="'x' is still running"):
                await house.text(prompt("b", rid="x"))
        assert await house.text(prompt("a", rid="x", max_tokens=3)) == "bcd"
        await house.settled()


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (prompt("a" * 5000), "5000 tokens.*4096.*at most 4095"),
        (prompt("a", max_tokens=4096), "max_tokens is 4096.*at most 4095"),
        (prompt(""), "prompt is empty"),
    ],
)
async def test_what_can_never_fit_is_refused_with_the_numbers(request_: object, said: str) -> None:
    async with open_house() as house:
        with pytest.raises(RequestError, match=said):
            await house.text(request_)
        await house.settled()


async def test_ids_beyond_the_models_rows_are_refused() -> None:
    """A tokenizer may know more tokens than the model has rows for."""
    async with open_house(vocab_size=128) as house:
        with pytest.raises(RequestError, match=r"token id 233 .* from 0 to 127"):
            await house.text(Generate("r", SamplingParams(), ids=array("i", [5, 233]).tobytes()))
        with pytest.raises(RequestError, match=r"token id 195 .* from 0 to 127"):
            await house.text(prompt("é"))
        assert await house.text(prompt("a", max_tokens=2)) == "bc"


async def test_a_text_beyond_all_bounds_is_refused_before_it_is_encoded() -> None:
    async with open_house() as house:
        with pytest.raises(RequestError, match="the prompt has 10000000 characters"):
            await house.text(prompt("a" * 10_000_000))


async def test_page_shortage_retracts_and_every_reply_is_whole() -> None:
    async with open_house(pages=24, max_running=8) as house:
        texts: list[str] = []

        async def one(letter: str) -> None:
            texts.append(await house.text(prompt(letter, rid=letter, max_tokens=60)))

        async with anyio.create_task_group() as group:
            for letter in "!\"#$%&'(":
                group.start_soon(one, letter)
        assert sorted(texts) == sorted(counted(letter, 60) for letter in "!\"#$%&'(")
        assert house.scheduler.scheduler.counts()["retractions_total"] > 0
        await house.settled()


async def test_a_lost_worker_fails_what_ran_and_serves_what_waited() -> None:
    async with open_house(seconds=0.001, max_running=2) as house:
        ends: dict[str, str] = {}

        async def one(rid: str) -> None:
            try:
                ends[rid] = await house.text(prompt("a", rid=rid, max_tokens=400))
            except RequestError as error:
                ends[rid] = error.code

        async with anyio.create_task_group() as group:
            for rid in "12345":
                group.start_soon(one, rid)
                await anyio.sleep(0.002)
            await house.executor.lose("pulled the plug")
            while house.front.health().status != "restarting":
                await anyio.lowlevel.checkpoint()
            assert house.front.health().cause == "pulled the plug"
        assert [ends[rid] for rid in "12"] == ["worker_lost"] * 2
        assert {ends[rid] for rid in "345"} == {ends["3"]} and len(ends["3"]) >= 150
        assert house.front.health().ok
        await house.settled()


async def test_drain_lets_replies_end_and_nothing_in() -> None:
    async with open_house(seconds=0.001) as house:
        async with (
            aclosing(house.front.generate(prompt("a", max_tokens=20))) as stream,
            anyio.create_task_group() as group,
        ):
            await anext(stream)
            group.start_soon(house.front.drain, 5.0)
            await anyio.lowlevel.checkpoint()
            with pytest.raises(RequestError, match="shutting down"):
                await house.text(prompt("b", rid="late"))
            assert [chunk.finish async for chunk in stream][-1] == "length"
        assert house.front.health().status == "draining"


async def test_a_slow_client_holds_nobody_up_and_misses_nothing() -> None:
    async with open_house() as house, aclosing(house.front.generate(prompt("a", rid="slow", max_tokens=100))) as slow:
        first = await anext(slow)
        assert await house.text(prompt("b", rid="fast", max_tokens=150)) == counted("b", 150)
        await house.settled()
        rest = [chunk async for chunk in slow]
        assert len(rest) <= 2
        assert first.text + "".join(chunk.text for chunk in rest) == counted("a", 100)


async def test_more_open_requests_than_the_limit_are_refused() -> None:
    async with open_house(seconds=0.01, max_running=1, max_waiting=1) as house, anyio.create_task_group() as group:
        for rid in "12":
            group.start_soon(house.text, prompt("a", rid=rid, max_tokens=5))
        await anyio.sleep(0.005)
        with pytest.raises(RequestError, match="2 requests are open, and 2 is the limit"):
            await house.text(prompt("a", rid="3"))


async def test_flush_forgets_what_nobody_uses() -> None:
    async with open_house() as house:
        await house.text(prompt("a" * 40, max_tokens=1))
        await house.settled()
        flushed = await house.front.flush()
        assert (flushed.freed, flushed.in_use) == (10, 0)
        assert house.scheduler.scheduler.counts()["pages_free"] == 1024


async def test_questions_to_the_worker_are_answered_each_with_its_own_value_or_cause() -> None:
    async with open_house() as house:
        answers: dict[int, int] = {}

        async def ask(value: int) -> None:
            answers[value] = await house.front.ask(Echo(value))

        async with anyio.create_task_group() as group:
            for value in range(20):
                group.start_soon(ask, value)
            assert await house.front.flush() == Flushed(0, 0)
        assert answers == {value: value for value in range(20)}
        assert (await house.front.ask(CountExperts("start"))).layers == (1, 3)
        house.executor.answer = lambda ask: Answer(ask.number, cause="it will not say")
        with pytest.raises(RequestError, match="it will not say"):
            await house.front.ask(Echo())
        await house.settled()
