"""Pictures and clips over HTTP and the offline API, from real clients to a whole engine whose device is fake."""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
from anthropic import AsyncAnthropic
from anthropic import BadRequestError as AnthropicBadRequest
from fake_media import BOMB, clip, encoded, picture, seeing_text
from house import House, open_house
from http_front import serving
from odd_web import PICTURE, OddWeb, odd_web
from openai import AsyncOpenAI, BadRequestError
from test_http import post

from engine.conversation.media import Placed
from engine.conversation.parts import Message, read_messages
from engine.errors import RequestError
from engine.messages.request import Generate
from engine.params.sampling import SamplingParams
from engine.runtime import launch
from engine.runtime.offline import AsyncEngine
from engine.text import pool as text_pool
from engine.text.jobs import perform
from engine.text.process import unpacked

pytestmark = pytest.mark.anyio
LIB = str(Path(__file__).parents[2] / "lib")


def data_url(data: bytes = PICTURE, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@asynccontextmanager
async def seeing(monkeypatch: pytest.MonkeyPatch, **options: Any) -> AsyncIterator[tuple[House, str]]:
    """A server whose model sees, and its URL."""
    monkeypatch.setattr(launch, "text_of", lambda *_: seeing_text())
    monkeypatch.setenv("PYTHONPATH", LIB)
    async with open_house(media_processes=1, encoder_tokens=1024, **options) as house, serving(house.front) as url:  # type: ignore[arg-type]
        with anyio.fail_after(60):
            yield house, url


def user(*parts: Any) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def shown(url: str, kind: str = "image_url", **more: Any) -> dict[str, Any]:
    return {"type": kind, kind: {"url": url, **more}}


async def test_detail_low_is_fewer_tokens_and_no_part_of_what_is_cached_of_the_whole_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with seeing(monkeypatch) as (_, url):
        told = []
        for detail in ("low", "high", "low", "original", "auto"):
            body = {"model": "echo", "messages": user(shown(data_url(), detail=detail), "abcdefgh"), "max_tokens": 1}
            status, said = await post(f"{url}/v1/chat/completions", body)
            assert status == 200, said
            _, counted = await post(f"{url}/tokenize", {key: body[key] for key in ("model", "messages")})
            assert counted["count"] == said["usage"]["prompt_tokens"]
            about = said["usage"]["prompt_tokens_details"]
            told.append((about["image_tokens"], said["usage"]["prompt_tokens"], about["cached_tokens"]))
    assert told == [(1, 9, 0), (4, 12, 0), (1, 9, 8), (4, 12, 8), (4, 12, 8)]


async def test_generate_takes_the_forms_of_sglangs_clients(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(PICTURE)
    bare, path = base64.b64encode(PICTURE).decode(), f"{tmp_path}/a b.png"
    coarse = {"url": data_url(), "detail": "low"}
    film = data_url(clip(), "video/mp4")
    one, two = {"image_data": data_url()}, {"image_data": [bare, coarse]}
    files = {"image_data": [path, f"file://{tmp_path}/a%20b.png"]}
    cases: list[tuple[Any, dict[str, Any], list[tuple[str, int]]]] = [
        ("see *a", one, [("bcd", 4 + 5)]),
        ("* and *b", two, [("cde", 4 + 1 + 6)]),
        ("**c", files, [("def", 4 + 4 + 1)]),
        ("#x", {"video_data": [film]}, [("yz{", 10 + 1)]),
        ("*#d", {**one, "video_data": film}, [("efg", 4 + 10 + 1)]),
        (["*a", "*bb"], one, [("bcd", 4 + 1), ("cde", 4 + 2)]),
        (
            ["*a", "b", "**e"],
            {"image_data": [bare, None, [coarse, path]]},
            [("bcd", 5), ("cde", 1), ("fgh", 1 + 4 + 1)],
        ),
        ([list(b"*a")], {"image_data": [[bare]]}, [("bcd", 5)]),
        ("x", {"image_data": []}, [("yz{", 1)]),
        ("*#d", {**one, "video_data": {"url": film}}, [("efg", 4 + 10 + 1)]),
    ]
    wrong: list[tuple[Any, dict[str, Any], str, str]] = [
        (["*a", "*b", "c"], {"image_data": [bare, bare]}, "image_data", "image_data has 2 entries for 3 prompts"),
        ("*a", {"image_data": [[bare]]}, "image_data", r"image_data[0] is a list, and there is one prompt"),
        ("*a", {"image_data": [bare, bare]}, "image_data", "has 1 place for media (image), and 2 media came"),
        ("*#a", {"video_data": film}, "video_data", "has 2 places for media (image, video), and 1 medium came"),
        (["*a", "*b"], {"image_data": [bare, ["AAAA"]]}, "image_data[1][0]", "image_data[1][0] is no image that can"),
        ("*a", {"image_data": "not base64!"}, "image_data", "image_data"),
        ("*a", {"image_data": "/etc/x.png"}, "image_data", "which is not below --media-root"),
        ("*a", {"image_data": f"{tmp_path}/../x.png"}, "image_data", "which is not below --media-root"),
        ("*a", {"image_data": "//etc/x.png"}, "image_data", "which is not below --media-root"),
        ("*a", {"image_data": "http://2130706433/x.png"}, "image_data", "which this server does not fetch from"),
        ("*a", {"image_data": [bare] * 5}, "image_data", "image_data has 5 images and videos, and at most 4 are taken"),
        ("#", {"image_data": [], "video_data": [film] * 5}, "video_data", "video_data has 5 images and videos"),
        ("#", {"video_data": {"url": film, "detail": "low"}}, "video_data.detail", "the fields here are url"),
    ]
    sampling = {"temperature": 0, "max_new_tokens": 3}
    async with seeing(monkeypatch, media_root=str(tmp_path), media_items=4) as (house, url):
        for prompt, media, wanted in cases:
            field = "input_ids" if isinstance(prompt[0], list) else "text"
            status, said = await post(f"{url}/generate", {field: prompt, "sampling_params": sampling, **media})
            assert status == 200, said
            replies = said if isinstance(said, list) else [said]
            assert [(each["text"], each["meta_info"]["prompt_tokens"]) for each in replies] == wanted
        for prompt, media, param, text in wrong:
            status, said = await post(f"{url}/generate", {"text": prompt, "sampling_params": sampling, **media})
            assert status == 400 and said["error"]["param"] == param and text in said["error"]["message"], said
        drawn = {"text": ["*a", "*b"], "sampling_params": {**sampling, "n": 2}, "image_data": [path, bare]}
        _, said = await post(f"{url}/generate", drawn)
        assert [each["text"] for each in said] == ["bcd", "bcd", "cde", "cde"]
        await house.settled()
        assert house.front.media is not None and house.front.media.open == 0
    monkeypatch.undo()
    async with open_house() as house, serving(house.front) as url:
        status, said = await post(f"{url}/generate", {"text": "*a", **one})
        assert status == 400 and "image_data is given, and the model reads text alone" in said["error"]["message"]


async def metrics(url: str) -> dict[str, float]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as answer:
        lines = [line for line in (await answer.text()).splitlines() if line.startswith("engine_media")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


async def test_clients_of_three_apis_send_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    async with seeing(monkeypatch) as (house, url):
        openai = AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
        anthropic = AsyncAnthropic(base_url=url, api_key="-", max_retries=0)
        messages: Any = user("see ", shown(data_url(), detail="high"), " and ", shown(data_url()), "abc")
        made = await openai.chat.completions.create(model="echo", messages=messages, max_tokens=3, temperature=0)
        assert made.choices[0].message.content == "def"
        assert made.usage is not None and made.usage.prompt_tokens == len("see  and abc") + 2 * 4
        assert made.usage.prompt_tokens_details.image_tokens == 8  # type: ignore[union-attr]
        stream = await openai.chat.completions.create(
            model="echo",
            messages=user("look ", shown(data_url(clip(), "video/mp4"), "video_url"), "x"),  # type: ignore[arg-type]
            max_tokens=2,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "yz"
        assert chunks[-1].usage.prompt_tokens_details.video_tokens == 10  # type: ignore[union-attr]

        parts: Any = [
            {"type": "input_text", "text": "a"},
            {"type": "input_image", "image_url": data_url(), "detail": "auto"},
            {"type": "input_text", "text": "m"},
        ]
        response = await openai.responses.create(
            model="echo", input=[{"role": "user", "content": parts}], max_output_tokens=2, temperature=0
        )
        assert response.output_text == "no" and response.usage is not None and response.usage.input_tokens == 6

        block: Any = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(PICTURE).decode()}
        turns: Any = [{"role": "user", "content": [{"type": "image", "source": block}, {"type": "text", "text": "p"}]}]
        said = await anthropic.messages.create(model="echo", messages=turns, max_tokens=2)
        assert said.content[0].text == "qr"  # type: ignore[union-attr]
        counted = await anthropic.messages.count_tokens(model="echo", messages=turns)
        assert counted.input_tokens == said.usage.input_tokens + (said.usage.cache_read_input_tokens or 0) == 5
        async with odd_web() as web:  # whose address is not allowed
            url_source = {"type": "url", "url": f"{web.url}/picture"}
            with pytest.raises(AnthropicBadRequest, match=r"messages\[0\].content\[0\].content\[0\] is at the host"):
                result: Any = {"type": "tool_result", "tool_use_id": "1"}
                result["content"] = [{"type": "image", "source": url_source}]
                await anthropic.messages.create(
                    model="echo", messages=[{"role": "user", "content": [result]}], max_tokens=1
                )
            with pytest.raises(BadRequestError, match=r"input\[0\].content\[0\] is at the host '127.0.0.1'"):
                video: Any = {"type": "input_video", "video_url": f"{web.url}/picture"}
                await openai.responses.create(model="echo", input=[{"role": "user", "content": [video]}])
            assert not web.asked
        await openai.close()
        await anthropic.close()
        figures = await metrics(url)
        assert figures['engine_media_total{result="made"}'] == 2
        assert figures['engine_media_total{result="hit"}'] == 4
        assert figures["engine_media_pixels_total"] == 64 * 48 * 6
        assert figures["engine_media_bytes_total"] == 5 * len(PICTURE) + len(clip())
        assert figures['engine_media_seconds_count{stage="decode"}'] == 2
        assert figures['engine_media_seconds_count{stage="read"}'] == 6
        await house.settled()
        figures = await metrics(url)  # the prompt of two pictures, a clip, and pictures in two others
        assert figures['engine_media_slices_total{result="made"}'] == 2
        assert figures['engine_media_slices_total{result="held"}'] == 1 + 1 + 1
        assert house.front.media is not None and house.front.media.open == 0


@pytest.mark.parametrize("batch", [{"text": ["*a", "*b"]}, {"input_ids": [list(b"*a"), list(b"*b")]}])
async def test_a_batch_tells_the_place_of_a_fault_once(monkeypatch: pytest.MonkeyPatch, batch: dict[str, Any]) -> None:
    good, bad, (prompts,) = data_url(), "AAAA", batch
    async with seeing(monkeypatch) as (_, url):
        for media, says in (
            ([bad, good], "image_data[0] is no image that can be read"),
            ([[good], [bad]], "image_data[1][0] is no image that can be read"),
            (bad, "image_data is no image that can be read"),  # which both show
            ([good, [good, good]], f"{prompts}[1]: the prompt has 1 place for media"),
        ):
            status, said = await post(f"{url}/generate", {**batch, "image_data": media})
            assert status == 400 and said["error"]["message"].startswith(says), said


async def test_the_same_picture_asked_by_64_requests_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with seeing(monkeypatch, media_hosts="127.0.0.1") as (house, url), odd_web() as web:
        web.go_on.set()
        body = {"messages": user(shown(f"{web.url}/wait"), "a"), "max_tokens": 1, "temperature": 0}
        replies = await asyncio.gather(*[post(f"{url}/v1/chat/completions", body) for _ in range(64)])
        assert {(status, reply["choices"][0]["message"]["content"]) for status, reply in replies} == {(200, "b")}
        figures = await metrics(url)
        assert figures['engine_media_total{result="made"}'] == 1
        assert figures['engine_media_total{result="hit"}'] == 63
        assert len(set(house.executor.loaded)) == len(house.executor.loaded)
        await house.settled()
        assert house.front.media is not None and house.front.media.open == 0


async def test_what_cannot_be_got_is_a_400_at_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    async with seeing(monkeypatch, media_hosts="127.0.0.1") as (house, url), odd_web() as web:
        chat, place = f"{url}/v1/chat/completions", "messages[0].content[1]"

        async def refused(part: Any, path: str = chat, **more: Any) -> tuple[str, str, str]:
            status, reply = await post(path, {"messages": user("a", part), "max_tokens": 1, **more})
            error = reply["error"]
            assert status == 400, error
            return error["code"], error["param"], error["message"]

        for part, code in (
            (shown(f"{web.url}/page"), "invalid_media"),
            (shown(f"{web.url}/status/404"), "media_unreachable"),
            (shown("http://169.254.169.254/"), "media_not_allowed"),
            (shown("file:///etc/passwd"), "media_not_allowed"),
            (shown(data_url(b"no picture")), "invalid_media"),
            (shown(data_url(PICTURE), "video_url"), "invalid_media"),
            (shown(data_url(BOMB)), "media_too_large"),
        ):
            for path, more in ((chat, {}), (chat, {"stream": True, "n": 2}), (f"{url}/tokenize", None)):
                if more is None:
                    status, reply = await post(path, {"messages": user("a", part)})
                    found = (reply["error"]["code"], reply["error"]["param"], reply["error"]["message"])
                    assert status == 400
                else:
                    found = await refused(part, path, **more)
                assert found[:2] == (code, place) and found[2].startswith(f"{place} ")
        status, reply = await post(chat, {"messages": user(*[shown(data_url())] * 10_000), "max_tokens": 1})
        assert (status, reply["error"]["code"]) == (400, "too_many_media")
        status, reply = await post(f"{url}/tokenize", {"messages": user("a", shown(data_url()), "b")})
        assert (status, reply["count"], reply["tokens"]) == (200, 6, [97, 1, 1, 1, 1, 98])
        await house.settled()
        assert house.front.media is not None and house.front.media.open == 0


async def test_what_nothing_foresaw_ends_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async with seeing(monkeypatch) as (house, url):
        assert house.front.media is not None

        async def fails(*_: Any) -> Any:
            raise ZeroDivisionError("a bug")

        chat, body = f"{url}/v1/chat/completions", {"messages": user(shown(data_url()), "a"), "max_tokens": 1}
        with monkeypatch.context() as patched:
            patched.setattr(house.front.media._sources, "read", fails)
            status, reply = await post(chat, body)
            assert (status, reply["error"]["code"]) == (500, "internal_error")
        assert (await post(chat, body))[0] == 200
        await house.settled()


async def test_a_processor_that_misplaces_ends_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async with seeing(monkeypatch) as (_, url):
        body = {"model": "echo", "messages": user("a", shown(data_url())), "max_tokens": 1}
        for spans in ((), (((1, 3),),), (((1, 4), (1, 1)),)):  # of no medium, too few, too many
            with monkeypatch.context() as wrong:
                placed = Placed([97, 1, 1, 1, 1], spans=spans)
                wrong.setattr(seeing_text().media, "placed", lambda ids, media, placed=placed: placed)
                status, said = await post(f"{url}/v1/chat/completions", body)
            assert (status, said["error"]["code"]) == (500, "media_failed")
            assert "has made [4] embeddings, and placed [" in said["error"]["message"]
        assert (await post(f"{url}/v1/chat/completions", body))[0] == 200


async def test_requests_of_others_go_past_one_that_waits_for_its_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    async with seeing(monkeypatch, media_hosts="127.0.0.1") as (house, url), odd_web() as web:
        chat = f"{url}/v1/chat/completions"
        slow = {"messages": user(shown(f"{web.url}/wait"), "a"), "max_tokens": 1, "temperature": 0}
        waiting = asyncio.ensure_future(post(chat, slow))
        await asked(web, "/wait")
        status, reply = await post(chat, {"messages": user("a"), "max_tokens": 1, "temperature": 0})
        assert status == 200 and not waiting.done()
        web.go_on.set()
        status, reply = await waiting
        assert (status, reply["choices"][0]["message"]["content"]) == (200, "b")
        await house.settled()
        assert house.front.media is not None and house.front.media.open == 0


async def test_a_client_that_goes_away_cancels_its_fetches(monkeypatch: pytest.MonkeyPatch) -> None:
    async with seeing(monkeypatch, media_hosts="127.0.0.1") as (house, url), odd_web() as web:
        body = {"messages": user(shown(f"{web.url}/stall"), "a"), "max_tokens": 1}
        leaving = asyncio.ensure_future(post(f"{url}/v1/chat/completions", body))
        await asked(web, "/stall")
        assert web.open == house.front.open == 1
        leaving.cancel()
        while web.open or house.front.open:
            await anyio.sleep(0.005)
        await house.settled()
        assert house.front.media is not None and house.front.media.open == 0


async def test_an_abort_ends_a_request_that_waits_for_its_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    async with seeing(monkeypatch, media_hosts="127.0.0.1") as (house, url), odd_web() as web:
        body = {"messages": user(shown(f"{web.url}/stall"), "a"), "max_tokens": 1}
        waiting = asyncio.ensure_future(post(f"{url}/v1/chat/completions", body))
        await asked(web, "/stall")
        await post(f"{url}/abort_request", {"abort_all": True})
        status, reply = await waiting
        assert (status, reply["choices"][0]["finish_reason"]) == (200, "abort")
        while web.open:
            await anyio.sleep(0.005)
        await house.settled()
        assert house.front.media is not None and house.front.media.open == 0


async def test_long_prompts_go_to_a_text_process_without_their_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    real = text_pool.packed

    def packed(job: Any) -> Any:
        work = real(job)
        sent.append(len(work.packed))
        return work

    monkeypatch.setattr(text_pool, "LARGE", -1)
    monkeypatch.setattr(text_pool, "packed", packed)
    request = Generate("r", SamplingParams(temperature=0, max_tokens=2), messages=said_with(PICTURE))
    async with seeing(monkeypatch) as (house, _):

        async def perform_here(work: Any, size: int, held: int) -> Any:
            return perform(house.front.texts.admission, unpacked(work))  # type: ignore[union-attr]

        monkeypatch.setattr(house.front.texts, "done", perform_here)
        assert await house.text(request) == "bc"
        (asset,) = [asset for asset in house.scheduler.room._assets.values() if asset.kind == "media"]
        assert asset.payload == picture().tobytes()
        await house.settled()
        assert house.front.media is not None and house.front.media.open == 0
    assert sent and max(sent) < 4000 < len(picture().tobytes())


async def test_the_offline_api_shows_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    async with seeing(monkeypatch, media_items=2, media_pixels=64 * 48) as (house, _):
        engine = AsyncEngine(house.front.config)
        engine._front = house.front
        prompts = [user("a", shown(data_url()), "b"), user(shown(data_url(clip(), "video/mp4"), "video_url"), "c")]
        replies = await engine.generate(prompts, SamplingParams(temperature=0, max_tokens=2))
        assert [(reply.text, reply.prompt_tokens) for reply in replies] == [("cd", 6), ("de", 11)]
        with pytest.raises(RequestError, match=r"messages\[0\].content\[0\] is no image that can be read"):
            await engine.generate(user(shown(data_url(b"none")), "a"))
        for parts, code in (
            ([shown(data_url())] * 3, "too_many_media"),
            ([shown(data_url(encoded(picture(65, 48))))], "media_too_large"),
        ):
            with pytest.raises(RequestError) as refused:
                await engine.generate(user(*parts, "a"))
            assert refused.value.code == code
        await house.settled()
        assert house.front.media is not None and house.front.media.open == 0


def said_with(image: bytes) -> list[Message]:
    return read_messages(user(shown(data_url(image)), "a"))


async def asked(web: OddWeb, path: str) -> None:
    with anyio.fail_after(60):
        while not web.asked[path]:
            await anyio.sleep(0.005)
