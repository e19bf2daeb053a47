"""A real browser: a page of another origin does nothing to the server, one that is allowed streams from it."""

import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import anyio
import pytest
from aiohttp import web
from http_front import serving
from test_origins import Watched

from bench.lib.chromium import installed, open_tab
from engine.http.app import ROUTES

SECONDS = 100
NAMES = {"rebound": "rebound.example", "own": "localhost"}
OTHERS = {"other": "elsewhere.localhost", "neighbour": "127.0.0.1"}  # another site, and the same one at another port
# What a page of another origin can do without asking: each resolves to what it saw.
TRICKS = """
const body = '{"prompt": "x", "max_tokens": 2}';
const text = {"Content-Type": "text/plain"}, json = {"Content-Type": "application/json"};
const sent = (path, options) => fetch(SERVER + path, options).then(answer => answer.type, error => error.name);
const loaded = (tag, path) => new Promise(resolve => {
  const element = document.createElement(tag);
  element.onload = () => resolve("loaded");
  element.onerror = () => resolve("error");
  element.src = SERVER + path;
  document.body.append(element);
});
const posted = (path, value) => new Promise(resolve => {
  document.body.innerHTML = "<iframe name=f></iframe><form method=post target=f><input name=a></form>";
  const form = document.querySelector("form");
  form.enctype = "text/plain";
  form.action = SERVER + path;
  form.a.name = value;
  document.querySelector("iframe").onload = () => resolve("answered");
  form.submit();
});
return {
  completion: await sent("/v1/completions", {method: "POST", mode: "no-cors", headers: text, body}),
  completion_with_cors: await sent("/v1/completions", {method: "POST", headers: text, body}),
  completion_as_json: await sent("/v1/completions", {method: "POST", headers: json, body}),
  pause: await sent("/pause_generation", {method: "POST", mode: "no-cors"}),
  flush: await sent("/flush_cache", {method: "POST", mode: "no-cors"}),
  models: await sent("/v1/models"),
  beacon: navigator.sendBeacon(SERVER + "/abort_request", '{"abort_all": true}'),
  flush_image: await loaded("img", "/flush_cache"),
  probe_image: await loaded("img", "/health_generate"),
  probe_script: await loaded("script", "/health_generate"),
  form: await posted("/v1/completions", '{"prompt": "x", "max_tokens": 2, "user": "'),
};
"""
STREAM = """
const answer = await fetch(SERVER + "/v1/chat/completions", {
  method: "POST",
  headers: {"Content-Type": "application/json", "X-Stainless-Lang": "js", "Authorization": "Bearer sesame"},
  body: '{"messages": [{"role": "user", "content": "hi"}], "stream": true}',
});
const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
let text = "";
for (let piece; !(piece = await reader.read()).done;) text += piece.value;
const wrong = await fetch(SERVER + "/v1/chat/completions", {
  method: "POST", body: "{}", headers: {"x-api-key": "sesame"},
});
return {status: answer.status, id: answer.headers.get("X-Request-Id"), text,
        wrong: wrong.status, said: (await wrong.json()).error.message};
"""
KEY = """
while (keyed.hidden || said.textContent.startsWith("Loading")) await new Promise(resolve => setTimeout(resolve, 50));
document.querySelector("#key").value = "sesame";
keyed.requestSubmit();
return said.textContent;
"""
DOCS = """
while (!document.querySelector(".route")) await new Promise(resolve => setTimeout(resolve, 50));
const find = document.querySelector("#find");
find.value = "embeddings";
find.dispatchEvent(new Event("input"));
return {
  routes: document.querySelectorAll(".route").length,
  found: [...document.querySelectorAll(".route:not([hidden]) summary code")].map(each => each.textContent),
  objects: document.querySelectorAll("article").length,
  said: document.querySelector("#said").textContent,
  width: document.documentElement.scrollWidth - innerWidth,
};
"""
OWN = """
const answer = await fetch("/v1/completions", {
  method: "POST", body: '{"prompt": "x", "max_tokens": 2}',
}).catch(error => ({status: error.name}));
return answer.status;
"""


async def refusals(server: str) -> int:
    """How many requests `server` has refused so far with a 403."""
    async with aiohttp.ClientSession(server) as session, session.get("/metrics") as response:
        found = re.search(r'^engine_http_errors_total\{status="403"\} (\d+)', await response.text(), re.MULTILINE)
    return int(found[1]) if found else 0


