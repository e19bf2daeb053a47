"""Programs as SGLang's documentation writes them, with one line changed: how they are run, and names of its own.

On the echo model, which counts on from the prompt's last byte. What a program itself says is in test_language.py.
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from real_server import served

import engine.lang as sgl  # the line
from engine import Engine
from engine.errors import ConfigError, ProgramError


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Engine(model="echo", log_level="error") as engine, served(engine) as server:
        yield server.url


@pytest.fixture
def endpoint(url: str) -> Iterator[Any]:
    endpoint = sgl.RuntimeEndpoint(url)
    sgl.set_default_backend(endpoint)
    yield endpoint
    sgl.set_default_backend(None)
    endpoint.__exit__(None, None, None)


@sgl.function
def text_qa(s: Any, question: str) -> None:
    s += "Q: " + question
    s += "A" + sgl.gen("answer", max_tokens=4, stop="E")


@sgl.function
def dialogue(s: Any, first: str, second: str) -> None:
    s += sgl.system("S")
    s += sgl.user(first)
    s += sgl.assistant(sgl.gen("first", max_tokens=2))
    with s.user():
        s += second
    s += sgl.assistant_begin()
    s += "A" + sgl.gen("second", max_tokens=2)
    s += sgl.assistant_end()


def test_a_function_runs_by_its_name_and_by_run(endpoint: Any) -> None:
    for s in (text_qa("x", temperature=0), text_qa.run(question="x", temperature=0, max_new_tokens=4)):
        assert (s["answer"], s.text()) == ("BCD", "Q: xABCD")
    s = dialogue.run(first="1", second="2", temperature=0)
    assert [(m["role"], m["content"]) for m in s.messages()][-1] == ("assistant", "ABC")
    assert s["second"] == "BC"


def test_a_batch_has_threads_and_a_bar(endpoint: Any) -> None:
    states = text_qa.run_batch([{"question": each} for each in "xyz"], temperature=0, num_threads=2, progress_bar=True)
    assert [s["answer"] for s in states] == ["BCD"] * 3
    assert text_qa.run_batch([{"question": "x"}], num_threads="auto", temperature=0)[0]["answer"] == "BCD"


def test_a_stream_is_read_while_the_program_runs(endpoint: Any) -> None:
    s = text_qa.run(question="x", temperature=0, stream=True)
    assert "".join(s.text_iter()) == "Q: xABCD"
    s = dialogue.run(first="1", second="2", temperature=0, stream=True)
    assert "".join(s.text_iter(var_name="second")) == "BC"
    assert s["first"] == "\x0b\x0c" and s.error() is None

    async def follow() -> str:
        s = dialogue.run(first="1", second="2", temperature=0, stream=True)
        return "".join([piece async for piece in s.text_async_iter(var_name="second")])

    assert asyncio.run(follow()) == "BC"


def test_a_variable_is_streamed_with_what_is_known_of_its_call(endpoint: Any, url: str) -> None:
    async def pieces(s: Any) -> list[Any]:
        return [each async for each in s.text_async_iter(var_name="second", return_meta_data=True)]

    async def here() -> list[Any]:
        async with sgl.Server(url) as server, dialogue.stream_async("1", "2", backend=server, temperature=0) as s:
            return await pieces(s)

    async def elsewhere() -> list[Any]:
        return await pieces(dialogue.run(first="1", second="2", temperature=0, stream=True))

    for follow in (here, elsewhere):
        *earlier, (text, meta) = asyncio.run(follow())
        assert "".join(piece for piece, _ in earlier) == "BC" and text == ""
        assert all(each.finish == "" and not each.completion_tokens for _, each in earlier)
        assert (meta.finish, meta.completion_tokens, meta.prompt_tokens > 2) == ("length", 2, True)

    async def of_all() -> None:
        async for _ in dialogue.run(first="1", second="2", stream=True).text_async_iter(return_meta_data=True):
            raise AssertionError("nothing is told")

    with pytest.raises(ValueError, match="name it: var_name="):
        asyncio.run(of_all())


def test_a_stream_keeps_what_the_program_raises(endpoint: Any) -> None:
    @sgl.function
    def fails(s: Any) -> None:
        s += "a" + sgl.gen("x", max_tokens=1)
        raise ValueError(s["x"])

    s = fails.run(stream=True, temperature=0)
    with pytest.raises(ValueError, match="b"):
        list(s.text_iter())
    assert isinstance(s.error(), ValueError) and s["x"] == "b"


def test_forks_tools_loops_and_variables(endpoint: Any) -> None:
    @sgl.function
    def tips(s: Any) -> None:
        s += "Two tips: "
        forks = s.fork(2)
        for index, fork in enumerate(forks):
            fork += f"tip {index + 1}:a" + sgl.gen("tip", max_tokens=2, stop="\n\n")
        s += "1 " + forks[0]["tip"] + " 2 " + forks[1]["tip"]
        s += "k" + sgl.gen("summary", max_tokens=1)

    assert tips()["summary"] == "l"

    @sgl.function
    def tool(s: Any, question: str) -> None:
        s += question + sgl.gen("tool", choices=["c", "b"])
        s["kept"] = s["tool"] * 2
        if s["tool"] == "b":
            s += "1" + sgl.gen("number", dtype="int", max_tokens=2)

    s = tool("a", temperature=0)
    assert (s["tool"], s["kept"], s["number"], s.text()) == ("b", "bb", "23", "ab123")

    @sgl.function
    def grammar(s: Any, name: str) -> None:
        s += name + sgl.gen("date", regex="[0-9]{2}", max_new_tokens=4)
        s += "a" + sgl.gen("json", json_schema={"const": 1}, min_new_tokens=1)

    s = grammar.run(name="x", temperature=0)
    assert s["date"].isdigit() and s["json"] == "1"


def test_programs_run_in_a_plain_event_loop_and_say_where_they_cannot(endpoint: Any, url: str) -> None:
    async def here() -> list[Any]:
        async with sgl.Server(url) as server:
            asked: dict[str, Any] = {"backend": server, "temperature": 0}
            s = await text_qa.run_async("x", **asked)
            (batched,) = await text_qa.run_batch_async([{"question": "y"}], **asked)
            async with dialogue.stream_async("1", "2", **asked) as followed:
                return [
                    s["answer"],
                    batched["answer"],
                    "".join([piece async for piece in followed.text_async_iter("second")]),
                ]

    async def elsewhere() -> None:
        with pytest.raises(ConfigError, match="lives in another event loop"):
            await text_qa.run_async("x", timeout=5)

    assert asyncio.run(here()) == ["BCD", "BCD", "BC"]
    asyncio.run(elsewhere())
    with ThreadPoolExecutor(1) as pool, pytest.raises(ConfigError, match="in each thread that you start"):
        pool.submit(text_qa.run, question="x").result()


def test_reasoning_is_kept_apart_by_the_served_parser(endpoint: Any) -> None:
    @sgl.function
    def thinks(s: Any) -> None:
        s += sgl.user("?")
        s += sgl.separate_reasoning(sgl.assistant(sgl.gen("a", max_tokens=2)), model_type="qwen3")

    s = thinks(temperature=0)
    assert s["a"] and s["a_reasoning_content"] == "", "the echo model has no parser"


def test_what_is_not_here_says_what_to_write() -> None:
    with pytest.raises(ConfigError, match="set_default_backend"):
        text_qa.run(question="x")
    for name, instead in (("OpenAI", "Server"), ("Runtime", "Engine"), ("Engine", "Engine")):
        with pytest.raises(AttributeError, match=f"{name}.*; write .*{instead}"):
            getattr(sgl, name)
    with pytest.raises(AttributeError, match=r"'nothing'$"):
        _ = sgl.nothing
    for make in (lambda: sgl.gen("x", return_logprob=True), lambda: text_qa.run("x", backend=3, top_logprobs_num=2)):
        with pytest.raises(ConfigError, match=r"say logprobs=k|backend is 3"):
            make()
    with pytest.raises(ConfigError, match="dtype is 'list'"):
        sgl.gen("x", dtype="list")


def test_a_mistake_of_the_program_ends_its_stream(endpoint: Any) -> None:
    @sgl.function
    def stray(s: Any) -> None:
        s += sgl.user(sgl.gen("x"))

    with pytest.raises(ProgramError, match="message of the user"):
        list(stray.run(stream=True).text_iter("x"))
