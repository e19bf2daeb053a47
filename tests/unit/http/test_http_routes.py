"""Routes beside the completions, over the real actors and the echo model: tokens, operators, names, templates."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import msgspec
import openai
import pytest
from house import House, counted, open_house, prompt
from http_front import FakeFront, serving

from engine import __version__
from engine.config import resolve
from engine.conversation.template import OPEN_END
from engine.errors import ConfigError
from engine.http.admin.admin import PauseBody, ProfileBody
from engine.http.anthropic.messages import CountBody, MessagesBody
from engine.http.app import ROUTES
from engine.http.native.tokenize import DetokenizeBody, TokenizeBody
from engine.http.openai.embeddings import EmbeddingBody, RerankBody, ScoreBody
from engine.http.responses.bodies import ResponsesBody
from engine.http.responses.tokens import InputTokensBody
from engine.runtime.front import Health
from engine.runtime.launch import open_front

pytestmark = pytest.mark.anyio
HI = [{"role": "user", "content": "hi"}]


class Site:
    """A house with a server over it."""

    def __init__(self, house: House, session: aiohttp.ClientSession, url: str) -> None:
        self.house = house
        self.session = session
        self.url = url

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(path) as response:
            return response.status, await response.json()

    async def post(self, path: str, body: object = None) -> tuple[int, Any]:
        async with self.session.post(path, json=body) if body is not None else self.session.post(path) as response:
            return response.status, await response.json()


@asynccontextmanager
async def open_site(
    *,
    names: tuple[str, ...] = (),
    api_key: str | None = None,
    trusting: bool = False,
    profile_dir: str | None = None,
    log_requests: bool = False,
    **options: Any,
) -> AsyncIterator[Site]:
    server = {
        "served_model_name": names,
        "api_key": api_key and (api_key,),
        "trust_request_chat_template": trusting,
    }
    server |= {"profile_dir": profile_dir, "log_requests": log_requests}
    async with (
        open_house(**server, **options) as house,
        serving(house.front, **server) as url,  # type: ignore[arg-type]
        aiohttp.ClientSession(url, headers={"Authorization": f"Bearer {api_key}"}) as session,
    ):
        yield Site(house, session, url)


# ── tokens ───────────────────────────────────────────────────────────────────────────────────


async def test_tokenize_and_back() -> None:
    async with open_site() as site:
        status, answer = await site.post("/tokenize", {"prompt": "aé", "return_token_strs": True})
        assert status == 200
        assert answer == {"count": 3, "max_model_len": 4096, "tokens": [97, 195, 169], "token_strs": ["a", "Ã", "©"]}
        assert (await site.post("/tokenize", {"model": "echo", "prompt": ""}))[1]["tokens"] == []
        assert await site.post("/detokenize", {"tokens": [97, 195, 169]}) == (200, {"prompt": "aé"})
        assert (await site.post("/detokenize", {"tokens": [97, 256]}))[1] == {"prompt": "a<end>"}
        skipped = {"tokens": [97, 256], "skip_special_tokens": True}
        assert (await site.post("/detokenize", skipped))[1] == {"prompt": "a"}
        long = "é" * 30_000  # encoded in a thread
        status, answer = await site.post("/tokenize", {"prompt": long})
        assert (answer["count"], answer["token_strs"]) == (60_000, None)
        assert (await site.post("/detokenize", {"tokens": answer["tokens"]}))[1] == {"prompt": long}


async def test_tokenize_a_chat() -> None:
    async with open_site() as site:
        assert (await site.post("/tokenize", {"messages": HI}))[1]["tokens"] == list(b"hi\n")
        going_on = {"messages": [*HI, {"role": "assistant", "content": "I "}], "continue_final_message": True}
        assert (await site.post("/tokenize", going_on))[1]["tokens"] == list(b"hi\nI ")


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        ("/tokenize", {}, "prompt", "neither"),
        ("/tokenize", {"prompt": "x", "messages": HI}, "prompt", "both"),
        ("/tokenize", {"messages": []}, "messages", "empty"),
        ("/tokenize", {"prompt": "x", "model": "gpt"}, "model", "'gpt'"),
        ("/tokenize", {"messages": HI, "continue_final_message": True}, "continue_final_message", "the user's"),
        ("/detokenize", {}, None, "missing required field `tokens`"),
        ("/detokenize", {"tokens": [1, 257]}, "tokens[1]", "257, outside the vocabulary; use ids from 0 to 256"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", ">= 0"),
        ("/pause_generation", {"mode": "later"}, "mode", "'retract'"),
        (
            "/v1/chat/completions",
            {"messages": HI, "continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
            "exclude each other",
        ),
        (
            "/v1/chat/completions",
            {"messages": HI, "chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs",
            "sets messages",
        ),
    ],
)
async def test_refusals(path: str, body: dict, param: str | None, says: str) -> None:
    async with open_site() as site:
        status, answer = await site.post(path, body)
        assert status == (404 if param == "model" else 400)
        assert says in answer["error"]["message"]
        assert answer["error"]["param"] == param
        assert (await site.get("/health_generate"))[0] == 200


async def test_what_needs_the_tokenizer_waits_for_it() -> None:
    async with (
        serving(FakeFront()) as url,
        aiohttp.ClientSession(url) as session,
        session.post("/tokenize", json={"prompt": "x"}) as response,
    ):
        assert (response.status, (await response.json())["error"]["code"]) == (503, "starting")


# ── chat templates ───────────────────────────────────────────────────────────────────────────

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content | trim }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ mood }}"
)


async def rendered(site: Site, **body: Any) -> str:
    tokens = (await site.post("/tokenize", {"messages": HI, **body}))[1]["tokens"]
    return (await site.post("/detokenize", {"tokens": tokens}))[1]["prompt"]


async def test_the_template_option_and_what_a_request_says_of_it(tmp_path: Any) -> None:
    assistant = {"role": "assistant", "content": " so: "}
    async with open_site(chat_template=TEMPLATE) as site:
        assert await rendered(site) == "<user>hi</><assistant>"
        assert await rendered(site, add_generation_prompt=False) == "<user>hi</>"
        assert await rendered(site, chat_template_kwargs={"mood": "glad"}) == "<user>hi</><assistant>glad"
        going_on = {"messages": [*HI, assistant], "continue_final_message": True}
        assert await rendered(site, **going_on) == "<user>hi</><assistant>so:"
        # the same through a chat: the echo model counts on from its prompt's last byte
        asked = {"max_tokens": 3, "temperature": 0}
        for body, last in (({"messages": HI}, ">"), ({**going_on, "add_generation_prompt": False}, ":")):
            status, answer = await site.post("/v1/chat/completions", {**asked, **body})
            assert (status, answer["choices"][0]["message"]["content"]) == (200, counted(last, 3))
        kwargs = {"chat_template_kwargs": {"mood": "a"}}
        answer = (await site.post("/v1/chat/completions", {**asked, "messages": HI, **kwargs}))[1]
        assert answer["choices"][0]["message"]["content"] == "bcd"
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE)
    async with open_site(chat_template=str(path)) as site:
        assert await rendered(site) == "<user>hi</><assistant>"


async def test_the_template_of_a_request() -> None:
    template = "{{ messages[0].content }}{% if loud %}!{% endif %}"
    loud = {"chat_template": template, "chat_template_kwargs": {"loud": True}}
    async with open_site(trusting=True) as site:
        assert [await rendered(site), await rendered(site, **loud)] == ["hi\n", "hi!"]
        body = {"messages": HI, "temperature": 0, "max_tokens": 3, **loud}
        _, answer = await site.post("/v1/chat/completions", body)
        assert answer["choices"][0]["message"]["content"] == counted("!", 3)
        for broken in ("{% if %}", "{{ " + "9" * 5000 + " }}", "{{ " + "(" * 5000 + " }}", "{{ 1 | nothing }}"):
            for path in ("/tokenize", "/v1/chat/completions"):
                status, answer = await site.post(path, {"messages": HI, "chat_template": broken})
                assert (status, answer["error"]["param"]) == (400, "chat_template"), answer
                assert "the chat template" in answer["error"]["message"]
        await site.house.settled()
    async with open_site() as site:
        for path in ("/tokenize", "/v1/chat/completions"):
            status, answer = await site.post(path, {"messages": HI, "chat_template": template})
            assert (status, answer["error"]["code"]) == (400, "unsupported_parameter")
            assert "--trust-request-chat-template" in answer["error"]["message"]


async def test_a_message_that_holds_the_mark_is_whole() -> None:
    async with open_site() as site:
        said = [*HI, {"role": "assistant", "content": f"a{OPEN_END}b"}]
        assert await rendered(site, messages=said, continue_final_message=True) == f"hi\na{OPEN_END}b"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("nowhere.jinja", "'nowhere.jinja' cannot be read"),
        ("{% for %}", "malformed at line 1"),
        (".", "cannot be read"),
    ],
)
async def test_a_bad_template_stops_the_start(template: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        async with open_front(resolve({"model": "echo", "chat_template": template})):
            pass


async def test_a_template_that_leaves_messages_out_cannot_go_on() -> None:
    async with open_site(chat_template="{{ messages[0].content }}") as site:
        said = [*HI, {"role": "assistant", "content": "x"}]
        status, answer = await site.post("/tokenize", {"messages": said, "continue_final_message": True})
        assert (status, answer["error"]["param"]) == (400, "continue_final_message")
        status, answer = await site.post("/tokenize", {"messages": [{"role": "user", "content": ""}]})
        assert (status, answer["error"]["param"]) == (400, "messages")


# ── names ────────────────────────────────────────────────────────────────────────────────────


async def test_every_served_name_is_taken_and_the_first_is_shown() -> None:
    async with open_site(names=("big", "org/small")) as site:
        async with openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="any", max_retries=0) as api:
            assert [model.id for model in (await api.models.list()).data] == ["big", "org/small"]
            assert (await api.models.retrieve("org/small")).id == "org/small"
            for name in ("big", "org/small"):
                assert (await api.completions.create(model=name, prompt="a", max_tokens=1)).model == "big"
            with pytest.raises(openai.NotFoundError, match="'echo' is not served here; use 'big' or 'org/small'"):
                await api.completions.create(model="echo", prompt="a")
        assert (await site.get("/model_info"))[1]["served_model_names"] == ["big", "org/small"]


# ── operators ────────────────────────────────────────────────────────────────────────────────


async def test_server_info_and_model_info() -> None:
    async with open_site(api_key="sesame", max_step_tokens=32) as site:
        await site.post("/generate", {"text": "abcdefgh", "sampling_params": {"max_new_tokens": 4}})
        await site.house.settled()
        status, info = await site.get("/server_info")
        assert status == 200
        assert "sesame" not in str(info) and "api_key" not in info["options"]["server"]
        assert (info["version"], info["status"], info["served_model_names"]) == (__version__, "ready", ["echo"])
        assert info["options"]["schedule"]["max_step_tokens"] == 32
        assert (info["device"]["pages"], info["device"]["page_size"]) == (1024, 4)
        assert info["startup"] == {}
        (figures,) = info["internal_states"]
        assert (figures["prompt_tokens_total"], figures["pages"], figures["running"]) == (8, 1024, 0)
        assert (await site.get("/get_server_info"))[1] == info
        status, model = await site.get("/model_info")
        assert (status, model) == await site.get("/get_model_info")
        assert (model["model_path"], model["is_generation"]) == ("echo", True)
        assert (model["max_model_len"], model["vocab_size"], model["has_chat_template"]) == (4096, 257, True)


async def test_info_before_the_device_is_ready() -> None:
    front = FakeFront()
    front.info = None
    async with serving(front) as url, aiohttp.ClientSession(url) as session:
        async with session.get("/server_info") as response:
            assert ((await response.json())["device"], response.status) == (None, 200)
        async with session.get("/model_info") as response:
            assert ((await response.json())["max_model_len"], response.status) == (None, 200)


async def test_health_generate() -> None:
    async with open_site() as site:
        status, answer = await site.get("/health_generate")
        assert (status, answer["status"]) == (200, "ready") and answer["seconds"] > 0
        await site.house.settled()
        assert site.house.scheduler.scheduler.counts()["generated_tokens_total"] == 1
        await site.post("/pause_generation")
        status, answer = await site.get("/health_generate")
        assert (status, answer["status"]) == (503, "paused")


async def test_a_server_that_is_not_ready_is_alive_all_the_same() -> None:
    async with open_site() as site:
        for path in ("/health", "/readyz", "/ping"):
            assert await site.get(path) == (200, {"status": "ready"})
        assert (await site.post("/ping"))[0] == 200
        await site.post("/pause_generation")
        for path in ("/health", "/readyz", "/ping"):
            status, answer = await site.get(path)
            assert (status, answer["status"]) == (503, "paused")
        assert await site.get("/livez") == (200, {"status": "alive"})
        await site.post("/continue_generation")
        await site.house.executor.lose("pulled the plug")
        assert await site.get("/livez") == (200, {"status": "alive"})
        site.house.front.draining = True
        assert (await site.get("/readyz"))[1]["status"] == "draining"
        assert await site.get("/livez") == (200, {"status": "alive"})


async def test_a_scheduler_that_says_nothing_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.runtime.front.HEARTBEAT_LIMIT", -1.0)
    async with open_site() as site:
        status, answer = await site.get("/livez")
        assert (status, answer["status"]) == (503, "dead") and "heartbeat" in answer["cause"]
        assert (await site.get("/readyz"))[1]["status"] == "stalled"
        site.house.front.draining = True
        assert (await site.get("/livez"))[0] == 503
    front = FakeFront()
    front.state = Health("failed", "the scheduler cannot go on")
    async with serving(front) as url, aiohttp.ClientSession(url) as session, session.get("/livez") as response:
        assert (response.status, (await response.json())["cause"]) == (503, "the scheduler cannot go on")


async def test_version_and_models_with_a_slash() -> None:
    async with open_site() as site:
        assert await site.get("/version") == (200, {"version": __version__})
        assert await site.get("/v1/models/") == await site.get("/v1/models")
        assert (await site.get("/v1/models/echo"))[1]["id"] == "echo"


async def test_the_tokenizer_is_told() -> None:
    async with open_site() as site:
        status, info = await site.get("/tokenizer_info")
        assert (status, info["vocab_size"], info["model_max_length"]) == (200, 257, 4096)
        assert (info["eos_token_ids"], info["additional_special_tokens"]) == ([256], ["<end>"])
        text = site.house.front.text
        assert text is not None and info["chat_template"] == text.spec.chat_template is not None
    async with open_site(chat_template="{{ messages[0].content }}") as site:
        assert (await site.get("/tokenizer_info"))[1]["chat_template"] == "{{ messages[0].content }}"


async def test_a_probe_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.http.admin.admin.PROBE_SECONDS", 0.05)
    async with open_site(seconds=0.5) as site:
        status, answer = await site.get("/health_generate")
        assert (status, answer["status"]) == (503, "stalled")
        await site.house.settled()


async def test_pause_and_continue() -> None:
    async with open_site(seconds=0.001) as site, anyio.create_task_group() as group:
        texts: list[str] = []

        async def one(letter: str) -> None:
            body = {"text": letter, "sampling_params": {"max_new_tokens": 100, "temperature": 0}}
            texts.append((await site.post("/generate", body))[1]["text"])

        logic = site.house.scheduler
        group.start_soon(one, "a")
        while not logic.in_flight:
            await anyio.sleep(0.001)
        assert await site.post("/pause_generation") == (200, {"paused": True})
        assert logic.in_flight == 0
        steps = logic.scheduler.counts()["steps"]
        group.start_soon(one, "b")  # taken in, but not run
        while logic.scheduler.counts()["waiting"] == 0:
            await anyio.sleep(0.001)
        assert (await site.get("/health"))[1]["status"] == "paused"
        assert (await site.get("/server_info"))[1]["internal_states"][0]["paused"] is True
        assert (logic.scheduler.counts()["steps"], texts) == (steps, [])
        assert await site.post("/continue_generation") == (200, {"paused": False})
        assert await site.get("/health") == (200, {"status": "ready"})
        while len(texts) < 2:
            await anyio.sleep(0.001)
        assert sorted(texts) == sorted([counted("a", 100), counted("b", 100)])
        await site.house.settled()


async def test_pause_may_end_what_runs() -> None:
    async with open_site(seconds=0.001) as site, anyio.create_task_group() as group:
        ends: list[Any] = []

        async def one() -> None:
            body = {"text": "a", "sampling_params": {"max_new_tokens": 4000}}
            ends.append((await site.post("/generate", body))[1]["meta_info"]["finish_reason"]["type"])

        group.start_soon(one)
        while not site.house.scheduler.in_flight:
            await anyio.sleep(0.001)
        await site.post("/pause_generation", {"mode": "abort"})
        while not ends:
            await anyio.sleep(0.001)
        assert ends == ["abort"]
        await site.post("/continue_generation")
        await site.house.settled()


async def test_pause_may_send_what_runs_back_to_the_queue() -> None:
    async with open_site(seconds=0.001) as site, anyio.create_task_group() as group:
        texts: list[str] = []

        async def one() -> None:
            body = {"text": "a", "sampling_params": {"max_new_tokens": 60, "temperature": 0}}
            texts.append((await site.post("/generate", body))[1]["text"])

        logic = site.house.scheduler
        group.start_soon(one)
        with anyio.fail_after(60):
            while not logic.in_flight:
                await anyio.sleep(0.001)
            assert await site.post("/pause_generation", {"mode": "retract"}) == (200, {"paused": True})
            state = (await site.get("/server_info"))[1]["internal_states"][0]
            assert (state["running"], state["waiting"], state["retractions_total"]) == (0, 1, 1)
            assert (await site.post("/flush_cache"))[1]["in_use"] == 0
            await site.post("/continue_generation")
            while not texts:
                await anyio.sleep(0.001)
        assert texts == [counted("a", 60)]
        await site.house.settled()


async def test_a_lost_worker_ends_a_pause_that_waits_for_it() -> None:
    async with open_site(seconds=0.2) as site, anyio.create_task_group() as group:
        group.start_soon(site.post, "/generate", {"text": "a", "sampling_params": {"max_new_tokens": 5}})
        while not site.house.scheduler.in_flight:
            await anyio.sleep(0.001)
        group.start_soon(site.house.executor.lose, "pulled the plug")
        with anyio.fail_after(60):
            assert (await site.post("/pause_generation", {"mode": "retract"}))[0] == 200
            await site.post("/continue_generation")
            while (await site.get("/health_generate"))[0] != 200:
                await anyio.sleep(0.01)


async def test_traces_go_below_their_directory_and_nowhere_else(tmp_path: Path) -> None:
    base = tmp_path / "traces"
    base.mkdir()
    (base / "link").symlink_to(tmp_path)
    async with open_site(profile_dir=str(base)) as site:
        for inside, path in ((None, base), ("a/b", base / "a/b"), (str(base / "c"), base / "c"), ("link/traces", base)):
            answer = await site.post("/start_profile", {"num_steps": 5, "output_dir": inside})
            assert answer == (200, {"path": str(path), "running": True})  # a fake device names the directory
        for outside in ("..", "/tmp", "a/../../b", "link/x", f"{base}x"):
            status, answer = await site.post("/start_profile", {"output_dir": outside})
            assert (status, answer["error"]["param"]) == (400, "output_dir") and "--profile-dir" in str(answer)
        status, answer = await site.post("/start_profile", {"num_steps": 0})
        assert (status, answer["error"]["param"]) == (400, "num_steps")
    async with open_site() as site:
        for route in ("/start_profile", "/stop_profile"):
            status, answer = await site.post(route)
            assert status == 400 and "start it with --profile-dir DIR" in answer["error"]["message"]


async def test_a_lost_worker_answers_for_its_trace(tmp_path: Path) -> None:
    async with open_site(profile_dir=str(tmp_path)) as site:
        site.house.executor.lost = True  # and nobody has noticed
        async with anyio.create_task_group() as group:
            group.start_soon(_lose_later, site)
            status, answer = await site.post("/start_profile")
        assert status == 400 and "pulled the plug" in answer["error"]["message"]


async def _lose_later(site: Site) -> None:
    while not site.house.scheduler._asked:
        await anyio.sleep(0.001)
    await site.house.executor.lose("pulled the plug")


async def test_experts_are_counted_between_a_start_and_a_stop() -> None:
    async with open_site() as site:
        assert "engine_expert_choices_total{" not in await _metrics(site)
        assert (await site.get("/expert_distribution/dump"))[1]["counting"] is False
        await site.house.text(prompt("a", max_tokens=3))
        assert await site.post("/expert_distribution/start") == (200, {"counting": True})
        await site.house.text(prompt("a", max_tokens=5))
        await site.house.settled()
        answer = {"counting": True, "layers": [1, 3], "counts": [[5, 1, 2], [3, 4, 5]]}
        assert await site.get("/expert_distribution/dump") == (200, answer)
        await site.house.text(prompt("b", max_tokens=2))
        await site.house.settled()
        page = await _metrics(site)
        assert 'engine_expert_choices_total{expert="0",layer="1"} 7.0' in page  # asked for as it is scraped
        assert 'engine_expert_choices_total{expert="2",layer="3"} 5.0' in page
        assert await site.post("/expert_distribution/stop") == (200, {"counting": False})
        assert (await site.post("/expert_distribution/dump"))[1]["counting"] is False


async def test_the_map_of_experts() -> None:
    async with open_site() as site:
        status, said = await site.get("/expert_distribution")
        assert status == 200 and said["layers"] == [1, 3] and said["ranks"] == 2
        assert said["counts"] == [[40, 10, 10], [0, 0, 0]] and said["loads"] == [[30, 30], [0, 0]]
        assert said["placement"] == [[[0, 1], [2, 0]], [[0, 1], [0, 2]]] and said["balance"] == [1, 1]
        assert said["windows"][1] == {"step": 512, "choices": 10, "balance": 1.25, "drift": 0.125}
        assert (said["moved"], said["waiting"]) == (2, 1)
        assert await site.post("/expert_distribution/rebalance") == (200, {"layers": 2})
        assert "engine_expert_balance" not in await _metrics(site), "no model without experts is asked"
        front = site.house.front
        assert front.info is not None
        front.info = msgspec.structs.replace(front.info, mixture=True)
        page = await _metrics(site)
        assert "engine_expert_balance 1.25\n" in page and "engine_expert_drift 0.125\n" in page
        assert 'engine_expert_load_ratio{rank="1"} 1.0\n' in page and "engine_expert_layers_moved_total 2.0\n" in page


async def _metrics(site: Site) -> str:
    async with site.session.get("/metrics") as response:
        return await response.text()


async def test_a_lost_worker_answers_for_its_counts() -> None:
    async with open_site() as site:
        site.house.executor.lost = True  # and nobody has noticed
        async with anyio.create_task_group() as group:
            group.start_soon(_lose_later, site)
            status, answer = await site.post("/expert_distribution/start")
        assert status == 400 and "what it traced and counted: pulled the plug" in answer["error"]["message"]
        assert "engine_expert_choices_total{" not in await _metrics(site)


async def test_a_key_in_anthropics_header() -> None:
    async with open_site(api_key="sesame") as site, aiohttp.ClientSession(site.url) as session:
        for headers, status in (({"x-api-key": "sesame"}, 200), ({"x-api-key": "guess"}, 401), ({}, 401)):
            async with session.get("/model_info", headers=headers) as response:
                assert response.status == status
        async with session.post("/v1/messages", json={}, headers={"x-api-key": "guess"}) as response:
            answer = await response.json()
        assert (answer["type"], answer["error"]["type"]) == ("error", "authentication_error")


@pytest.mark.parametrize(
    "body",
    [
        TokenizeBody, DetokenizeBody, ResponsesBody, MessagesBody, CountBody, PauseBody, ProfileBody,
        EmbeddingBody, ScoreBody, RerankBody, InputTokensBody,
    ],
)  # fmt: skip
def test_every_served_field_is_documented(body: Any) -> None:
    docs = Path(__file__).parents[3] / "docs"
    page = (docs / "http.md").read_text() + (docs / "profiling.md").read_text()
    served = {*body.__struct_fields__} - {*body.rules}
    assert [name for name in sorted(served) if f"`{name}" not in page and f'"{name}"' not in page] == []


def test_only_probes_are_open() -> None:
    assert {route.path for route in ROUTES if route.open} == {
        "/health",
        "/readyz",
        "/ping",
        "/livez",
        "/metrics",
        "/",
        "/docs",
    }