@asynccontextmanager
async def site() -> AsyncIterator[int]:
    """The port of a server of empty pages, on this machine: what comes from there may ask for what is here, says
    Chromium, which guards local addresses itself by now."""

    async def page(request: web.Request) -> web.Response:
        return web.Response(text="<!doctype html><title>page</title><body>", content_type="text/html")

    app = web.Application()
    app.router.add_get("/", page)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def visit(path: str) -> dict[str, Any]:
    """What pages of several origins saw, and what the server did of what each asked for."""
    guarded, seen = Watched(), {}
    with anyio.fail_after(SECONDS):
        async with site() as port, open_tab(path, "--host-resolver-rules=MAP rebound.example 127.0.0.1") as tab:
            friend = f"http://friend.localhost:{port}"
            async with serving(guarded, cors_origins=(friend,)) as server:
                for times, (name, host) in enumerate(OTHERS.items(), start=1):
                    await tab.open(f"http://{host}:{port}/")
                    seen[name] = await tab.run(TRICKS.replace("SERVER", f"'{server}'"))
                    with anyio.move_on_after(10):
                        while await refusals(server) < times * len(seen[name]):
                            await anyio.sleep(0.05)  # the beacon is on its way
                    seen[f"{name} refused"] = await refusals(server) - (times - 1) * len(seen[name])
                    seen[f"{name} did"] = [*guarded.asked, *guarded.did]
            async with serving(Watched(), cors_origins=(friend,), api_key=("sesame",)) as server:
                await tab.open(f"{friend}/")
                seen["friend"] = await tab.run(STREAM.replace("SERVER", f"'{server}'"))
                await tab.open(f"http://{OTHERS['other']}:{port}/")  # and from there by a link, to a page with a key
                tab.asked.clear()
                await tab.follow(f"{server}/docs")
                seen["keyed docs"] = await tab.run(KEY)
                seen["docs"] = await tab.run(DOCS)
                seen["docs asked"] = [url.removeprefix(server) for url in tab.asked]
            for name, host in NAMES.items():
                # Whatever is answered to a name that leads to the server, to the browser the page is one of its own.
                async with serving(front := Watched()) as server:
                    await tab.open(f"http://{host}:{urlsplit(server).port}/health")
                    seen[name] = await tab.run(OWN)
                    seen[f"{name} asked"] = len(front.asked)
    return seen


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    path = installed()
    if path is None:
        assert os.environ.get("CI", "") in ("", "false"), (
            "no Chromium is installed, and CI is set: apt-get install chromium"
        )
        pytest.skip("no Chromium is installed: apt-get install chromium")
    return anyio.run(visit, path)


@pytest.mark.parametrize("page", OTHERS)
def test_a_page_of_another_origin_does_nothing(seen: dict[str, Any], page: str) -> None:
    assert seen[f"{page} did"] == []
    assert seen[page] == {
        "completion": "opaque", "completion_with_cors": "TypeError", "completion_as_json": "TypeError",
        "pause": "opaque", "flush": "opaque", "models": "TypeError", "beacon": True,
        "flush_image": "error", "probe_image": "error", "probe_script": "error", "form": "answered",
    }  # fmt: skip
    assert seen[f"{page} refused"] == len(seen[page])  # all of them did arrive


def test_an_allowed_page_streams_and_reads_errors(seen: dict[str, Any]) -> None:
    friend = seen["friend"]
    assert (friend["status"], friend["wrong"]) == (200, 400)
    assert friend["text"].count("data: ") > 3 and friend["text"].endswith("data: [DONE]\n\n")
    assert friend["id"].startswith("chatcmpl-") and "messages" in friend["said"]


def test_a_rebound_name_is_refused_and_our_own_page_is_served(seen: dict[str, Any]) -> None:
    assert (seen["rebound"], seen["rebound asked"]) == (403, 0)
    assert (seen["own"], seen["own asked"]) == (200, 1)


def test_the_docs_are_read_from_a_link_and_ask_nobody_else(seen: dict[str, Any]) -> None:
    assert "the API key is missing" in seen["keyed docs"]
    assert seen["docs"]["routes"] == len(ROUTES)
    assert seen["docs"]["found"] == ["/v1/embeddings"]
    assert seen["docs"]["objects"] > 50 and "routes." in seen["docs"]["said"] and seen["docs"]["width"] <= 0
    assert [url for url in seen["docs asked"] if url != "data:,"] == ["/docs", "/openapi.json", "/openapi.json"]
