"""The store of responses: what it holds is counted whole, and never more than its bounds."""

import gc
import sys
from collections.abc import AsyncGenerator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import anyio
import msgspec
import pytest
from http_front import text_of
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from test_http_routes import open_site

from engine.conversation.reading import NOTHING, Reading
from engine.errors import RequestError
from engine.http.responses import store as stored
from engine.http.responses.bodies import ResponsesBody, messages_of
from engine.http.responses.footprint import footprint
from engine.http.responses.responses import described, wanted_of
from engine.http.responses.store import Response, ResponseStore
from engine.messages.reply import Chunk, TokenLogprob
from engine.params.sampling import SamplingParams

pytestmark = pytest.mark.anyio
KILO = 1024
SHARED = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)
TEXTS = st.text(max_size=40) | st.sampled_from(["é" * 500, "x" * 3000, "😀" * 2000])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
TOOLS = st.lists(st.dictionaries(TEXTS, JSON, max_size=4), max_size=4)
LOGPROBS = st.lists(st.builds(TokenLogprob, st.integers(0, 10**6), TEXTS, st.binary(max_size=9), st.none()), max_size=3)
REPLY = st.lists(st.tuples(TEXTS | st.sampled_from(["<think>", "</think>", "<tool_call>", '{"name": "t0"']), LOGPROBS))


def held_by(response: Response) -> int:
    """The bytes of all objects that only a response leads to, each once."""
    roots = [value for name, value in vars(response).items() if name not in ("_task", "resized")]
    return objects_of(*roots, vars(response))


def objects_of(*roots: Any, names: bool = False) -> int:
    """The bytes of all objects that `roots` lead to, each once. `names` adds the texts that are keys of dicts, which
    the collector is not told of; in the dict of an object they are its class's."""
    seen: dict[int, Any] = {}
    waiting = [*roots]
    while waiting:
        item = waiting.pop()
        if id(item) not in seen and not isinstance(item, SHARED) and not type(item).__module__.startswith("_regex"):
            seen[id(item)] = item
            waiting += gc.get_referents(item)
            waiting += item if names and isinstance(item, dict) else ()
    return sum(map(sys.getsizeof, seen.values()))


def response_to(asked: dict[str, Any], reading: Reading = NOTHING) -> Response:
    body = msgspec.convert({"input": "", "background": True, **asked}, ResponsesBody)
    return Response(described(body, SamplingParams(), "m", wanted_of(body)), messages_of(body.input), reading)


@given(JSON)
@example({"é" * 500: "x"})
@example(["😀" * 100])
@example({"x" * 3000: None})
@example(Chunk("r", "x" * 300, [2**62], logprobs=(TokenLogprob(1, "é" * 99, b"x" * 99, None),)))
def test_a_value_is_counted_whole_as_it_is_once_it_was_sent(value: Any) -> None:
    counted = footprint(value)
    msgspec.json.encode(value)  # texts that are not ASCII keep their UTF-8
    assert counted >= objects_of(value, names=True)


@settings(max_examples=30, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(TEXTS, TEXTS, TOOLS, st.dictionaries(st.text(max_size=9), TEXTS.map(lambda text: text[:99]), max_size=9), REPLY)
def test_the_count_never_understates(
    text: str, instructions: str, schemas: list, metadata: dict, reply: list[tuple[str, list]]
) -> None:
    tools = [
        {"type": "function", "name": f"t{index}", "parameters": {"properties": schema}}
        for index, schema in enumerate(schemas)
    ]
    parsers = text_of(None, "hermes", "qwen3").parsers
    for reading in (NOTHING, Reading(parsers=parsers, separate=True, opened=False)):
        given = [{"role": "user", "content": text}, {"type": "reasoning", "content": instructions}]
        asked = {"input": given, "instructions": instructions, "tools": tools, "metadata": metadata}
        response = response_to(asked, reading)
        assert response.size >= held_by(response)
        for index, (said, logprobs) in enumerate(reply):
            chunk = Chunk(f"rid {index}", said, [index], logprobs=tuple(logprobs), completion_tokens=index)
            response.add(chunk)
            assert response.size >= held_by(response)
        response.add(Chunk("rid", "", [], "stop"))
        assert response.size >= held_by(response)
        msgspec.json.encode(response.object())  # what is sent keeps its UTF-8
        assert response.size >= held_by(response)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.booleans()), max_size=40), st.integers(1, 30))
def test_the_total_is_that_of_the_responses(steps: list[tuple[int, int, bool]], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "MAX_RESPONSES", most)
        patch.setattr(stored, "MAX_BYTES", 200 * KILO)
        store = ResponseStore()
        kept: list[Response] = []
        for action, size, fails in steps:
            if action == 0 and kept:
                store.forget(kept.pop(size % len(kept)).id)
                continue
            response = response_to({"input": "x" * size * KILO, "background": False})
            response.add(Chunk("r", "y" * size * KILO, [1]))
            if fails:
                response.fail((503, {"error": {"message": "m" * KILO, "param": None}}))
            else:
                response.add(Chunk("r", "", [], "stop"))
            store.put(response)
            kept.append(response)
            kept = [one for one in kept if store._stored(one.id)]
            assert store.held == sum(one.size for one in kept) <= 200 * KILO
            assert len(store) == len(kept) <= most
            assert kept[-1] is response
        for response in kept:
            store.forget(response.id)
            response._resize(10**6)  # as one that still runs in the background does
        assert (store.held, len(store)) == (0, 0)


