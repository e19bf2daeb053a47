"""The text of a Hugging Face directory against transformers' AutoTokenizer on the same files, whatever they say and
however old their form is: which tokens there are, which are special, what begins a text, what a chat becomes."""

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from engine.conversation.parts import read_messages
from engine.errors import ConfigError
from engine.text.tokenizer import Text
from engine_plugins.checkpoints.safetensors.checkpoint import SafetensorsCheckpoint

TEXTS = ["a<|new|>b", "<s>hi</s> <img> é", " x <|new|> <pad><unk>y</s>", "<extra>\n<extra> <s>", ""]
CHAT = [{"role": "user", "content": "x<|new|>y"}, {"role": "assistant", "content": "<img>é"}]
MARKS = ("bos_token", "eos_token", "pad_token", "unk_token", "image_token", "audio_token")
TEMPLATE = "".join(f"{{% if {mark} is defined %}}[{{{{ {mark} }}}}]{{% endif %}}" for mark in MARKS)
TEMPLATE += "{% for m in messages %}{{ m.content }}{% endfor %}"
TOKENS = ["<s>", "</s>", "<|new|>", "<img>", "<pad>", "<extra>", "e"]


def write(folder: Path, own: list[str], begins: bool, files: dict[str, Any]) -> Path:
    """A directory with a byte-level tokenizer.json whose added tokens are `own`, and `files` by name."""
    for path in folder.glob("*.json"):
        path.unlink()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: id for id, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in own])
    if begins and own:
        first = (own[0], tokenizer.token_to_id(own[0]))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{own[0]} $A", special_tokens=[first])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "granite",
    }  # has no tokenizer class
    for name, content in ({"config.json": config} | files).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def same(folder: Path) -> None:
    """What we read is what transformers reads."""
    spec, peer = SafetensorsCheckpoint.open(str(folder)).text(), AutoTokenizer.from_pretrained(folder)
    text = Text(spec)
    ours, theirs = spec.tokenizer.get_added_tokens_decoder(), peer.added_tokens_decoder
    assert {id: repr(token) for id, token in ours.items()} == {id: repr(token) for id, token in theirs.items()}
    named = {"bos_token": spec.bos_token, "eos_token": spec.eos_token} | spec.special_tokens
    assert {name: token for name, token in named.items() if token} == peer.special_tokens_map
    assert spec.eos_ids == (() if peer.eos_token_id is None else (peer.eos_token_id,))
    for words in TEXTS:
        assert text.encode(words) == peer(words).input_ids
        ids = peer(words, add_special_tokens=False).input_ids
        assert text.encode(words, add_special_tokens=False) == ids
        assert text.decode(ids) == peer.decode(ids, skip_special_tokens=True)
    if spec.chat_template is not None:
        assert text.render_chat(read_messages(CHAT)) == peer.apply_chat_template(
            CHAT, tokenize=False, add_generation_prompt=True
        )
        assert (
            text.encode_chat(read_messages(CHAT))
            == peer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
        )


def config(**terms: Any) -> dict[str, Any]:
    return {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, **terms}


