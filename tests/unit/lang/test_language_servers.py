"""Programs over HTTP: what a server of another make cannot do is said before anything is sent. Reasoning, failures.

That our server gives what the engine in the process gives is shown beside the engine, in test_language.py.
"""

import asyncio
import base64
import gc
import runpy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from http_front import FakeFront, chunks, serving, text_of

from engine import WorkerError
from engine.errors import ConfigError, ProgramError, RequestError
from engine.lang import (
    Server,
    State,
    assistant,
    decide,
    function,
    gen,
    image,
    select,
    separate_reasoning,
    user,
    video,
)
from engine.messages.reply import TokenLogprob
from engine.params.grammar import Grammar

# ── another server ───────────────────────────────────────────────────────────────────────────

NO: dict[str, Any] = {"token": "no", "logprob": -0.5}
LEGACY = {"tokens": ["yes"], "token_logprobs": [-0.5], "top_logprobs": [{"yes": -0.5, "no": -1.5}]}


@asynccontextmanager
async def other(sent: list[dict[str, Any]]) -> AsyncIterator[str]:
    """A server that is none of ours; it answers each request with "yes" and some reasoning."""

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m", "owned_by": "others"}]})

    async def reply(request: web.Request) -> web.StreamResponse:
        sent.append(body := await request.json())
        text = request.path == "/v1/completions"
        if not body.get("stream"):
            choice: dict[str, Any] = (
                {"text": "yes"} if text else {"message": {"content": "yes", "reasoning_content": "hm"}}
            )
            if body.get("logprobs") not in (None, False):
                choice["logprobs"] = LEGACY if text else {"content": [{**NO, "token": "yes", "top_logprobs": [NO]}]}
            usage = {"prompt_tokens": 5, "completion_tokens": 2}
            return web.json_response({"choices": [{**choice, "finish_reason": "stop"}], "usage": usage})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        thought = b'{"choices":[{"delta":{"reasoning_content":"hm"}}]}'
        said = b'{"choices":[{"delta":{"content":"yes"},"finish_reason":"stop"}]}'
        if text:
            thought, said = b'{"choices":[{"text":"y"}]}', b'{"choices":[{"text":"es","finish_reason":"stop"}]}'
        for event in (thought, said, b'{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}', b"[DONE]"):
            await response.write(b"data: " + event + b"\n\n")
        return response

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", reply)
    app.router.add_post("/v1/chat/completions", reply)
    async with TestServer(app) as server:
        yield str(server.make_url("/"))


@pytest.mark.anyio
async def test_another_server_gets_fields_of_openais_alone() -> None:
    @function
    async def program(s: State) -> None:
        s += user("Really?") + separate_reasoning(assistant(gen("a", stop="!", json_schema={"const": 1})))
        assert await s.get("a") == "yes"
        assert s["a_reasoning_content"] == "hm"

    sent: list[dict[str, Any]] = []
    async with other(sent) as url, Server(url) as server:
        s = await program.run_async(backend=server, max_tokens=9)
        assert (s.usage.prompt_tokens, s.usage.completion_tokens, s.text()) == (5, 2, "Really?yes")

        @function
        async def completes(s: State) -> None:
            s += "Is it? " + gen("a")

        assert (await completes.run_async(backend=server))["a"] == "yes"
        for each, pieces in ((program, ["Really?", "yes"]), (completes, ["Is it? ", "y", "es"])):  # as they come
            async with each.stream_async(backend=server) as s:
                assert [piece async for piece in s.text_async_iter()] == pieces
    assert sent[0] == {
        "model": "m", "max_tokens": 9, "stop": ["!"],
        "messages": [{"role": "user", "content": "Really?"}],
        "response_format": {
            "type": "json_schema", "json_schema": {"name": "reply", "schema": {"const": 1}, "strict": True}
        },
    }  # fmt: skip
    assert (sent[1]["prompt"], sent[1]["max_tokens"]) == ("Is it? ", 128)
    assert [body.get("stream") for body in sent] == [None, None, True, True]
    assert sent[2]["stream_options"] == {"include_usage": True}


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("append", "says"),
    [
        (lambda s: s.append("a" + gen("x", regex="a")), "no field for regex"),
        (lambda s: s.append("a" + gen("x", top_k=3)), "no field for top_k"),
        (lambda s: s.append("a" + select("x", ["a"])), "no log-probabilities of a prompt"),
        (lambda s: s.append(assistant("a" + gen("x"))), "cannot go on from the beginning of a message"),
        (lambda s: s.append("a" + gen("x", dtype=int)), "no field for dtype"),
        (lambda s: s.append("a" + gen("x", grammar=Grammar("regex", "a", after="b"))), "grammar of several parts"),
        (lambda s: s.append(separate_reasoning("a" + gen("x"))), "needs roles"),
    ],
)
async def test_what_another_server_cannot_do_is_said_before_it_is_asked(append: Any, says: str) -> None:
    @function
    async def program(s: State) -> None:
        append(s)

    sent: list[dict[str, Any]] = []
    async with other(sent) as url, Server(url) as server:
        s = await program.run_async(backend=server)
        with pytest.raises(ProgramError, match=says):
            s["x"]
    assert not sent


