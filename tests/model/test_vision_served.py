"""A picture's whole way: a file, base64 or the page, HTTP, a model that sees, and the ids that transformers answers."""

import base64
import io
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import anyio
import pytest
import torch
from openai import OpenAI
from paging import GIVE, WAIT, chromium, say
from PIL import Image
from real_server import served
from seeing import IMAGE, picture, qwen2_5_vl, saved
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bench.lib.chromium import open_tab
from engine import Engine

COUNT = 12  # tokens of a reply
SIZE = {"size": {"shortest_edge": 64, "longest_edge": 2048}}
SPECIAL = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")  # from IMAGE on
SEEN = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATE = (
    "{% for m in messages %}{% for part in m.content %}"
    f"{{{{ part.text if part.type == 'text' else '{SEEN}' }}}}"
    "{% endfor %}{% endfor %}="
)
# Their sizes in the log of the page.
PICTURES = """
const images = [...$("log").querySelectorAll(".m.user img")];
await Promise.all(images.map(each => each.decode()));
return images.map(each => [each.naturalWidth, each.naturalHeight]);
"""


def with_text(folder: Path) -> Path:
    """The checkpoint in `folder` with a tokenizer of a letter a token, and a chat template."""
    vocabulary = {chr(0x21 + index): index for index in range(IMAGE)} | {
        name: IMAGE + at for at, name in enumerate(SPECIAL)
    }
    words = Tokenizer(models.BPE(vocabulary, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@torch.inference_mode()
def their_reply(theirs: Any, processor: Any, words: Any, text: str, images: list[Any]) -> list[int]:
    """The greedy ids of transformers for `text`, in which each image's place has grown as its processor says."""
    shown = processor(images=images, return_tensors="pt")
    pieces = text.split("<|image_pad|>")
    sizes = shown["image_grid_thw"].prod(1) // 4
    whole = pieces[0] + "".join("<|image_pad|>" * int(n) + rest for n, rest in zip(sizes, pieces[1:], strict=True))
    ids = words(whole, return_tensors="pt")["input_ids"]
    given = {**shown, "input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int()}
    made = theirs.generate(**given, min_new_tokens=COUNT, max_new_tokens=COUNT, do_sample=False)
    return made[0, ids.shape[1] :].tolist()


def url_of(image: Any) -> str:
    held = io.BytesIO()
    image.save(held, "PNG")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"


def part_of(image: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url_of(image)}}


class Seeing(NamedTuple):
    """A server of a model that sees, and what transformers answers for it."""

    url: str
    model: str
    words: Any
    processor: Any
    reply: Callable[[str, list[Any]], list[int]]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeing]:
    theirs, processor = qwen2_5_vl(), Qwen2VLImageProcessorPil(**SIZE, patch_size=4)
    folder = with_text(saved(theirs, tmp_path_factory.mktemp("seeing"), image_processor=processor.to_dict()))
    words = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    with Engine(model=str(folder), device="cpu", media_processes=1) as engine, served(engine) as server:
        yield Seeing(server.url, folder.name, words, processor, partial(their_reply, theirs, processor, words))


def pictures() -> list[Any]:
    return [Image.fromarray(picture(seed, *shape).pixels[0]) for seed, shape in ((1, (40, 52)), (2, (70, 33)))]


def test_data_urls_over_http_are_answered_as_by_transformers(seeing: Seeing) -> None:
    images = pictures()
    orders = [images, images[::-1]]
    wanted = [seeing.reply(f"see{SEEN}and{SEEN}=", each) for each in orders]
    assert wanted[0] != wanted[1] and len(set(wanted[0])) > 3
    with OpenAI(base_url=f"{seeing.url}/v1", api_key="-", max_retries=0) as client:
        for (first, second), ids in zip(orders, wanted, strict=True):
            see, also = ({"type": "text", "text": text} for text in ("see", "and"))
            messages: Any = [{"role": "user", "content": [see, part_of(first), also, part_of(second)]}]
            reply = client.chat.completions.create(
                model=seeing.model,
                messages=messages,
                temperature=0,
                max_tokens=COUNT,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            assert reply.choices[0].model_extra["token_ids"] == ids  # type: ignore[index]


async def shown_in_the_page(path: str, seeing: Seeing, images: list[Any]) -> dict[str, Any]:
    """Drop the first of `images` into the page and paste the second; what the page says of the reply."""
    settings = {"numbers": {"temperature": 0, "max_tokens": COUNT}, "more": '{"ignore_eos": true}'}
    with anyio.fail_after(60):
        async with open_tab(path) as tab:
            await tab.open(f"{seeing.url}/")
            await tab.run(WAIT + "await until(() => server.sees);")
            for event, image in zip(("drop", "paste"), images, strict=True):
                await tab.run(WAIT + GIVE.replace("EVENT", event).replace("DATA", url_of(image).split(",")[1]))
            found = await say(tab, "see", **settings)
            found["pictures"] = await tab.run(PICTURES)
            found["errors"], found["hosts"] = tab.errors, {urlsplit(each).netloc for each in tab.asked}
            if folder := os.environ.get("ENGINE_SCREENSHOTS"):
                await tab.picture(Path(folder) / "picture.png", 900, 620)
    return found


def test_a_picture_dropped_into_the_page_is_seen(seeing: Seeing) -> None:
    path = chromium()
    images = pictures()
    ids = seeing.reply(f"{SEEN}{SEEN}see=", images)
    assert ids != seeing.reply(f"{SEEN}{SEEN}see=", images[::-1])
    found = anyio.run(shown_in_the_page, path, seeing, images)
    node = found["node"]
    assert node["text"] == seeing.words.decode(ids) and node["usage"]["completion_tokens"] == COUNT
    assert found["chunks"] > 3  # it streams
    tokens = int(seeing.processor(images=images, return_tensors="pt")["image_grid_thw"].prod(1).sum()) // 4
    assert node["usage"]["prompt_tokens_details"]["image_tokens"] == tokens
    assert f"{COUNT} tokens · " in found["shown"] and f", {tokens} of pictures" in found["shown"]
    assert found["pictures"] == [[52, 40], [33, 70]]
    assert (found["errors"], found["hosts"] - {""}) == ([], {urlsplit(seeing.url).netloc})