def listed(*tokens: str, first: int = 256, **flags: bool) -> dict[str, Any]:
    options = {"special": True, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {str(first + i): {"content": token, **options, **flags} for i, token in enumerate(tokens)}


SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
DIRECTORIES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "all in tokenizer.json": (["<s>", "</s>"], {"tokenizer_config.json": config(**SPECIALS)}),
    "added_tokens_decoder has more": (
        ["<s>", "</s>"],
        {"tokenizer_config.json": config(**SPECIALS, added_tokens_decoder=listed("<s>", "</s>", "<|new|>"))},
    ),
    "added_tokens_decoder of other flags": (
        ["<s>", "</s>"],
        {"tokenizer_config.json": config(**SPECIALS, added_tokens_decoder=listed("<s>", "</s>", "<img>", lstrip=True))},
    ),
    "added_tokens.json and special_tokens_map.json": (
        ["<s>", "</s>"],
        {
            "tokenizer_config.json": config(),
            "added_tokens.json": {"<|new|>": 258, "<img>": 259},
            "special_tokens_map.json": {**SPECIALS, "additional_special_tokens": ["<img>"]},
        },
    ),
    "the map is not read beside added_tokens_decoder": (
        ["<s>", "</s>"],
        {
            "tokenizer_config.json": config(eos_token="</s>", added_tokens_decoder=listed("<s>", "</s>")),
            "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "<s>"},
            "added_tokens.json": {"<|new|>": 258},
        },
    ),
    "objects in the map": (
        ["<s>", "</s>"],
        {
            "tokenizer_config.json": config(),
            "special_tokens_map.json": {
                "bos_token": {"content": "<s>", "lstrip": False, "rstrip": False, "single_word": False},
                "eos_token": {"content": "</s>", "lstrip": True, "rstrip": False, "single_word": False},
                "pad_token": {"content": "<pad>", "rstrip": True, "normalized": False},
            },
        },
    ),
    "extra tokens": (["<s>"], {"tokenizer_config.json": config(extra_special_tokens=["<img>", "<extra>"])}),
    "additional tokens": (["<s>"], {"tokenizer_config.json": config(additional_special_tokens=["<|new|>"])}),
    "extra tokens with names": (
        ["<s>"],
        {"tokenizer_config.json": config(extra_special_tokens={"image_token": "<img>", "audio_token": "<extra>"})},
    ),
    "a token of a name of its own": (
        ["<s>"],
        {"tokenizer_config.json": config(image_token="<img>", pad_token="<pad>")},
    ),
    "model_specific_special_tokens": (
        ["<s>"],
        {"tokenizer_config.json": config(model_specific_special_tokens={"image_token": "<img>"})},
    ),
    "split_special_tokens": (["<s>", "</s>"], {"tokenizer_config.json": config(**SPECIALS, split_special_tokens=True)}),
    "a named token is a letter": (["<s>"], {"tokenizer_config.json": config(eos_token="e", unk_token="<unk>")}),
    "add_bos_token": (["<s>", "</s>"], {"tokenizer_config.json": config(**SPECIALS, add_bos_token=True)}),
    "add_eos_token": (["<s>", "</s>"], {"tokenizer_config.json": config(**SPECIALS, add_eos_token=True)}),
    "no tokenizer_config.json": (["<s>", "</s>"], {"special_tokens_map.json": SPECIALS}),
}


@pytest.mark.parametrize("begins", [False, True], ids=["plain", "begins"])
@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_reads_as_in_transformers(tmp_path: Path, name: str, begins: bool) -> None:
    own, files = DIRECTORIES[name]
    same(write(tmp_path, own, begins, files))