@pytest.mark.anyio
async def test_a_decision_that_fails_is_told_where_it_is_read_and_ends_nothing_else() -> None:
    @function
    async def program(s: State) -> None:
        s += "Is it? " + decide("lost", "It is.") + gen("a")

    async with other([]) as url, Server(url) as server:  # which has no /v1/decisions
        s = await program.run_async(backend=server)
    assert s["a"] == "yes"
    with pytest.raises(ProgramError, match=r"test_language_servers.py:\d+: .*404"):
        s["lost"]


# ── our server's errors and reasoning ────────────────────────────────────────────────────────


@pytest.mark.anyio
async def test_reasoning_is_told_apart_by_the_served_models_parser() -> None:
    @function
    async def program(s: State) -> None:
        s += user("Why?") + separate_reasoning(assistant(gen("a")))
        s += user("So?") + assistant(gen("b"))

    front = FakeFront(chunks("<think>\nhm</think>", "\nYes"))
    front.text = text_of("{% for m in messages %}{{ m['content'] }}{% endfor %}", reasoning="qwen3")
    async with serving(front) as url, Server(url) as server:
        s = await program.run_async(backend=server)
    assert (s["a"], s["a_reasoning_content"]) == ("Yes", "hm")
    assert s["b"] == "<think>\nhm</think>\nYes"


@pytest.mark.anyio
async def test_a_server_that_fails_or_is_not_there() -> None:
    @function
    async def program(s: State) -> None:
        s += "a" + gen("x")

    async with serving(FakeFront([WorkerError("the device is gone")])) as url, Server(url) as server:
        s = await program.run_async(backend=server)
        with pytest.raises(ProgramError, match="the device is gone"):
            s["x"]
    with pytest.raises(ConfigError, match="no server answers"):
        async with Server(url):
            pytest.fail("nobody answers")


@pytest.mark.anyio
async def test_a_program_that_ends_after_its_server_was_left_is_told_to_nobody() -> None:
    """One that runs by itself may, as `run(stream=True)` begins it."""
    left, lost = anyio.Event(), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context["message"]))

    @function
    async def program(s: State) -> None:
        await left.wait()

    front = FakeFront()
    async with serving(front) as url:
        async with Server(url) as server:
            running = asyncio.create_task(program.run_async(backend=server))
            await anyio.lowlevel.checkpoint()
        left.set()
        await running
        del server, running
        await anyio.wait_all_tasks_blocked()
    gc.collect()
    assert (lost, front.ended) == ([], [])


