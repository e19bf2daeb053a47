"""Headers that come several times: a list is read whole, and what is no list has one value."""

from typing import Any

import pytest
from http_front import FakeFront, serving
from http_raw import answer, dial, post
from joined_fronts import joined_fronts
from multidict import CIMultiDict
from opentelemetry.propagators.textmap import Getter

from engine.client.bench.wire import joined as fields_of
from engine.errors import RequestError
from engine.http.otlp import Headers
from engine.http.repeated import joined, members, once

pytestmark = pytest.mark.anyio
BODY = b'{"text": "x"}'


def test_lines_of_a_list_are_one_list_and_others_come_once() -> None:
    sent = CIMultiDict([("Accept", "a, b"), ("X", "1"), ("accept", "C"), ("Expect", ""), ("x", "1")])
    assert (joined(sent, "Accept"), joined(sent, "Via")) == ("a, b, C", "")
    assert members(sent, "ACCEPT") == {"a", "b", "c"} and members(sent, "Via") == frozenset()
    assert (once(sent, "Expect"), once(sent, "Via")) == ("", None)
    assert once(sent, "x") == "1"  # as two proxies say it, one behind the other
    sent.add("X", "2")
    with pytest.raises(RequestError, match="the header x comes with 2 values; send one") as refused:
        once(sent, "x")
    assert (refused.value.status, refused.value.param) == (400, "x")
    assert fields_of([(b"Connection", b"close"), (b"X", b"1"), (b"connection", b"te")])[b"connection"] == b"close, te"


@pytest.mark.parametrize("name", ["Authorization", "x-api-key", "X-Session-Id"])
async def test_what_is_no_list_is_refused_when_it_has_two_values(name: str) -> None:
    twice = [name.encode() + b": " + word for word in (b"Bearer sesame", b"Bearer other")]
    keyed = [] if name == "Authorization" else [b"Authorization: Bearer sesame"]
    front = FakeFront()
    async with serving(front, api_key=("sesame",)) as url, dial(url) as client:
        status, _, said = await answer(client, post(BODY, *keyed, *twice))
        assert (status, said["error"]["param"]) == (400, name) and "comes with 2 values" in said["error"]["message"]
        assert not front.asked
        assert (await answer(client, post(BODY, *keyed, twice[0], twice[0])))[0] == 200


async def test_the_first_of_several_request_ids_counts() -> None:
    async with serving(FakeFront()) as url, dial(url) as client:
        status, headers, _ = await answer(client, post(BODY, b"X-Request-Id: mine", b"X-Request-Id: a-proxy's"))
        assert (status, headers["X-Request-Id"]) == (200, "mine")


@pytest.mark.parametrize("name", [b"Content-Type", b"Host"])
async def test_what_frames_a_request_is_refused_before_anybody_reads_it(name: bytes) -> None:
    async with serving(FakeFront()) as url, dial(url) as client:
        status, _, said = await answer(client, post(BODY, name + b": localhost", name + b": localhost"))
        assert (status, said["error"]["code"]) == (400, "invalid_http")


async def test_lists_are_read_to_their_end() -> None:
    async with serving(FakeFront()) as url, dial(url) as client:
        await client.send(post(b"", b"Expect: miracles", b"Expect: 100-Continue", length=len(BODY)))
        assert await client.receive() == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert (await answer(client, BODY))[0] == 200
        get = b"GET /live/events HTTP/1.1\r\nHost: localhost\r\nForwarded:\r\nForwarded: for=192.0.2.1\r\n\r\n"
        status, _, said = await answer(client, get)
        assert (status, said["error"]["code"]) == (403, "not_local")


async def test_a_front_passes_on_nothing_that_connection_names() -> None:
    async with joined_fronts(FakeFront(), FakeFront()) as engine:
        first, second = engine.sessions
        asked: dict[str, Any] = {"model": "fake", "input": "Hi"}
        async with first.post("/v1/responses", json=asked) as made:
            asked["previous_response_id"] = (await made.json())["id"]
        for lines, session in ((["keep-alive"], "s"), (["keep-alive", "x-none, X-Session-Id"], None)):
            headers = CIMultiDict([("X-Session-Id", "s"), *(("Connection", line) for line in lines)])
            async with second.post("/v1/responses", json=asked, headers=headers) as answered:
                assert answered.status == 200
            used = engine.fronts[0].asked[-1].session
            assert (None if used is None else used.id) == session


def test_of_several_parents_none_is_a_traces() -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers: Getter[Any] = Headers()
    lines = CIMultiDict([("traceparent", parent), ("tracestate", "a=1"), ("tracestate", "b=2")])
    assert headers.get(lines, "traceparent") == [parent] and headers.get(lines, "tracestate") == ["a=1", "b=2"]
    lines.add("traceparent", parent)
    assert not headers.get(lines, "traceparent")