FLAGS = st.fixed_dictionaries({}, optional={key: st.booleans() for key in ("lstrip", "rstrip", "special")})
SOME = st.lists(st.sampled_from(TOKENS), unique=True, max_size=4)
NAMED = st.fixed_dictionaries({}, optional=dict.fromkeys(MARKS, st.sampled_from(TOKENS)))
ORDER = st.permutations(TOKENS).map(lambda tokens: tokens[:4])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(own=SOME, begins=st.booleans(), named=NAMED, data=st.data())
def test_any_directory_reads_as_in_transformers(tmp_path: Path, own, begins, named, data) -> None:
    terms, files = dict(named), {}
    if data.draw(st.booleans()):
        flags = data.draw(FLAGS)
        terms["added_tokens_decoder"] = listed(*data.draw(ORDER), first=data.draw(st.integers(250, 258)), **flags)
    if data.draw(st.booleans()):
        terms[data.draw(st.sampled_from(["extra_special_tokens", "additional_special_tokens"]))] = data.draw(SOME)
    if data.draw(st.booleans()):
        files["added_tokens.json"] = {token: 256 + i for i, token in enumerate(data.draw(ORDER))}
    if data.draw(st.booleans()):
        older = {key: token for key, token in data.draw(NAMED).items() if key in MARKS[:4]}
        flags = {"lstrip": False, "rstrip": data.draw(st.booleans()), "normalized": False, "single_word": False}
        if data.draw(st.booleans()):
            older = {key: {"content": token, **flags} for key, token in older.items()}
        if data.draw(st.booleans()):
            older["additional_special_tokens"] = data.draw(SOME)
        files["special_tokens_map.json"] = older
    files["tokenizer_config.json"] = config(**terms)
    note(json.dumps(files) + str(own))
    same(write(tmp_path, own, begins, files))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": {"content": "a"}}},
            "where a token belongs",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"5": {"text": "a"}}},
            "where a token belongs",
        ),
        ("tokenizer_config.json", {"bos_token": 5}, "where a token belongs"),
        ("tokenizer_config.json", {"extra_special_tokens": 5}, "where a token belongs"),
        ("added_tokens.json", {"a": "x"}, r"added_tokens\.json has something else"),
        ("added_tokens.json", [1], r"added_tokens\.json cannot be read"),
        ("special_tokens_map.json", {"bos_token": [1]}, r"special_tokens_map\.json has something else"),
        ("special_tokens_map.json", "{", r"special_tokens_map\.json cannot be read"),
    ],
)
def test_a_file_of_tokens_that_is_none_is_named(tmp_path: Path, name: str, content: Any, says: str) -> None:
    write(tmp_path, ["<s>"], False, {name: content})
    with pytest.raises(ConfigError, match=says):
        SafetensorsCheckpoint.open(str(tmp_path)).text()


def test_added_tokens_that_the_library_would_number_anew_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, ["<s>", "</s>"], False, {}) / "tokenizer.json"
    said = json.loads(path.read_text())
    assert [token["id"] for token in said["added_tokens"]] == [256, 257]
    said["added_tokens"][1]["id"] = 300
    path.write_text(json.dumps(said))
    with pytest.raises(ConfigError, match=r"added token '</s>' the id 300, and tokenizers reads it as 257"):
        SafetensorsCheckpoint.open(str(tmp_path)).text()
    said["model"]["vocab"] |= {"<s>": 256, "</s>": 300}  # the remedy that the message names
    path.write_text(json.dumps(said))
    tokenizer = SafetensorsCheckpoint.open(str(tmp_path)).text().tokenizer
    assert (tokenizer.encode("</s>").ids, tokenizer.decode([300], skip_special_tokens=False)) == ([300], "</s>")


# ── named templates ──────────────────────────────────────────────────────────────────────────

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
ONE, OTHER = "one{{ bos_token }}{{ messages[0].content }}", "tools{% for t in tools %}{{ t | tojson }}{% endfor %}"
NAMED_TEMPLATES: dict[str, dict[str, Any]] = {
    "a list": {
        "tokenizer_config.json": config(
            **SPECIALS,
            chat_template=[{"name": "default", "template": ONE}, {"name": "tool_use", "template": OTHER}],
        )
    },
    "files": {
        "tokenizer_config.json": config(**SPECIALS),
        "chat_template.jinja": ONE,
        "additional_chat_templates/tool_use.jinja": OTHER,
    },
    "one file": {"tokenizer_config.json": config(**SPECIALS), "chat_template.jinja": ONE},
}


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_a_conversation_with_tools_takes_the_template_for_them(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, ["<s>", "</s>"], False, NAMED_TEMPLATES[name])
    text = Text(SafetensorsCheckpoint.open(str(folder)).text())
    peer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "x"}]
    for tools in (None, [TOOL]):
        if name == "one file" and tools:
            continue  # a template that says nothing of tools gets a message that does
        expected = peer.apply_chat_template(messages, tools=tools, tokenize=False)
        assert text.render_chat(read_messages(messages), tools=tools) == expected
    if name != "one file":
        expected = peer.apply_chat_template(messages, chat_template="tool_use", tools=[TOOL], tokenize=False)
        assert text.render_chat(read_messages(messages), chat_template="tool_use", tools=[TOOL]) == expected
        assert Text(text.spec, "mine").render_chat(read_messages(messages)) == "mine"
