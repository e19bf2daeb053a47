"""The log: a line for each request that ends, however it ends, and one every ten seconds under load."""

import itertools
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import anyio
import msgspec
import pytest
from http_front import FakeFront, chunks, serving
from hypothesis import given
from hypothesis import strategies as st
from test_http_routes import Site, open_site

from engine.errors import WorkerError
from engine.http import log as log_module
from engine.http.log import LoadLog, load_line
from engine.http.request_id import HEADER
from engine.logs import add_request_id
from engine.messages.control import Stats

pytestmark = pytest.mark.anyio
HI = [{"role": "user", "content": "hi"}]
TIME = r"\d+\.\d{3}"


@pytest.fixture
async def site(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Site]:
    caplog.handler.addFilter(add_request_id)
    with caplog.at_level("INFO", logger="engine.requests"):
        async with open_site(api_key="key", seconds=0.001, log_requests=True) as site:
            yield site


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged of requests, with their ids."""
    return [record.request + record.message for record in caplog.records if record.name == "engine.requests"]  # type: ignore[attr-defined]


async def line(caplog: pytest.LogCaptureFixture) -> str:
    """The only line, once it is there: a client has its answer before the server has logged it."""
    with anyio.fail_after(60):
        while not lines(caplog):
            await anyio.sleep(0.002)
    (only,) = lines(caplog)
    caplog.clear()
    return only


GENERATING: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 3}, "length"),
    ("/v1/completions", {"prompt": "abcd", "max_tokens": 3}, "length"),
    ("/v1/completions", {"prompt": "abcd", "max_tokens": 3, "stop": "f"}, "stop"),
    ("/v1/responses", {"input": "a", "max_output_tokens": 3}, "length"),
    ("/v1/messages", {"messages": HI, "max_tokens": 3}, "length"),
    ("/generate", {"text": "abcd", "sampling_params": {"max_new_tokens": 3}}, "length"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "end"), GENERATING)
async def test_a_request_that_generates(
    site: Site, caplog: pytest.LogCaptureFixture, path: str, body: dict[str, Any], end: str, stream: bool
) -> None:
    async with site.session.post(path, json=body | {"stream": stream}, headers={HEADER: "mine 1"}) as response:
        await response.read()
    out = r"\d+" if end == "stop" else "3"
    form = rf"\[mine 1\] POST {path} 200 in=(\d+) out={out} cached=0 ttft={TIME} seconds={TIME} end={end}"
    found = re.fullmatch(form, await line(caplog))
    assert found and int(found[1]) > 0


async def test_the_id_of_a_request_that_gives_none_is_in_its_line(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    async with site.session.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}) as response:
        id = (await response.json())["id"]
    assert (await line(caplog)).startswith(f"[{id}] POST ")


async def test_the_replies_of_a_request_are_one_line(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    body = {"prompt": ["abcd", "abcde"], "n": 2, "max_tokens": 2}
    await site.post("/v1/completions", body)
    assert re.search(rf" 200 in=18 out=8 cached=\d+ ttft={TIME} seconds={TIME} end=length$", await line(caplog))


async def test_cached_tokens_are_counted(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    for expected in (0, 8):
        await site.post("/v1/completions", {"prompt": "abcdefghij", "max_tokens": 1})
        assert f" in=10 out=1 cached={expected} " in await line(caplog)


async def test_refused_requests(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    refused: list[tuple[str, str, Any, dict[str, str], str]] = [
        ("POST", "/generate", {}, {}, "POST /generate 400"),
        ("POST", "/v1/messages", {}, {"X-Api-Key": "no", "Authorization": ""}, "POST /v1/messages 401"),
        ("GET", "/v1/responses/resp_x", None, {}, "GET /v1/responses/{response_id} 404"),
        ("GET", "/no%0Awhere", None, {}, "GET /no%0Awhere 404"),
        ("GET", "/" + "x" * 300, None, {}, f"GET /{'x' * 199} 404"),
        ("GET", "/generate", None, {}, "GET /generate 405"),
        ("POST", "/generate", {"text": "x" * 2**25}, {}, "POST /generate 413"),
        ("GET", "/health", None, {"Host": "elsewhere.example"}, "GET /health 403"),
    ]
    for method, path, body, headers, form in refused:
        url = site.session._build_url("/").join(aiohttp.client.URL(path, encoded=True))
        async with site.session.request(method, url, json=body, headers={HEADER: "a", **headers}):
            pass
        assert re.fullmatch(rf"\[a\] {re.escape(form)} seconds={TIME}", await line(caplog)), form
    assert (await site.post("/v1/completions", {"prompt": "a" * 5000}))[0] == 400  # by the tokenizer, not by the edge
    assert re.search(rf" 400 in=0 out=0 cached=0 seconds={TIME} end=refused$", await line(caplog))
    for _ in range(2):  # an id that cannot be taken is not the one before it
        async with site.session.get("/version", headers={HEADER: "caf\u00e9"}) as response:
            assert (await line(caplog)).startswith(f"[{response.headers[HEADER]}] GET /version 400 ")


async def test_probes_are_logged_when_they_fail(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    for path in ("/health", "/livez", "/readyz"):
        assert (await site.get(path))[0] == 200
    site.house.front.draining = True
    assert (await site.get("/readyz"))[0] == 503
    assert "GET /readyz 503" in await line(caplog)


async def test_clients_that_leave(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    body = {"prompt": "a", "max_tokens": 3000, "stream": True}
    async with site.session.post("/v1/completions", json=body) as response:
        await response.content.readany()
    end = rf" POST /v1/completions 499 in=1 out=\d+ cached=0 ttft={TIME} seconds={TIME} end=disconnect"
    assert re.search(end, await line(caplog))
    await site.house.settled()


async def test_a_background_response_has_a_second_line(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    body = {"input": "a", "background": True, "max_output_tokens": 3}
    async with site.session.post("/v1/responses", json=body, headers={HEADER: "later"}) as response:
        await response.read()
    with anyio.fail_after(60):
        while len(lines(caplog)) < 2:
            await anyio.sleep(0.002)
    first, second = lines(caplog)
    assert re.fullmatch(rf"\[later\] POST /v1/responses 200 seconds={TIME}", first)
    assert re.search(r"^\[later\] POST /v1/responses background in=\d+ out=3 .* end=length$", second)


async def test_a_stream_that_fails_says_so(caplog: pytest.LogCaptureFixture) -> None:
    front = FakeFront([*chunks("a", "b", finish=None), WorkerError("gone")])
    with caplog.at_level("INFO", logger="engine.requests"):
        async with serving(front, log_requests=True) as url, aiohttp.ClientSession() as session:
            body = {"prompt": "a", "stream": True}
            async with session.post(f"{url}/v1/completions", json=body) as response:
                assert "gone" in await response.text()
        assert re.search(rf" 200 in=7 out=2 cached=4 ttft={TIME} seconds={TIME} end=error$", caplog.messages[0])


async def test_embeddings_count_their_prompts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="engine.requests"):
        async with open_site(embedding_size=4, log_requests=True) as site:
            await site.post("/v1/embeddings", {"input": ["abc", "de"]})
            assert re.search(
                rf"POST /v1/embeddings 200 in=5 out=0 cached=0 seconds={TIME} end=stop$", await line(caplog)
            )


async def test_nothing_is_logged_without_the_option(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="engine"):
        async with open_site() as site:
            await site.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
    assert not lines(caplog)


# ── the load ─────────────────────────────────────────────────────────────────────────────────

BUSY = Stats(
    "ready", running=3, waiting=1, pages=100, pages_free=40, pages_cached=10,
    prompt_tokens_total=1000, cached_tokens_total=250, generated_tokens_total=400,
)  # fmt: skip


def test_the_line_of_ten_seconds() -> None:
    assert load_line(Stats("ready"), BUSY, 10.0) == (
        "3 running, 1 waiting; 100.0 prompt tokens/s, 40.0 output tokens/s; KV cache 50 % in use, "
        "25 % of prompt tokens from it"
    )


@given(counts=st.lists(st.integers(0, 10**9), min_size=3, max_size=3))
def test_idle_seconds_have_no_line(counts: list[int]) -> None:
    prompt, cached, replied = counts
    idle = Stats("ready", prompt_tokens_total=prompt, cached_tokens_total=cached, generated_tokens_total=replied)
    assert load_line(idle, idle, 10.0) == ""
    assert load_line(idle, msgspec.structs.replace(idle, waiting=1), 10.0).startswith("0 running, 1 waiting")
    paused = msgspec.structs.replace(idle, waiting=1, paused=True)
    assert load_line(idle, paused, 10.0).startswith("paused; 0 running, 1 waiting; 0.0 prompt tokens/s")
    more = msgspec.structs.replace(idle, generated_tokens_total=replied + 1)
    assert "0.1 output tokens/s" in load_line(idle, more, 10.0)
    assert load_line(more, idle, 10.0) == "", "counts of a new worker may begin anew"


def test_ten_seconds_pass_between_lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(log_module, "monotonic", lambda: next(clock))
    load = LoadLog()
    with caplog.at_level("INFO", logger="engine.load"):
        for second in range(1, 42):  # idle, then ten seconds of load, then idle
            said = 5 * min(max(second - 11, 0), 10)
            load.on_stats(Stats("ready", pages=1, pages_free=1, generated_tokens_total=said))
    assert ["5.0 output tokens/s" in message for message in caplog.messages] == [True]