def test_an_error_counts() -> None:
    sizes = []
    for message in ("", "m" * 100 * KILO):
        response = response_to({})
        response.fail((503, {"error": {"message": message, "param": None}}))
        sizes.append(response.size)
    assert sizes[1] - sizes[0] >= 100 * KILO


@pytest.mark.parametrize(
    "beginning", ['<tool_call>{"name": "t", "arguments": {"x": "', '<tool_call>{"arguments": {"x": "']
)
def test_what_a_reader_keeps_of_a_reply_counts(beginning: str) -> None:
    reading = Reading(parsers=text_of(None, "hermes", "qwen3").parsers, separate=True, opened=False)
    response = response_to({}, reading)
    response.add(Chunk("r", beginning, []))
    before = response.size, held_by(response)
    for index in range(300):
        response.add(Chunk("r", f"{index:05}" * KILO, []))
    assert response.size - before[0] >= held_by(response) - before[1]


def test_forgetting_does_not_add_up_all_that_is_held() -> None:
    """Each response is asked for its size a fixed number of times, however many are stored."""
    asked = 0

    class Counting(Response):
        def __getattribute__(self, name: str) -> Any:
            nonlocal asked
            asked += name == "size"
            return super().__getattribute__(name)

    def ended() -> Response:
        plain = response_to({"background": False})
        plain.add(Chunk("r", "", [], "stop"))
        plain.__class__ = Counting
        return plain

    store = ResponseStore()
    for _ in range(200):
        store.put(ended())
    first, asked = asked, 0
    for _ in range(200):
        store.put(ended())
    assert asked == first


async def endless(*texts: str) -> AsyncGenerator[Chunk]:
    for text in texts:
        yield Chunk("r", text, [1])
    await anyio.sleep_forever()


async def test_what_runs_leaves_no_room_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MAX_BYTES", 100 * KILO)
    monkeypatch.setattr(stored, "MAX_RESPONSES", 3)
    store = ResponseStore()
    with pytest.raises(RequestError, match="holds 102400; send less") as caught:
        store.run(response_to({"input": "x" * 101 * KILO}), endless())
    assert (caught.value.status, caught.value.code) == (413, "response_too_large")
    ended = response_to({"input": "x" * 60 * KILO, "background": False})
    ended.add(Chunk("r", "", [], "stop"))
    store.put(ended)
    running = response_to({"input": "x" * 50 * KILO})
    store.run(running, endless("a", "b" * 10 * KILO))
    assert store._stored(ended.id) is None  # there is not room for both
    await anyio.sleep(0.01)
    assert store.held == running.size > 60 * KILO
    with pytest.raises(RequestError, match="1 responses are made in the background") as caught:
        store.run(response_to({"input": "x" * 50 * KILO}), endless())
    assert (caught.value.status, caught.value.code) == (503, "store_full")
    for _ in range(2):
        store.run(response_to({}), endless())
    with pytest.raises(RequestError, match="3 responses are made in the background"):
        store.run(response_to({}), endless())
    await running.cancel()
    assert store._stored(running.id) is running and running.status == "cancelled"
    store.run(response_to({}), endless())
    assert store._stored(running.id) is None
    await store.close()


async def test_tools_count_as_messages_do_and_what_is_too_large_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MAX_BYTES", 40 * KILO)
    async with open_site() as site:
        small = {"input": "a", "max_output_tokens": 1}
        first = (await site.post("/v1/responses", small))[1]
        assert first["store"] is True and (await site.get(f"/v1/responses/{first['id']}"))[0] == 200
        schema = {"type": "object", "properties": {f"p{index}": {"description": "d" * 50} for index in range(300)}}
        large = {**small, "tools": [{"type": "function", "name": "f", "parameters": schema}], "tool_choice": "none"}
        status, answer = await site.post("/v1/responses", large)
        assert (status, answer["store"]) == (200, False)
        assert (await site.get(f"/v1/responses/{answer['id']}"))[0] == 404
        assert (await site.get(f"/v1/responses/{first['id']}"))[0] == 200  # it went not for nothing
        status, answer = await site.post("/v1/responses", {**large, "background": True})
        assert (status, answer["error"]["code"]) == (413, "response_too_large")


@given(JSON)
def test_a_footprint_holds_every_part(value: Any) -> None:
    assert footprint([value]) >= footprint(value) + sys.getsizeof([value])
    assert footprint({"a": value, "b": [value]}) >= 2 * footprint(value)
