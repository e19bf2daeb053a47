"""Programs on a server with Anthropic's API, which ours has too; and what such a server cannot do."""

from typing import Any

import pytest
from http_front import FakeFront, chunks, serving, text_of, written
from test_language_servers import Scripted, calculates, call_of

from engine.errors import ConfigError, ProgramError
from engine.lang import (
    Anthropic,
    State,
    assistant,
    decide,
    function,
    gen,
    image,
    select,
    separate_reasoning,
    system,
    user,
    video,
)
from engine.lang.anthropic import blocks

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.anyio
async def test_roles_reasoning_schemas_and_streams() -> None:
    @function
    async def program(s: State) -> None:
        s += system("Be brief.") + user("Why?")
        s += separate_reasoning(assistant(gen("a", max_tokens=7, stop="!", top_k=3)))
        s += user("So?") + assistant(gen("b"))
        s += user("In JSON?") + assistant(gen("c", json_schema=SCHEMA))

    front = FakeFront(chunks("<think>\nhm</think>", "\nYes"))
    front.text = text_of(PLAIN, reasoning="qwen3")
    async with serving(front) as url, Anthropic(url, model="fake", api_key="k") as server:
        s = await program.run_async(backend=server)
        async with program.stream_async(backend=server) as followed:
            pieces = [piece async for piece in followed.text_async_iter("a")]
    assert (s["a"], s["a_reasoning_content"], s["b"]) == ("Yes", "hm", "hmYes")
    assert "".join(pieces) == "Yes" and followed["a_reasoning_content"] == "hm"
    meta = s.get_meta_info("a")
    assert (meta.finish, meta.prompt_tokens, meta.cached_tokens) == ("stop", 7, 4)
    assert followed.get_meta_info("a") == meta
    first = front.asked[0].sampling
    assert (first.max_tokens, first.stop, first.top_k) == (7, ("!",), 3)
    assert [message["role"] for message in written(front.asked[1])] == ["system", "user", "assistant", "user"]
    assert front.asked[2].grammar is not None


@pytest.mark.anyio
async def test_tools() -> None:
    front = Scripted(call_of("add", '{"a": 3}'), "It is 5.", "Yes.")
    async with serving(front) as url, Anthropic(url, model="fake") as server:
        s = await calculates.run_async(backend=server)
    assert (s["sum"], s["sum_calls"][0].result, s["end"]) == ("It is 5.", "5", "Yes.")
    assert [message["role"] for message in written(front.asked[1])][:3] == ["user", "assistant", "tool"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("append", "says"),
    [
        (lambda s: s.append("a" + gen("x")), "takes messages alone"),
        (lambda s: s.append(user("?") + assistant(select("x", ["a", "b"]))), "which select needs"),
        (lambda s: s.append(user("?") + decide("x", "It is.")), "which decide needs"),
        (lambda s: s.append(user("?") + assistant(gen("x", regex="a"))), "no field for regex"),
        (lambda s: s.append(user("?") + assistant(gen("x", seed=1))), "no field for seed"),
        (lambda s: s.append(user(video("http://v")) + assistant(gen("x"))), "takes no video"),
    ],
)
async def test_what_it_cannot_do_is_said_before_it_is_asked(append: Any, says: str) -> None:
    @function
    async def program(s: State) -> None:
        append(s)

    front = FakeFront()
    async with serving(front) as url, Anthropic(url, model="fake") as server:
        s = await program.run_async(backend=server)
        with pytest.raises(ProgramError, match=says):
            s["x"]
    assert not front.asked
    with pytest.raises(ConfigError, match="model is empty"):
        Anthropic(model="")


def test_pictures_are_blocks() -> None:
    parts = [image(b"\x89PNG!").part, image("http://x").part]
    assert list(blocks({"role": "user", "content": parts})) == [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORyE="}},
        {"type": "image", "source": {"type": "url", "url": "http://x"}},
    ]
