"""The store and its processes: once is enough, whoever leaves; and what ends one of them ends nothing else."""

import base64
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from fake_media import DEADLY, FAULTY, HUGE, SLOW, WRONG, FakeMedia, clip, encoded, picture, start
from msgspec.msgpack import Encoder
from odd_web import PICTURE, odd_web

from engine.actors.tokenizer import UNSAMPLED
from engine.conversation.parts import Image, Video
from engine.errors import RequestError
from engine.media import store as module
from engine.media.pool import MediaPool, processes
from engine.media.store import BESIDE, MediaStore, Stage
from engine.messages.decoding import DecodeMedia, MediaBoot, MediaReady
from engine.messages.media import Prepared, Slice, sliced
from engine.messages.request import Admit
from engine.options.media import MOST_BYTES, MediaOptions
from engine.plugin.registry import Plugins
from engine.runtime.actor import supervise
from engine.runtime.channel import MAX_FRAME, pack

pytestmark = pytest.mark.anyio
PLACE = "messages[0].content[1]"


def url_of(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image(data: bytes = PICTURE, place: str = PLACE) -> Image:
    return Image(url_of(data), place)


def video(data: bytes, place: str = PLACE) -> Video:
    return Video(url_of(data, "video/mp4"), place)


class Counts:
    """Counts what the store says."""

    def __init__(self) -> None:
        self.results: Counter[str] = Counter()
        self.stages: Counter[str] = Counter()
        self.bytes = self.pixels = 0

    def ended(self, result: str) -> None:
        self.results[result] += 1

    def took(self, stage: Stage, seconds: float) -> None:
        assert seconds >= 0
        self.stages[stage] += 1

    def read(self, size: int) -> None:
        self.bytes += size

    def decoded(self, pixels: int) -> None:
        self.pixels += pixels


class Scripted:
    """Decodes nothing, and remembers what it was asked for. Nothing is answered before `go_on`."""

    def __init__(self, *, waits: bool = False, fails: bool = False) -> None:
        self.asked: list[bytes] = []
        self.coarse: list[bool] = []
        self.left = 0
        self.go_on = anyio.Event()
        self.fails = fails
        if not waits:
            self.go_on.set()

    async def __call__(self, job: DecodeMedia) -> MediaReady:
        self.asked.append(job.source)
        self.coarse.append(job.coarse)
        try:
            await self.go_on.wait()
        except BaseException:
            self.left += 1
            raise
        if self.fails:
            raise RequestError("is odd", code="invalid_media")
        return MediaReady(Prepared(job.source, (1, 1, 1), 3, job.content), 10, 0.1, 0.2)


def store_of(ask: Any, **options: Any) -> tuple[MediaStore, Counts]:
    store = MediaStore(MediaOptions(media_hosts=("127.0.0.1",), **options), ask)
    store.figures = counts = Counts()
    return store, counts


async def settled() -> None:
    for _ in range(20):
        await anyio.lowlevel.checkpoint()


async def test_slices_that_open_requests_show_count_once() -> None:
    async def ask(job: DecodeMedia) -> MediaReady:
        parts = [Slice(bytes(100), 3, job.source[at : at + 1]) for at in range(len(job.source))]
        return MediaReady(sliced(parts, (3,), "video"), 10, 0.1, 0.2)

    store, _ = store_of(ask, media_open_memory=450)
    (one,), (other,) = [await store.resolved([video(source)]) for source in (b"abc", b"bcd")]
    store.hold("one", [one])
    store.hold("other", [other, one])
    assert store.open == 400 and store.kept == 2 * (300 + BESIDE)
    with pytest.raises(RequestError, match="show images and videos of 400 bytes, this one has 100 more, and 450"):
        store.hold("more", await store.resolved([video(b"dae")]))
    store.release("one")
    assert store.open == 400
    store.release("other")
    assert store.open == 0


# ── once is enough ───────────────────────────────────────────────────────────────────────────


async def test_64_requests_of_one_picture_decode_it_once() -> None:
    ask = Scripted(waits=True)
    store, counts = store_of(ask)
    found: list[Any] = []

    async def one() -> None:
        found.append(await store.resolved([image()]))

    async with anyio.create_task_group() as group:
        for _ in range(64):
            group.start_soon(one)
        await settled()
        assert len(ask.asked) == 1
        ask.go_on.set()
    assert len(found) == 64 and set(found) == {found[0]} and found[0][0].payload == PICTURE
    assert counts.results == {"made": 1, "hit": 63} and counts.stages["decode"] == 1 and counts.pixels == 10
    await store.resolved([image()])
    assert len(ask.asked) == 1 and counts.results["hit"] == 64


async def test_a_coarse_picture_is_another_one_which_is_made_once_as_well() -> None:
    ask = Scripted()
    store, counts = store_of(ask)
    kinds = ["low", None, "high", "low", "original", "auto"]
    media = [Image(url_of(PICTURE), PLACE, detail=detail) for detail in kinds]
    found = await store.resolved(media)
    assert sorted(ask.coarse) == [False, True] and counts.results == {"made": 2, "hit": 4}
    assert [each is found[0] for each in found] == [detail == "low" for detail in kinds]


async def test_64_requests_of_one_url_fetch_it_once() -> None:
    ask = Scripted()
    store, counts = store_of(ask)
    async with odd_web() as web:
        async with anyio.create_task_group() as group:
            for _ in range(64):
                group.start_soon(store.resolved, [Image(f"{web.url}/wait", PLACE)])
            with anyio.fail_after(60):
                while not web.open:
                    await anyio.sleep(0.005)
            await settled()
            web.go_on.set()
        assert web.asked["/wait"] == 1 and len(ask.asked) == 1 and counts.bytes == len(PICTURE)
        await store.resolved([Image(f"{web.url}/wait", PLACE)])
        assert web.asked["/wait"] == 2 and len(ask.asked) == 1  # it may have changed since, and has not
        for _ in range(3):
            await store.resolved([Image(f"{web.url}/fresh", PLACE)])
        assert web.asked["/fresh"] == 1 and len(ask.asked) == 1  # its server says that it stays the same


async def test_a_picture_is_known_by_what_it_shows_and_not_by_its_address() -> None:
    ask = Scripted()
    store, _ = store_of(ask)
    async with odd_web() as web:
        parts = [Image(f"{web.url}/picture/{number}", PLACE) for number in range(3)]
        found = await store.resolved([*parts, image(), image(encoded(picture(shade=9)))])
    assert len(ask.asked) == 2 and found[0] == found[1] == found[2] == found[3] != found[4]


async def test_who_leaves_takes_nothing_from_others() -> None:
    ask = Scripted(waits=True)
    store, counts = store_of(ask)
    found: list[Any] = []

    async def stays() -> None:
        found.append(await store.resolved([image()]))

    async with anyio.create_task_group() as group:
        first = anyio.CancelScope()

        async def leaves() -> None:
            with first:
                await store.resolved([image()])

        group.start_soon(leaves)
        await settled()
        group.start_soon(stays)
        group.start_soon(stays)
        await settled()
        first.cancel()
        await settled()
        assert len(ask.asked) == 2 and ask.left == 1  # one of the others has taken it over
        ask.go_on.set()
    assert len(found) == 2 and counts.results == {"made": 1, "hit": 1}


async def test_all_who_wait_for_what_fails_are_told_their_own_place() -> None:
    store, counts = store_of(Scripted(fails=True))
    said: list[tuple[str, str | None]] = []

    async def one(place: str) -> None:
        try:
            await store.resolved([image(place=place)])
        except RequestError as error:
            said.append((error.message, error.param))

    async with anyio.create_task_group() as group:
        for number in range(3):
            group.start_soon(one, f"messages[{number}]")
    assert sorted(said) == [(f"messages[{number}] is odd", f"messages[{number}]") for number in range(3)]
    assert counts.results == {"refused": 3}


async def test_what_is_kept_has_a_bound_and_the_oldest_goes() -> None:
    one, other, third = (encoded(picture(shade=shade)) for shade in (1, 2, 3))
    ask = Scripted()
    store, _ = store_of(ask, media_memory=2 * (len(one) + module.BESIDE) + 20)
    for data in (one, other, one, third, one):
        await store.resolved([image(data)])
    assert ask.asked == [one, other, third]
    await store.resolved([image(other)])
    assert ask.asked[3:] == [other] and store.kept <= 2 * (len(one) + module.BESIDE) + 20
    nothing, _ = store_of(ask, media_memory=0)
    await nothing.resolved([image(one)])
    assert nothing.kept == 0


async def test_a_client_that_leaves_ends_its_fetch() -> None:
    store, _ = store_of(Scripted())
    async with odd_web() as web, anyio.create_task_group() as group:
        group.start_soon(store.resolved, [Image(f"{web.url}/wait", PLACE), Image(f"{web.url}/endless", PLACE)])
        with anyio.fail_after(60):
            while web.open < 2:
                await anyio.sleep(0.005)
        group.cancel_scope.cancel()
    with anyio.CancelScope(shield=True), anyio.fail_after(60):
        while "/endless" in web.asked and web.open > 1:  # /wait notices nobody before it writes
            await anyio.sleep(0.005)


async def test_a_request_has_so_many_and_reads_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Scripted(waits=True)
    store, _ = store_of(ask)
    with pytest.raises(RequestError) as many:
        await store.resolved([image()] * 10_000)
    assert (many.value.code, many.value.param, many.value.status) == ("too_many_media", "messages", 400)
    assert "10000 images and videos, and at most 128 are taken (--media-items); send fewer" in many.value.message
    async with anyio.create_task_group() as group:
        group.start_soon(store.resolved, [image(encoded(picture(shade=shade))) for shade in range(30)])
        await settled()
        assert len(ask.asked) == module.READ_OF_ONE
        ask.go_on.set()
    assert len(ask.asked) == 30


async def test_the_media_of_one_request_fit_in_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, turns = bytes(4 << 20), bytes(12 << 20)  # of a million tokens, which their media have keys and positions for
    beside = pack(Encoder(), Admit("r", ids, UNSAMPLED, (), 1, keys=ids, positions=turns))
    assert len(beside) + module.MOST_PAYLOAD < MAX_FRAME and MediaOptions().media_bytes < MOST_BYTES < MAX_FRAME
    monkeypatch.setattr(module, "MOST_PAYLOAD", most := len(PICTURE) + 10)
    store, _ = store_of(Scripted())
    says = rf"2 images and videos of at least \d+ bytes .* at most {most} are taken; send fewer, or smaller ones"
    with pytest.raises(RequestError, match=says) as large:
        await store.resolved([image(), image(encoded(picture(shade=1)))])
    assert large.value.code == "media_too_large"
    assert len(await store.resolved([image()] * 3)) == 3, "it travels once"


async def test_a_request_that_is_too_large_is_refused_before_the_rest_of_it_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures = [encoded(picture(shade=shade)) for shade in range(40)]
    monkeypatch.setattr(module, "MOST_PAYLOAD", 3 * max(map(len, pictures)))
    store, _ = store_of(ask := Scripted())
    with pytest.raises(RequestError, match="40 images and videos of at least"):
        await store.resolved([image(each) for each in pictures])
    assert len(ask.asked) <= 2 * module.READ_OF_ONE and (store.open, store._open) == (0, {})


async def test_what_has_come_counts_while_the_rest_is_waited_for() -> None:
    """The same picture in two requests counts once, and nothing does when the requests that wait have gone."""
    one, other, late = (encoded(picture(shade=shade)) for shade in (1, 2, 3))
    store, _ = store_of(Scripted(), media_open_memory=len(one) + 5)
    gate = anyio.Event()
    real = store._one

    async def waits(part: Image | Video) -> Prepared:
        if part.place == "late":
            await gate.wait()
        return await real(part)

    store._one = waits  # type: ignore[method-assign]
    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(store.resolved, [image(one), image(late, "late")])
        await settled()
        assert store.open == len(one)
        with pytest.raises(RequestError, match=rf"of {len(one)} bytes, this one has {len(other)} more") as full:
            await store.resolved([image(other)])
        assert (full.value.status, full.value.code) == (503, "queue_full")
        group.cancel_scope.cancel()
    assert (store.open, store._open) == (0, {})
    assert len(await store.resolved([image(other)])) == 1


async def test_open_requests_show_so_much_and_a_thing_counts_once() -> None:
    one, other, third = (encoded(picture(shade=shade)) for shade in (1, 2, 3))
    store, _ = store_of(Scripted(), media_open_memory=len(one) + len(other) + 5)
    shown = [await store.resolved([image(data)]) for data in (one, other, third)]
    for rid in ("a", "b", "c"):
        store.hold(rid, shown[0] * 2)
    store.hold("d", shown[1])
    assert store.open == len(one) + len(other)
    with pytest.raises(RequestError, match=rf"of {store.open} bytes, this one has {len(third)} more") as full:
        store.hold("e", shown[2])
    assert (full.value.status, full.value.code) == (503, "queue_full")
    for rid in ("a", "b", "b", "e"):
        store.release(rid)
    assert store.open == len(one) + len(other)
    store.release("c")
    store.hold("e", shown[2])
    for rid in ("d", "e"):
        store.release(rid)
    assert store.open == 0
    alone, _ = store_of(Scripted(), media_open_memory=1)
    alone.hold("a", shown[0])  # or it could never run


async def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "av" else real(name))
    store, _ = store_of(Scripted())
    assert await store.resolved([image()])
    with pytest.raises(RequestError) as missing:
        await store.resolved([Video(url_of(b"x", "video/mp4"), PLACE)])
    assert missing.value.code == "no_media_library"
    assert f"{PLACE} needs PyAV" in missing.value.message and "pip install 'actorserve[media]'" in missing.value.message


