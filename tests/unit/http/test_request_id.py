"""X-Request-Id: the client's or ours, on every answer, in the log, and for /abort_request."""

import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

import anyio
import pytest
from test_http_routes import Site, open_site

from engine.http.request_id import HEADER
from engine.logs import add_request_id

pytestmark = pytest.mark.anyio
HI = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HI, "n": 2},
    "/v1/completions": {"prompt": "a", "max_tokens": 3000},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": HI, "max_tokens": 3000},
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 3000}},
}


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with open_site(api_key="key", seconds=0.001) as site:
        yield site


async def asked(
    site: Site, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, Mapping[str, str], Any]:
    async with site.session.request(method, path, json=body, headers=headers) as response:
        return response.status, response.headers, await response.text()


async def test_every_answer_has_the_id(site: Site) -> None:
    wrong = {"Authorization": "Bearer no"}
    requests: list[tuple[int, str, str, Any, dict[str, str]]] = [
        (200, "GET", "/health", None, {}),
        (200, "GET", "/metrics", None, {}),
        (200, "POST", "/generate", {"text": "a", "sampling_params": {"max_new_tokens": 1}}, {}),
        (200, "POST", "/generate", {"text": "a", "sampling_params": {"max_new_tokens": 1}, "stream": True}, {}),
        (200, "POST", "/v1/responses", {"input": "a", "max_output_tokens": 1, "background": True}, {}),
        (400, "POST", "/generate", {}, {}),
        (400, "POST", "/v1/messages", {}, {}),
        (401, "POST", "/generate", {}, wrong),
        (403, "GET", "/health", None, {"Origin": "http://elsewhere.example"}),
        (403, "GET", "/health", None, {"Host": "elsewhere.example"}),
        (404, "GET", "/nowhere", None, {}),
        (404, "GET", "/v1/responses/resp_x", None, {}),
        (405, "GET", "/generate", None, {}),
        (413, "POST", "/generate", {"text": "x" * 2**25}, {}),
        (415, "POST", "/generate", {}, {"Content-Encoding": "br"}),
    ]
    for expected, method, path, body, headers in requests:
        status, sent, _ = await asked(site, method, path, body, **headers, **{HEADER: "mine 1"})
        assert (status, sent[HEADER]) == (expected, "mine 1"), path
        made = {(await asked(site, method, path, body, **headers))[1][HEADER] for _ in range(2)}
        assert len(made) == 2, path
        if path == "/v1/messages":
            assert sent["Request-Id"] == "mine 1"


@pytest.mark.parametrize("id", ["", "x" * 257, "caf\u00e9"])
async def test_an_id_that_cannot_be_sent_back_is_refused(site: Site, id: str) -> None:
    status, sent, text = await asked(site, "GET", "/health", None, **{HEADER: id})
    assert status == 400 and "1 to 256 printable ASCII" in text and f'"param":"{HEADER}"' in text
    assert re.fullmatch("req-[0-9a-f]{32}", sent[HEADER])


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("given", [True, False])
async def test_two_requests_of_one_id_run_and_end_by_it(site: Site, path: str, given: bool) -> None:
    headers = {HEADER: "same"} if given else {}
    body = BODIES[path] | {"stream": True}
    async with (
        site.session.post(path, json=body, headers=headers) as first,
        site.session.post(path, json=body, headers=headers) as second,
    ):
        assert (first.status, second.status) == (200, 200)
        ids = {first.headers[HEADER], second.headers[HEADER]}
        assert (ids == {"same"}) is given and len(ids) == (1 if given else 2)
        ended = [(await site.post("/abort_request", {"rid": id}))[1]["aborted"] for id in ids]
        replies = body.get("n", 1)
        assert ended == ([2 * replies] if given else [replies] * 2)
        for response in (first, second):
            await response.read()
    await site.house.settled()
    assert not site.house.front.open


async def test_the_other_ids_of_a_request_end_it_too(site: Site) -> None:
    body = BODIES["/generate"] | {"rid": "mine", "stream": True}
    for id in ("mine", "theirs"):
        async with site.session.post("/generate", json=body, headers={HEADER: "theirs"}) as response:
            assert response.headers[HEADER] == "theirs"
            assert (await site.post("/generate", body))[0] == 409  # a rid is one request's alone
            assert (await site.post("/abort_request", {"rid": id}))[1] == {"aborted": 1}
            assert b'"id":"mine"' in await response.read()
    await site.house.settled()


async def test_a_background_response_ends_by_the_id_that_asked_for_it(site: Site) -> None:
    body = {"input": "a", "background": True}
    async with site.session.post("/v1/responses", json=body, headers={HEADER: "later"}) as response:
        made = (await response.json())["id"]
    with anyio.fail_after(60):
        while not (await site.post("/abort_request", {"rid": "later"}))[1]["aborted"]:
            await anyio.sleep(0.005)
        while (await site.get(f"/v1/responses/{made}"))[1]["status"] in ("queued", "in_progress"):
            await anyio.sleep(0.005)
    assert (await site.post("/abort_request", {"rid": "later"}))[1]["aborted"] == 0


async def test_log_lines_about_a_request_name_it(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.addFilter(add_request_id)

    def broken(rid: str | None) -> int:
        raise ZeroDivisionError

    site.house.front.abort = broken  # type: ignore[method-assign]
    with caplog.at_level("ERROR"):
        status, _, _ = await asked(site, "POST", "/abort_request", {"abort_all": True}, **{HEADER: "who"})
    assert status == 500
    assert [(line.levelname, line.request) for line in caplog.records] == [("ERROR", "[who] ")]  # type: ignore[attr-defined]
