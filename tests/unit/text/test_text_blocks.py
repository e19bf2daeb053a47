"""How many tokens hold each block of a prompt: exactly where text and tokens allow it, and never too few."""

from array import array
from bisect import bisect_left
from typing import Any

import pytest
from house import prompt as generate
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from engine.actors.tokenizer import Admission
from engine.conversation.canonical import BLOCK, chained, of_messages, space_of, written
from engine.conversation.parts import Message, said
from engine.messages.request import Generate
from engine.params.sampling import SamplingParams
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.registry import Plugins
from engine.text.blocks import Widths, anchors, blocks_of, is_plain, places, token_ends
from engine.text.decoding import Spelling
from engine.text.tokenizer import Text

ALPHABET = "ab é\n€😀"
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>\n{% endfor %}"
TOLD = "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{{ tools | tojson }}" + CHATML
texts = st.text(st.sampled_from("ab .\n"), max_size=60).map(lambda text: text * 3)


def byte_level() -> Tokenizer:
    """Bytes, and a few tokens of several."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("ab", "ab"), ("Ġ", "a"), ("Ã", "©"), ("ð", "Ł")]
    vocabulary = {token: id for id, token in enumerate([*letters, *("".join(merge) for merge in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Characters with a space in front, as Llama 2 has them, and bytes for those that have no token."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "\n", "é"]
    tokenizer = Tokenizer(
        models.BPE(
            {token: id for id, token in enumerate(tokens)},
            [("▁", "a"), ("a", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def dropping() -> Tokenizer:
    """Leaves out accents."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    return tokenizer


TOKENIZERS = {make.__name__: make() for make in (byte_level, sentencepiece, dropping)}