# ── processes ────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def decoding(**options: Any) -> AsyncIterator[tuple[MediaStore, MediaPool]]:
    pool = MediaPool(MediaOptions(media_processes=1, **options), FakeMedia(), start=start)
    async with supervise(pool):
        with anyio.fail_after(60):
            yield store_of(pool.ask, **options)[0], pool


async def refusal(store: MediaStore, part: Image | Video) -> RequestError:
    with pytest.raises(RequestError) as refused:
        await store.resolved([part])
    assert refused.value.param == PLACE and refused.value.message.startswith(PLACE)
    return refused.value


async def test_a_process_decodes_and_prepares() -> None:
    async with decoding() as (store, _):
        still, moving = await store.resolved([image(), Video(url_of(clip(), "video/mp4"), PLACE)])
        assert (still.tokens, still.grid, still.kind) == (4, (1, 48, 64), "image")
        assert still.payload == picture().tobytes()
        assert (moving.tokens, moving.grid, moving.kind) == (10, (5, 48, 64), "video")
        assert moving.times == (0.0, 0.2, 0.4, 0.6, 0.8)
        error = await refusal(store, image(b"no picture"))
        assert (error.status, error.code) == (400, "invalid_media") and "is no image that can be read" in error.message


async def test_what_ends_a_process_ends_nothing_else() -> None:
    async with decoding() as (store, pool):
        assert (await store.resolved([image()]))[0].tokens == 4
        for width, code, says in (
            (DEADLY, "invalid_media", "ended the process that was to decode it"),
            (WRONG, "invalid_media", "ended the process that was to decode it"),
            (FAULTY, "media_too_large", "takes more memory to decode than there is for one"),
            (HUGE, "media_too_large", "takes 268435456 bytes as the model reads it, and at most 234881024 are taken"),
            (SLOW, "media_timeout", "took over 1 s to decode, which is the limit (--media-seconds)"),
        ):
            pool._seconds = 1.0 if width == SLOW else 30.0
            error = await refusal(store, image(encoded(picture(width, 8))))
            assert (error.status, error.code) == (400, code) and says in error.message
            pool._seconds = 30.0
            assert (await store.resolved([image(encoded(picture(shade=width)))]))[0].tokens == 4


