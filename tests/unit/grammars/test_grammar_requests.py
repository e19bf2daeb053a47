"""Requests that wait for their grammars, from the front to a fake device and back; the compiler is a process."""

import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest
from house import House, counted, open_house, prompt
from test_compiler import start

import engine.grammars.vocabulary
import engine.text.checkpoint
import engine.text.fallback
from engine.errors import RequestError
from engine.messages import FromExecutor
from engine.messages.assets import Bound, Loaded
from engine.messages.grammars import GRAMMAR, grammar_need
from engine.messages.request import Admit, Generate
from engine.params.grammar import Grammar
from engine.params.sampling import Sampling
from engine.runtime.channel import Outbox

pytestmark = pytest.mark.anyio
JSON = '{"type":"object","properties":{"a":{"type":"integer"}}}'


class Compilers:
    """Starts compilers of odd grammars (slow_compiler.py), and counts them."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []

    def __call__(self) -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
        sock, process = start()
        self.processes.append(process)
        return sock, process


@asynccontextmanager
async def odd_house(**options: Any) -> AsyncIterator[House]:
    """A house in which a regex says what becomes of its compilation."""
    async with open_house(compiler=Compilers(), **options) as house:
        yield house
        await house.settled()
        assert house.scheduler.room.waiting == 0


def with_regex(source: str, rid: str = "r", **params: Any) -> Generate:
    return prompt("a", rid, regex=source, max_tokens=5, **params)


async def refusal(house: House, request: Generate) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await house.text(request)
    return caught.value


async def test_a_reply_comes_once_its_grammar_is_there() -> None:
    async with odd_house() as house:
        assert await house.text(with_regex("one")) == counted("a", 5)
        assert [admit.bound for admit in house.executor.device.admits.values()] == [(Bound(GRAMMAR, 1),)]
        request = prompt("a", max_tokens=5, grammar=Grammar("regex", "one", after="</think>"))
        assert await house.text(request) == counted("a", 5)
        assert {admit.bound for admit in house.executor.device.admits.values()} == {(Bound(GRAMMAR, 1, b"</think>"),)}


async def test_others_run_while_a_grammar_is_compiled_and_it_is_compiled_once() -> None:
    async with odd_house(grammar_helpers=2) as house:
        texts: list[str] = []

        async def ask(number: int) -> None:
            texts.append(await house.text(with_regex("sleep 1", f"slow-{number}")))

        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(ask, number)
            while house.scheduler.room.waiting < 20:
                await anyio.sleep(0.01)
            assert await house.text(prompt("b", "free", max_tokens=5)) == counted("b", 5)
            assert await house.text(with_regex("quick", "quick")) == counted("a", 5)
            counts = house.scheduler.scheduler.counts() if house.scheduler.scheduler else {}
            assert (counts["running"], counts["waiting"]) == (0, 0)  # those that wait for a grammar hold nothing
            assert texts == [] and house.scheduler.room.waiting == 20
        assert texts == [counted("a", 5)] * 20
        assert made_in(house) == {1, 2}


async def test_a_refusal_names_what_was_asked_and_is_answered_again_without_a_compiler() -> None:
    async with odd_house() as house:
        first = await refusal(house, with_regex("refuse this"))
        second = await refusal(house, with_regex("refuse this", "other"))
        for error in (first, second):
            assert (error.status, error.code, error.param) == (400, "unsupported_keyword", "grammar")
            assert "this is not known" in error.message
        assert await house.text(with_regex("one")) == counted("a", 5)


async def test_a_timeout_is_a_refusal_that_is_not_kept() -> None:
    async with odd_house(grammar_seconds=0.3) as house:
        error = await refusal(house, with_regex("sleep 60"))
        assert (error.status, error.code) == (400, "grammar_timeout") and "0.3 s" in error.message
        (make,) = house.scheduler.room.admit(admit_of(with_regex("sleep 60"))).makes
        assert make.number == 2  # it is compiled anew
        house.scheduler.room.abort("r")


def admit_of(request: Generate) -> Any:
    assert request.grammar is not None
    return Admit(request.rid, b"", Sampling(0.0, 0, 1.0, 0.0, 0), (), 1, needs=(grammar_need(request.grammar),))


def made_in(house: House) -> set[int]:
    """The numbers of what the makers have made."""
    return {asset.number for asset in house.scheduler.room._assets.values() if asset.payload}


async def test_who_leaves_while_waiting_is_forgotten() -> None:
    async with odd_house() as house:
        stream = house.front.generate(with_regex("sleep 0.5"))
        with anyio.move_on_after(0.2):
            await anext(stream)
        await stream.aclose()
        seen: list[Any] = []

        async def read() -> None:
            async with aclosing(house.front.generate(with_regex("sleep 0.5", "aborted"))) as chunks:
                seen.extend([chunk async for chunk in chunks])

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await anyio.sleep(0.1)
            assert house.front.abort("aborted") == 1
        assert [(chunk.finish, chunk.ids) for chunk in seen] == [("abort", [])]


async def test_a_compiler_that_dies_fails_what_it_worked_on() -> None:
    compilers = Compilers()
    async with open_house(compiler=compilers) as house, anyio.create_task_group() as group:
        failures: list[RequestError] = []

        async def ask() -> None:
            failures.append(await refusal(house, with_regex("sleep 60")))

        group.start_soon(ask)
        while not compilers.processes:
            await anyio.sleep(0.01)
        await anyio.sleep(0.3)
        compilers.processes[0].kill()
        with anyio.fail_after(60):
            while not failures:
                await anyio.sleep(0.01)
        assert (failures[0].status, failures[0].code) == (503, "compiler_lost")
        assert await house.text(with_regex("one")) == counted("a", 5)
        assert len(compilers.processes) == 2


async def test_a_worker_that_dies_gets_the_grammars_again() -> None:
    async with odd_house(seconds=0.002) as house:
        assert await house.text(with_regex("one")) == counted("a", 5)
        await house.executor.lose("tested")
        with anyio.fail_after(60):
            while house.front.health().status != "ready" or house.executor.lost:
                await anyio.sleep(0.01)
        assert await house.text(with_regex("one", "again")) == counted("a", 5)
        assert house.executor.loaded == [1, 1]


async def test_no_step_is_planned_before_a_restarted_worker_has_what_its_rows_need() -> None:
    async with odd_house(seconds=0.002, max_running=1) as house, anyio.create_task_group() as group:
        assert await house.text(with_regex("one")) == counted("a", 5)
        ended: list[str] = []

        async def ask(rid: str, tokens: int) -> None:
            request = prompt("a", rid, regex="one", max_tokens=tokens)
            try:
                ended.append(await house.text(request))
            except RequestError as error:
                ended.append(error.code)

        group.start_soon(ask, "runs", 2000)
        while not house.scheduler.in_flight:
            await anyio.sleep(0.001)
        group.start_soon(ask, "queued", 5)
        logic = house.scheduler.scheduler
        while logic is None or logic.counts()["waiting"] < 1:
            await anyio.sleep(0.001)
        slow = SlowLoads(house.executor.scheduler)
        house.executor.scheduler = slow
        await house.executor.lose("tested")
        with anyio.fail_after(60):
            await slow.asked.wait()
            while house.front.health().status != "ready":
                await anyio.sleep(0.001)
            await house.front.flush()  # all that came before is done
            assert house.scheduler.in_flight == 0 and ended == ["worker_lost"]
            slow.gate.set()
            while len(ended) < 2:
                await anyio.sleep(0.001)
        assert ended[1] == counted("a", 5)


class SlowLoads:
    """The way from the executor to the scheduler, on which the word of what is loaded waits for `gate`."""

    def __init__(self, outbox: Outbox[FromExecutor]) -> None:
        self.outbox = outbox
        self.asked, self.gate = anyio.Event(), anyio.Event()

    async def send(self, message: FromExecutor) -> None:
        if isinstance(message, Loaded):
            self.asked.set()
            await self.gate.wait()
        await self.outbox.send(message)


async def test_grammars_that_are_compiled_while_a_worker_starts_hold_nothing_up() -> None:
    async with odd_house() as house, anyio.create_task_group() as group:
        assert await house.text(with_regex("one 0")) == counted("a", 5)
        house.executor.restarted = anyio.Event()
        await house.executor.lose("tested")
        texts: list[str] = []

        async def ask(number: int) -> None:
            texts.append(await house.text(with_regex(f"one {number}", f"r{number}")))

        for number in range(1, 8):
            group.start_soon(ask, number)
        with anyio.fail_after(60):
            while len(made_in(house)) < 8:
                await anyio.sleep(0.01)
            await house.front.flush()
            assert house.front.health().status == "restarting"
            house.executor.restarted.set()
            while len(texts) < 7:
                await anyio.sleep(0.01)
        assert sorted(house.executor.loaded) == [1, *range(1, 9)]  # none twice on one device


async def test_grammars_beyond_the_cache_are_forgotten_on_the_device_too() -> None:
    async with odd_house(grammar_cache=2) as house:
        for number in range(5):
            assert await house.text(with_regex(f"one {number}", f"r{number}")) == counted("a", 5)
        with anyio.fail_after(60):
            while house.executor.dropped != [1, 2, 3]:  # two that nobody uses are kept
                await anyio.sleep(0.01)


async def test_without_an_engine_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.runtime.launch.grammar_engines", lambda plugins: [])
    async with open_house() as house:
        error = await refusal(house, with_regex("a"))
        assert (error.code, error.param) == (
            "no_grammar_engine",
            "grammar",
        ) and "pip install llguidance" in error.message
        assert await house.text(prompt("a", max_tokens=5)) == counted("a", 5)


async def test_a_model_that_ends_nothing_follows_no_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine.text.checkpoint.read_text

    def endless(*given: Any) -> Any:
        return msgspec.structs.replace(real(*given), eos_ids=())

    monkeypatch.setattr(engine.text.fallback, "read_text", endless)
    monkeypatch.setattr(engine.grammars.vocabulary, "read_text", endless)
    async with open_house() as house:
        assert (await refusal(house, with_regex("a"))).code == "no_end_token"


async def test_real_grammars_go_the_same_way() -> None:
    async with open_house() as house:
        assert await house.text(prompt("a", json_schema=JSON, max_tokens=5)) == counted("a", 5)
        error = await refusal(house, prompt("a", json_schema='{"type":"object","not":{"const":1}}'))
        assert error.code == "unsupported_keyword" and '["not"]' in error.message
        with pytest.raises(RequestError, match="a JSON schema is an object"):  # refused before it is on its way
            prompt("a", json_schema="[]")