@given(st.sampled_from(sorted(TOKENIZERS)), st.text(st.sampled_from(ALPHABET), min_size=1, max_size=80), st.data())
@settings(max_examples=200)
def test_ends_are_never_too_early(name: str, prompt: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    encoding = tokenizer.encode(prompt, add_special_tokens=False)
    ends = sorted(data.draw(st.lists(st.integers(1, len(prompt)), max_size=5)))
    found = token_ends(prompt, encoding.ids, Widths(Spelling(tokenizer)), ends)
    begins = [begin for begin, _ in encoding.offsets]
    right = [bisect_left(begins, end) for end in ends]  # tokens that begin before the end
    assert all(one >= other for one, other in zip(found, right, strict=True))
    assert found == sorted(found) and all(end <= len(encoding.ids) for end in found)
    if name == "byte_level" and prompt.isascii():
        assert found == right


@pytest.fixture(scope="module")
def chat() -> Text:
    return Text(open_checkpoint(Plugins.load(()), "smollm2-135m").text())


def test_ends_are_those_of_the_tokenizer(chat: Text) -> None:
    messages = [said("system", "Be naïve, and short. " * 9), said("user", "What is 1234 + 5678? " * 30)]
    messages += [said("assistant", "Let us see: " + "6912. " * 40), said("user", "Thanks, and once more please. " * 9)]
    asked = Generate("r", SamplingParams(), messages=messages, cache_salt="mine")
    prompt = chat.conversation(messages)
    ids = chat.encode_prompt(prompt).ids
    blocks = blocks_of(asked, prompt.text, ids, Widths(chat.spelling))
    assert blocks is not None
    text = of_messages(messages)
    assert array("Q", blocks.hashes) == chained(text, space_of("mine")) and blocks.space == space_of("mine")
    (encoding,) = chat.spec.tokenizer.encode_batch([prompt.text], add_special_tokens=False)
    begins = [begin for begin, _ in encoding.offsets]
    found = array("i", blocks.ends)
    assert len(found) == len(text) // BLOCK >= 10
    for begin, said_here in written(messages).texts:
        stands = prompt.text.index(said_here.strip())
        for number, end in enumerate(range(BLOCK, len(text) + 1, BLOCK)):
            if begin < end <= begin + len(said_here.strip()):
                assert found[number] == bisect_left(begins, stands + end - begin)


# ── texts in what a template makes of them ───────────────────────────────────────────────────


@given(st.lists(texts, min_size=1, max_size=6))
@settings(max_examples=100)
def test_texts_are_taken_for_no_earlier_than_they_stand(contents: list[str]) -> None:
    messages = [said("user" if index % 2 else "assistant", text) for index, text in enumerate(contents)]
    made = written(messages)
    prompt, stands = "<s>", []  # the template trims, and writes more than the canonical text does
    for (begin, text), message in zip(made.texts, [each for each in messages if each.parts], strict=True):
        prompt += f"<|{message.role}|> "
        stands.append((begin, len(prompt) - (len(text) - len(text.lstrip())), len(text)))
        prompt += text.strip() + "<|end|>"
    found = places(made.length, anchors(made.texts, made.length, prompt), len(prompt))
    for end, place in zip(range(BLOCK, made.length + 1, BLOCK), found, strict=True):
        right = max((at + min(end - begin, length) for begin, at, length in stands if begin < end), default=0)
        assert place >= min(right, len(prompt))
    assert found == sorted(found)


def test_a_text_that_the_template_leaves_out_ends_where_the_next_begins() -> None:
    kept = ["first " * 30, "second " * 30]
    texts = [(5, kept[0]), (300, "left out " * 20), (600, kept[1])]
    prompt = f"<{kept[0].strip()}>{'markup' * 5}<{kept[1].strip()}>"
    second = prompt.index("second")
    assert anchors(texts, 900, prompt) == [(5, 1, len(kept[0]) - 1), (600, second, len(kept[1]) - 1)]
    assert places(900, anchors(texts, 900, prompt), len(prompt)) == [124, second, second, second, second + 40,
                                                                     second + 168, len(prompt)]  # fmt: skip


def test_tools_count_with_the_message_of_the_system() -> None:
    text = Text(open_checkpoint(Plugins.load(()), "echo").text(), TOLD)
    system, user = "You are a careful helper. " * 20, "What can you do for me? " * 20
    messages = [said("system", system), said("user", user)]
    prompt = text.conversation(messages, tools=[TOOL])
    ids = text.encode_prompt(prompt).ids
    asked = Generate("r", SamplingParams(), messages=messages, tools=[TOOL])
    blocks = blocks_of(asked, prompt.text, ids, Widths(text.spelling))
    plain = blocks_of(Generate("r", SamplingParams(), messages=messages), prompt.text, ids, Widths(text.spelling))
    assert blocks is not None and plain is not None
    begins = prompt.text.index("What can")  # a token a byte
    assert all(end >= begins for end in array("i", blocks.ends))
    assert array("i", plain.ends)[0] < begins and set(array("Q", plain.hashes)).isdisjoint(array("Q", blocks.hashes))


def test_texts_that_repeat_themselves_take_no_longer() -> None:
    """The searches together look at the prompt a few times, however many texts are not found."""
    many = [(index * 40, "a" * 39) for index in range(20_000)]
    found = anchors([*many, (800_000, "b" * 20)], 800_020, "a" * 100_000 + "b" * 20)
    assert found[-1] == (800_000, 100_000, 20) and len(found) < 2600


# ── what goes with a request ─────────────────────────────────────────────────────────────────


def test_an_admit_brings_blocks_where_somebody_listens() -> None:
    text = Text(open_checkpoint(Plugins.load(()), "echo").text())
    silent, named = Admission(text), Admission(text, named=True)
    for admission in (silent, named):
        admission.max_model_len = 4000
    words = "A text of which the first 256 characters are two whole blocks. " * 5
    assert silent.admit(generate(words))[1].blocks is None
    _, admitted = named.admit(generate(words))
    assert admitted.blocks is not None
    assert array("Q", admitted.blocks.hashes) == chained(words) and array("i", admitted.blocks.ends) == array(
        "i", [128, 256]
    )
    ids = array("i", range(100)).tobytes()
    _, admitted = named.admit(Generate("r", SamplingParams(), ids=ids))
    assert admitted.blocks is not None and array("i", admitted.blocks.ends) == array("i", [32, 64, 96])
    assert named.admit(generate("short"))[1].blocks is None


@pytest.mark.parametrize("change", [{"special": True}, {"last": 9}, {"chat_template": "{{ 1 }}"}])
def test_a_prompt_that_its_text_does_not_tell_has_no_names(change: dict[str, Any]) -> None:
    messages: list[Message] = [said("user", "hello")]
    assert is_plain(Generate("r", SamplingParams(), messages=messages))
    assert not is_plain(Generate("r", SamplingParams(), messages=messages, **change))
