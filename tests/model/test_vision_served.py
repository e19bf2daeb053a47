"""A picture's whole way: a file, base64 or the page, HTTP, a model that sees, and what transformers makes of it: the
ids that it answers, and the log-probabilities of what is chosen behind it."""

import base64
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import pytest
import torch
from msgspec import Struct
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
from engine.conversation.parts import Image as Picture
from engine.conversation.parts import Message, Text
from engine.lang import Server, State, assistant, decide, function, image, select, user
from engine.runtime.decisions import Option, Question, job_of

COUNT = 12  # tokens of a reply
SIZE = {"size": {"shortest_edge": 64, "longest_edge": 2048}}
SPECIAL = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")  # from IMAGE on
SEEN = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    "{% for m in messages %}{{ '=' if m.role == 'assistant' else '' }}{% for part in m.content %}"
    f"{{{{ part.text if part.type == 'text' else '{SEEN}' }}}}"
    "{% endfor %}{% endfor %}{{ '=' if add_generation_prompt else '' }}"
)
# Their sizes in the log of the page.
PICTURES = """
const images = [...$("log").querySelectorAll(".m.user img")];
await Promise.all(images.map(each => each.decode()));
return images.map(each => [each.naturalWidth, each.naturalHeight]);
"""


def with_text(folder: Path) -> Path:
    """The checkpoint in `folder` with a tokenizer of a letter a token, and a chat template."""
    letters = [chr(0x21 + index) for index in range(IMAGE)]
    letters[0], letters[2] = "\u0120\u010a"  # a space and the end of a line, as byte-level tokenizers have them
    vocabulary = {letter: index for index, letter in enumerate(letters)} | {"{": 94, "}": 95}
    vocabulary |= {name: IMAGE + at for at, name in enumerate(SPECIAL)}
    words = Tokenizer(models.BPE(vocabulary, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    words.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": vocabulary["`"]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


class Theirs(Struct, frozen=True):
    """A model of transformers, with its processor and its tokenizer."""

    model: Any
    processor: Any
    words: Any

    def given(self, text: str, images: list[Any]) -> dict[str, Any]:
        """What the model takes for `text`, in which each image's place has grown as the processor says."""
        shown = self.processor(images=images, return_tensors="pt")
        pieces = text.split("<|image_pad|>")
        sizes = shown["image_grid_thw"].prod(1) // 4
        whole = pieces[0] + "".join("<|image_pad|>" * int(n) + rest for n, rest in zip(sizes, pieces[1:], strict=True))
        ids = self.words(whole, return_tensors="pt")["input_ids"]
        return {**shown, "input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int()}

    @torch.inference_mode()
    def reply(self, text: str, images: list[Any]) -> list[int]:
        """The greedy ids behind `text`."""
        given = self.given(text, images)
        made = self.model.generate(**given, min_new_tokens=COUNT, max_new_tokens=COUNT, do_sample=False)
        return made[0, given["input_ids"].shape[1] :].tolist()

    @torch.inference_mode()
    def likely(self, text: str, ids: list[int], images: list[Any]) -> torch.Tensor:
        """The log-probabilities [n, vocabulary] where each of n `ids` comes behind `text`."""
        given = self.given(text, images)
        given["input_ids"] = torch.cat((given["input_ids"], torch.tensor([ids])), 1)
        given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).int()
        return self.model(**given).logits[0, -len(ids) - 1 : -1].log_softmax(-1)

    @torch.inference_mode()
    def scores(self, text: str, choice: str, images: list[Any]) -> list[float]:
        """The log-probability of each letter of `choice` behind `text`."""
        given = self.given(text + choice, images)
        likely = self.model(**given).logits[0].log_softmax(-1)
        ids = given["input_ids"][0]
        return [likely[at - 1, ids[at]].item() for at in range(len(ids) - len(choice), len(ids))]

    def shares(self, text: str, choices: list[str], images: list[Any]) -> list[float]:
        """The probability of each of `choices`, one of which comes."""
        weights = [math.exp(sum(self.scores(text, choice, images))) for choice in choices]
        return [weight / sum(weights) for weight in weights]


def url_of(image: Any) -> str:
    held = io.BytesIO()
    image.save(held, "PNG")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"


def part_of(image: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url_of(image)}}


class Sight(Struct, frozen=True):
    """The same model, theirs and ours, the latter in this process and over HTTP, and two pictures."""

    theirs: Theirs
    engine: Engine
    server: Server
    images: list[Any]


@pytest.fixture(scope="module")
def sight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sight]:
    model, processor = qwen2_5_vl(), Qwen2VLImageProcessorPil(**SIZE, patch_size=4)
    folder = with_text(saved(model, tmp_path_factory.mktemp("sight"), image_processor=processor.to_dict()))
    words = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    images = [Image.fromarray(picture(seed, *shape).pixels[0]) for seed, shape in ((1, (40, 52)), (2, (70, 33)))]
    with Engine(model=str(folder), device="cpu", media_processes=1) as engine, served(engine) as server:
        yield Sight(Theirs(model, processor, words), engine, server, images)


@pytest.fixture
def client(sight: Sight) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{sight.server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def test_data_urls_over_http_are_answered_as_by_transformers(sight: Sight, client: OpenAI) -> None:
    orders = [sight.images, sight.images[::-1]]
    wanted = [sight.theirs.reply(f"see{SEEN}and{SEEN}=", each) for each in orders]
    assert wanted[0] != wanted[1] and len(set(wanted[0])) > 3
    for (first, second), ids in zip(orders, wanted, strict=True):
        see, also = ({"type": "text", "text": text} for text in ("see", "and"))
        messages: Any = [{"role": "user", "content": [see, part_of(first), also, part_of(second)]}]
        reply = client.chat.completions.create(
            model=sight.server.model_name,
            messages=messages,
            temperature=0,
            max_tokens=COUNT,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        assert reply.choices[0].model_extra["token_ids"] == ids  # type: ignore[index]


ANIMALS = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay")
SHOWS: Any = {
    "type": "object",
    "properties": {"animal": {"enum": ANIMALS}},
    "required": ["animal"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("tool", [False, True])
def test_a_grammar_beside_a_picture_leaves_the_model_its_choice(sight: Sight, client: OpenAI, tool: bool) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "shows", "schema": SHOWS, "strict": True}}
    show = {"type": "function", "function": {"name": "show", "parameters": SHOWS}}
    forced = {"tools": [show], "tool_choice": {"type": "function", "function": {"name": "show"}}}
    asked: Any = forced if tool else {"response_format": schema}
    said = set()
    for shown in sight.images:
        messages: Any = [{"role": "user", "content": [part_of(shown), {"type": "text", "text": "see"}]}]
        (choice,) = client.chat.completions.create(
            model=sight.server.model_name,
            messages=messages,
            temperature=0,
            max_tokens=100,
            extra_body={"return_token_ids": True},
            **asked,
        ).choices
        (call,) = choice.message.tool_calls or [None]
        assert choice.finish_reason == ("tool_calls" if tool else "stop") and (call is not None) == tool
        animal = json.loads(choice.message.content or call.function.arguments)["animal"]  # type: ignore[union-attr]
        ids = choice.model_extra["token_ids"]  # type: ignore[index]
        at = sight.theirs.words.decode(ids).rindex(f'"{animal}"') + 1  # where it is chosen, by its first letter
        likely = sight.theirs.likely(f"{'show' if tool else ''}{SEEN}see=", ids, [shown])[at]
        assert animal == max(ANIMALS, key=lambda one: likely[sight.theirs.words.convert_tokens_to_ids(one[0])])
        said.add(animal)
    assert len(said) == 2  # it looks at the picture


def test_two_streams_about_a_picture_have_the_likelihoods_of_transformers(sight: Sight, client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": [part_of(sight.images[0]), {"type": "text", "text": "see"}]}]
    asked: Any = {"model": sight.server.model_name, "messages": messages, "n": 2, "seed": 3, "logprobs": True}
    asked |= {"max_tokens": COUNT, "extra_body": {"ignore_eos": True}}
    said: list[list[tuple[str, float]]] = [[], []]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            content = choice.logprobs and choice.logprobs.content
            said[choice.index] += [(each.token, each.logprob) for each in content or []]
    assert said[0] != said[1]
    for told in said:
        ids = sight.theirs.words("".join(token for token, _ in told))["input_ids"]
        assert len(ids) == COUNT and IMAGE not in ids
        likely = sight.theirs.likely(f"{SEEN}see=", ids, sight.images[:1])
        wanted = likely.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
        assert [own for _, own in told] == pytest.approx(wanted, abs=1e-3)


QUESTIONS = (
    Question("predicate", "Isitacat."),
    Question("choice", "Whatisit.", (Option("dog"), Option("cat"), Option("fox"))),
)


def rendered(question: Question) -> str:
    """The prompt of `question` about a picture, as the template writes it."""
    said = Message("user", (Text("see"), Picture("", "")))
    (whole,) = job_of([said], question).messages or []
    return "".join(part.text if isinstance(part, Text) else SEEN for part in whole.parts) + "="  # type: ignore[union-attr]


def test_decisions_about_a_picture_have_the_probabilities_of_transformers(sight: Sight, client: OpenAI) -> None:
    for shown in sight.images:
        url = part_of(shown)["image_url"]["url"]
        content: Any = [{"type": "input_text", "text": "see"}, {"type": "input_image", "image_url": url}]
        yes, choice = (sight.theirs.shares(rendered(question), list(question.texts), [shown]) for question in QUESTIONS)
        answer = client.decisions.create(
            model=sight.server.model_name,
            input=[{"role": "user", "content": content}],
            questions=[
                {"type": "predicate", "instructions": "Isitacat."},
                {
                    "type": "choice",
                    "instructions": "Whatisit.",
                    "choices": [{"value": v} for v in ("dog", "cat", "fox")],
                },
            ],
        )
        first, second = answer.answers
        assert first.type == "predicate" and first.probability == pytest.approx(yes[0], abs=1e-4)
        assert second.type == "choice"
        assert [each.probability for each in second.probabilities] == pytest.approx(choice, abs=1e-4)
        assert answer.usage.input_tokens_details.cached_tokens >= 16, "the picture is read once, for both questions"


def test_programs_decide_and_select_behind_a_picture(sight: Sight) -> None:
    @function
    def program(s: State, source: bytes) -> None:
        s += user("see" + image(source)) + decide("cat", "Isitacat.")
        s += assistant(select("kind", ["dog", "cat", "fox"]))

    for backend in (sight.engine, sight.server):
        for shown in sight.images:
            held = io.BytesIO()
            shown.save(held, "PNG")
            s = program.run(held.getvalue(), backend=backend)
            yes, _ = sight.theirs.shares(rendered(QUESTIONS[0]), ["Yes", "No"], [shown])
            assert s["cat"].probabilities[True] == pytest.approx(yes, abs=1e-4)
            for told, choice in zip(s.get_meta_info("kind").scores, ["dog", "cat", "fox"], strict=True):
                assert told.logprobs == pytest.approx(sight.theirs.scores(f"see{SEEN}=", choice, [shown]), abs=1e-3)
    assert sight.engine.inner.front.media is not None and sight.engine.inner.front.media.open == 0


async def shown_in_the_page(path: str, sight: Sight) -> dict[str, Any]:
    """Drop the first of the pictures into the page and paste the second; what the page says of the reply."""
    settings = {"numbers": {"temperature": 0, "max_tokens": COUNT}, "more": '{"ignore_eos": true}'}
    with anyio.fail_after(60):
        async with open_tab(path) as tab:
            await tab.open(f"{sight.server.url}/")
            await tab.run(WAIT + "await until(() => server.sees);")
            for event, image in zip(("drop", "paste"), sight.images, strict=True):
                await tab.run(WAIT + GIVE.replace("EVENT", event).replace("DATA", url_of(image).split(",")[1]))
            found = await say(tab, "see", **settings)
            found["pictures"] = await tab.run(PICTURES)
            found["errors"], found["hosts"] = tab.errors, {urlsplit(each).netloc for each in tab.asked}
            if folder := os.environ.get("ENGINE_SCREENSHOTS"):
                await tab.picture(Path(folder) / "picture.png", 900, 620)
    return found


def test_a_picture_dropped_into_the_page_is_seen(sight: Sight) -> None:
    path = chromium()
    ids = sight.theirs.reply(f"{SEEN}{SEEN}see=", sight.images)
    assert ids != sight.theirs.reply(f"{SEEN}{SEEN}see=", sight.images[::-1])
    found = anyio.run(shown_in_the_page, path, sight)
    node = found["node"]
    assert node["text"] == sight.theirs.words.decode(ids) and node["usage"]["completion_tokens"] == COUNT
    assert found["chunks"] > 3  # it streams
    tokens = int(sight.theirs.processor(images=sight.images, return_tensors="pt")["image_grid_thw"].prod(1).sum()) // 4
    assert node["usage"]["prompt_tokens_details"]["image_tokens"] == tokens
    assert f"{COUNT} tokens · " in found["shown"] and f", {tokens} of pictures" in found["shown"]
    assert found["pictures"] == [[52, 40], [33, 70]]
    assert (found["errors"], found["hosts"] - {""}) == ([], {urlsplit(sight.server.url).netloc})