async def test_decoders_write_nothing_into_the_log() -> None:
    odd = bytearray(encoded(picture(), "TIFF", compression="tiff_lzw"))
    odd[20:40] = bytes(range(200, 220))  # libtiff says a line for each such place
    reading, writing = os.pipe()
    pool = MediaPool(MediaOptions(), FakeMedia(), start=lambda: start(writing))
    async with supervise(pool):
        for data in (bytes(odd), clip()[:1000]):
            with pytest.raises(RequestError):
                await store_of(pool.ask)[0].resolved([image(data)])
    os.close(writing)
    with os.fdopen(reading, "rb") as log:
        assert log.read() == b""


async def test_bounds_of_options_are_those_of_the_processes() -> None:
    async with decoding(media_pixels=64 * 48, media_video_pixels=4 * 64 * 48) as (store, _):
        assert (await store.resolved([image()]))[0].tokens == 4
        error = await refusal(store, image(encoded(picture(65, 48))))
        assert "is 65 × 48 = 3120 pixels, and at most 3072 are taken (--media-pixels)" in error.message
        error = await refusal(store, Video(url_of(clip(), "video/mp4"), PLACE))
        assert "has 5 frames to look at" in error.message and "--media-video-pixels" in error.message


async def test_a_processor_that_cannot_be_loaded_is_an_answer() -> None:
    async with decoding() as (store, pool):
        pool._boot = MediaBoot(b"no pickle", 1, 1)
        error = await refusal(store, image())
    assert "the model's processor cannot be loaded here" in error.message


async def test_a_processor_may_be_in_a_plugin_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "mine_sees.py"
    path.write_text(
        "from engine.messages.media import Prepared\n"
        "API = 1\n"
        "class Mine:\n"
        "    def prepare(self, frames):\n"
        "        return Prepared(b'mine', (1, 1, 1), 1, frames.digest)\n"
    )
    Plugins.load((str(path),))
    pool = MediaPool(MediaOptions(), sys.modules["mine_sees"].Mine(), (str(path),))
    del sys.modules["mine_sees"]
    async with supervise(pool):
        (prepared,) = await store_of(pool.ask)[0].resolved([image()])
    assert prepared.payload == b"mine"


async def test_no_process_at_all_is_an_answer() -> None:
    def none() -> Any:
        raise OSError("no more processes")

    pool = MediaPool(MediaOptions(), FakeMedia(), start=none)
    async with supervise(pool):
        error = await refusal(store_of(pool.ask)[0], image())
    assert (error.status, error.code) == (503, "media_process_lost") and "no more processes" in error.message


def test_there_is_at_least_one_process() -> None:
    assert [processes(cores) for cores in (1, 2, 8, 64)] == [1, 1, 4, 8]
