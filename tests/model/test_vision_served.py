"""A picture's whole way: a file, base64, HTTP, a model that sees, and the ids that transformers answers."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import torch
from openai import OpenAI
from PIL import Image
from real_server import served
from seeing import IMAGE, picture, qwen2_5_vl, saved
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

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


def part_of(image: Any) -> dict[str, Any]:
    held = io.BytesIO()
    image.save(held, "PNG")
    data = base64.b64encode(held.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def test_data_urls_over_http_are_answered_as_by_transformers(tmp_path: Path) -> None:
    theirs, processor = qwen2_5_vl(), Qwen2VLImageProcessorPil(**SIZE, patch_size=4)
    folder = with_text(saved(theirs, tmp_path, image_processor=processor.to_dict()))
    words = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    images = [Image.fromarray(picture(seed, *shape).pixels[0]) for seed, shape in ((1, (40, 52)), (2, (70, 33)))]
    orders = [images, images[::-1]]
    wanted = [their_reply(theirs, processor, words, f"see{SEEN}and{SEEN}=", each) for each in orders]
    assert wanted[0] != wanted[1] and len(set(wanted[0])) > 3
    with (
        Engine(model=str(folder), device="cpu", media_processes=1) as engine,
        served(engine) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client,
    ):
        for (first, second), ids in zip(orders, wanted, strict=True):
            see, also = ({"type": "text", "text": text} for text in ("see", "and"))
            messages: Any = [{"role": "user", "content": [see, part_of(first), also, part_of(second)]}]
            reply = client.chat.completions.create(
                model=folder.name,
                messages=messages,
                temperature=0,
                max_tokens=COUNT,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            assert reply.choices[0].model_extra["token_ids"] == ids  # type: ignore[index]