# ── tools ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.anyio
async def test_a_server_that_does_not_hear_of_ended_programs_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, forever = anyio.Event(), anyio.Event()

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m", "owned_by": "engine"}]})

    async def end(_: web.Request) -> web.Response:
        asked.set()
        await forever.wait()
        return web.json_response({"ended": 1})

    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.post("/v1/programs/end", end)])
    monkeypatch.setattr("engine.lang.server.LAST_SECONDS", 0.01)
    left = anyio.Event()

    async def uses(url: str) -> None:
        async with Server(url) as server:
            await server.end("p")
            await asked.wait()
        left.set()

    async with TestServer(app) as there, anyio.create_task_group() as group:
        group.start_soon(uses, str(there.make_url("/")))
        with anyio.move_on_after(2):
            await left.wait()
        has_left = left.is_set()
        forever.set()
    assert has_left


def call_of(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def add(a: int, b: int = 2) -> int:
    """The sum of two numbers."""
    return a + b


async def fail(why: str) -> str:
    raise ValueError(why)


@function
async def calculates(s: State) -> None:
    s += user("What is 3 + 2?") + assistant(gen("sum", tools=[add]))
    s += user("So?") + assistant(gen("end"))


class Scripted(FakeFront):
    """Says one text after the other."""

    def __init__(self, *texts: str) -> None:
        super().__init__()
        self.text = text_of("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "hermes")
        self._texts = list(texts)
        self.logprobs: list[tuple[TokenLogprob, ...]] = []

    async def generate(self, request: Any) -> Any:
        scored = self.logprobs.pop(0) if self.logprobs else ()
        self.script = [msgspec.structs.replace(each, logprobs=scored) for each in chunks(self._texts.pop(0))]
        async for chunk in super().generate(request):
            yield chunk


@pytest.mark.anyio
async def test_tools_are_called_and_their_results_are_in_the_state() -> None:
    front = Scripted(
        call_of("add", '{"a": "x"}'), call_of("sub", "{}") + call_of("add", '{"a": 3}'), "It is 5.", "Yes."
    )
    async with serving(front) as url, Server(url) as server:
        s = await calculates.run_async(backend=server)
    assert s["sum"] == "It is 5." and s["end"] == "Yes." and s.text() == "What is 3 + 2?It is 5.So?Yes."
    wrong, unknown, right = s["sum_calls"]
    assert "Expected `int`, got `str` - at `$.a`" in wrong.result
    assert unknown.result == "Error: there is no tool sub; there is add"
    assert (right.name, right.arguments, right.result) == ("add", '{"a": 3}', "5")
    assert [m["role"] for m in s.messages()] == [
        "user", "assistant", "tool", "assistant", "tool", "tool", "assistant", "user", "assistant"
    ]  # fmt: skip
    ids = [call["id"] for m in s.messages() for call in m.get("tool_calls", ())]
    assert ids == [m["tool_call_id"] for m in s.messages() if m["role"] == "tool"] and all(ids)
    assert s.get_meta_info("sum").completion_tokens == 3 * s.get_meta_info("end").completion_tokens
    offered = front.asked[0].tools
    assert offered is not None and offered[0]["function"] == {
        "name": "add", "description": "The sum of two numbers.",
        "parameters": {
            "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 2}},
            "required": ["a"], "additionalProperties": False,
        },
    }  # fmt: skip


@pytest.mark.anyio
async def test_a_tool_that_fails_ends_the_state_and_rounds_end() -> None:
    @function
    async def program(s: State, **more: Any) -> None:
        s += user("?") + assistant(gen("a", tools=[fail], **more))

    bad = call_of("fail", '{"why": "no"}')
    async with serving(Scripted(bad)) as url, Server(url) as server:
        s = await program.run_async(backend=server)
        with pytest.raises(ProgramError, match=r"test_language_servers.py:\d+: no"):
            s["a"]

    @function
    async def forever(s: State) -> None:
        s += user("?") + assistant(gen("a", tools=[add], tool_rounds=2))

    again = call_of("add", '{"a": 1}')
    front = Scripted(again, again, "enough")
    async with serving(front) as url, Server(url) as server:
        assert (await forever.run_async(backend=server))["a"] == "enough"
    assert [asked.tools is None for asked in front.asked] == [False, False, True]

    @function
    async def begun(s: State) -> None:
        s += user("?") + assistant("It is " + gen("a", tools=[add]))

    async with serving(Scripted("x")) as url, Server(url) as server:
        s = await begun.run_async(backend=server)
        with pytest.raises(ProgramError, match="must be all of an assistant"):
            s["a"]


@pytest.mark.anyio
async def test_a_reply_with_tools_that_was_aborted_is_no_reply() -> None:
    @function
    async def program(s: State) -> None:
        s += user("?") + assistant(gen("a", tools=[add]))

    front = FakeFront(chunks("It i", finish="abort"))
    front.text = text_of("{% for m in messages %}{{ m.content }}{% endfor %}", "hermes")
    async with serving(front) as url, Server(url) as server:
        s = await program.run_async(backend=server)
        with pytest.raises(ProgramError, match="the request was aborted; send it again"):
            s["a"]


def test_what_is_no_tool_is_refused() -> None:
    for functions, says in (([lambda a: a], "no name"), ([print], "spell them out"), ([add, add], "two tools")):
        with pytest.raises(ConfigError, match=says):
            gen("a", tools=functions)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="n is 2 beside tools"):
        gen("a", tools=[add], n=2)


# ── pictures and clips ───────────────────────────────────────────────────────────────────────


@pytest.mark.anyio
async def test_pictures_and_clips_are_passed_on_in_their_places(tmp_path: Any) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG!")

    @function()
    async def program(s: State) -> None:
        s += user(
            "Look: " + image(tmp_path / "a.png") + image(b"\xff\xd8\xff", detail="low") + " and " + video("http://v")
        )
        s += assistant(gen("a"))

    @function(num_api_spec_tokens=4)
    async def stray(s: State) -> None:
        s += image("http://x") + gen("a")

    sent: list[dict[str, Any]] = []
    async with other(sent) as url, Server(url) as server:
        s = await program.run_async(backend=server)
        lost = await stray.run_async(backend=server)
    assert s.text() == "Look:  and hmyes" and s["a"] == "hmyes"
    assert sent[0]["messages"] == [{"role": "user", "content": [
        {"type": "text", "text": "Look: "},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORyE="}},
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,/9j/", "detail": "low"}},
        {"type": "text", "text": " and "},
        {"type": "video_url", "video_url": {"url": "http://v"}},
    ]}]  # fmt: skip
    with pytest.raises(ProgramError, match="stands outside of any role"):
        lost["a"]
    with pytest.raises(ConfigError, match="No such file"):
        image(tmp_path / "none.png")
    with pytest.raises(ConfigError, match="the server chooses the frames"):
        video("http://v", 8)


@pytest.mark.anyio
async def test_the_example_of_a_picture() -> None:
    example = runpy.run_path(str(Path(__file__).parents[3] / "examples/language/picture.py"))
    sent: list[dict[str, Any]] = []
    async with other(sent) as url, Server(url) as server:
        s = await example["look"].run_async(example["RED_SQUARE"], backend=server)
    assert (s["what"], s["colour"]) == ("hmyes", "hmyes")
    (shown,) = (part for part in sent[1]["messages"][0]["content"] if part["type"] == "image_url")
    assert base64.b64decode(shown["image_url"]["url"].removeprefix("data:image/png;base64,")) == example["RED_SQUARE"]
    front = FakeFront()
    async with serving(front) as url:
        with redirect_stdout(StringIO()) as told:
            await anyio.to_thread.run_sync(example["main"], url)
    assert told.getvalue().splitlines()[1].endswith("Hello, world")
    program = front.asked[0].program
    assert program == front.asked[1].program and front.ended == [(b"", "", program.id)]
