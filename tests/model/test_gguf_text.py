"""Tokenizers out of GGUF metadata that the test writes, against transformers' own classes and its reading of GGUF, and
SentencePiece's BPE against its definition."""

import json
from itertools import pairwise

import gguf
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import GemmaTokenizer, LlamaTokenizer, Qwen2Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer
from transformers.tokenization_utils_base import generate_merges

from engine.conversation.parts import read_messages
from engine.errors import ConfigError
from engine.text.tokenizer import Text
from engine_plugins.checkpoints.gguf.checkpoint import GGUFCheckpoint
from engine_plugins.checkpoints.gguf.text import PRE_TOKENIZERS, merges

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind: it's 1234 or 56789 o'clock.",
    "def f(x):\n    return x ** 2\n\n\n\tprint(f(10))  # größer, naïve, Ελληνικά, 漢字かな",
    "Hello, world! HELLO there, I'LL be back; we've 3.14 reasons, they'd say.",
] * 3
PROMPTS = [
    "The quick brown fox",
    "Hello,   world!  I'LL say 1234567 it's the DOG'S.\r\n\n  \n\tindented   ",
    " leading, and trailing ",
    "größer, nai\u0308ve, e\u0301te\u0301, 漢字 العربية 👩‍👩‍👧 😀 ½ ² Ⅷ ٣ 3.14e-10",
    "the  the   the    dog\n\n\n\nthe",
    "",
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def write_gguf(path, kind, tokens, *, architecture="llama", token_types=None, scores=None, merges=None, **fields):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(token_types or [gguf.TokenType.NORMAL] * len(tokens))
    if scores is not None:
        writer.add_token_scores(scores)
    if merges is not None:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    for key, value in fields.items():
        key = key if "." in key else f"tokenizer.ggml.{key}"
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Text(GGUFCheckpoint.open(str(path)).text())


# ── byte-level ───────────────────────────────────────────────────────────────────────────────

CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def byte_level():
    """(tokens, merges) of a vocabulary that was trained with short digits, so that cuts of the text matter."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+|[^\s\p{N}]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
    return bpe_parts(trained)


def bpe_parts(trained):
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [tuple(merge) for merge in model["merges"]]


def write_byte_level(path, byte_level, pre, **fields):
    tokens, pairs = byte_level
    types = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL] * len(CONTROLS)
    eos = len(tokens) + 2
    return write_gguf(
        path, "gpt2", tokens + CONTROLS, token_types=types, merges=pairs, pre=pre, eos_token_id=eos, **fields
    )


@pytest.mark.parametrize("pre", sorted(set(PRE_TOKENIZERS) - {"smollm", "gpt-2"}))
def test_cuts_are_those_of_transformers(tmp_path, byte_level, pre):
    text = write_byte_level(tmp_path / "a.gguf", byte_level, pre)
    tokens, pairs = byte_level
    fields = {"tokens": tokens + CONTROLS, "merges": [" ".join(pair) for pair in pairs]}
    fields |= {"tokenizer_type": "gpt2", "pre_tokenizer_type": pre, "token_type": [1] * len(tokens) + [3] * 3}
    peer, _ = convert_gguf_tokenizer("llama", fields)
    if PRE_TOKENIZERS[pre].composed:
        peer.normalizer = normalizers.NFC()  # as Qwen's tokenizer.json has it; a GGUF does not say
    if PRE_TOKENIZERS[pre].whole:
        peer.model.ignore_merges = True
    for prompt in [*PROMPTS, f"<|im_start|>{PROMPTS[0]}<|im_end|>"]:
        assert text.encode(prompt) == peer.encode(prompt).ids
        assert text.decode(text.encode(prompt)) == peer.decode(peer.encode(prompt).ids)


def test_qwen2_is_that_of_transformers(tmp_path, byte_level):
    tokens, pairs = byte_level
    text = write_byte_level(tmp_path / "a.gguf", byte_level, "qwen2", architecture="qwen2")
    vocabulary = {token: id for id, token in enumerate(tokens + CONTROLS)}
    peer = Qwen2Tokenizer(vocab=vocabulary, merges=pairs)
    for prompt in PROMPTS:
        assert text.encode(prompt) == peer.encode(prompt)
    assert text.encode("nai\u0308ve") == text.encode("na\u00efve")


def test_smollm_sets_each_digit_apart(tmp_path, byte_level):
    text = write_byte_level(tmp_path / "a.gguf", byte_level, "smollm")
    assert len(text.encode("123")) == 3
    assert len(write_byte_level(tmp_path / "b.gguf", byte_level, "gpt-2").encode("123")) < 3


def test_a_word_that_is_a_token_is_not_put_together(tmp_path, byte_level):
    tokens, pairs = byte_level
    added = ([*tokens, "lazydog"], pairs)  # no merges lead to it
    assert len(write_byte_level(tmp_path / "a.gguf", added, "llama-bpe").encode("lazydog")) == 1
    assert len(write_byte_level(tmp_path / "b.gguf", added, "qwen2").encode("lazydog")) > 1


def test_first_and_last_tokens(tmp_path, byte_level):
    count = len(byte_level[0])
    text = write_byte_level(tmp_path / "a.gguf", byte_level, "llama-bpe", bos_token_id=count)
    assert text.encode("the")[0] == count  # llama-bpe begins with it unless the file says not to
    text = write_byte_level(tmp_path / "b.gguf", byte_level, "llama-bpe", bos_token_id=count, add_bos_token=False)
    assert text.encode("the")[0] != count
    assert text.spec.eos_ids == (count + 2,)
    qwen = write_byte_level(tmp_path / "c.gguf", byte_level, "qwen2", architecture="qwen2", bos_token_id=count)
    assert qwen.spec.eos_ids == (count, count + 2)  # as Qwen's generation_config.json says
    assert not qwen.spec.add_bos
    assert qwen.render_chat(read_messages([{"role": "user", "content": "hi"}])) == "<|im_start|>user\nhi<|im_end|>\n"


# ── SentencePiece ────────────────────────────────────────────────────────────────────────────

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
USER = ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<start_of_turn>"]
TYPES = gguf.TokenType


class Pieces:
    """A SentencePiece vocabulary as its BPE trainer leaves it: special and user-defined tokens, bytes, pieces by
    falling score, characters last."""

    def __init__(self, gemma):
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.Metaspace()
        trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300))
        tokens, _ = bpe_parts(trained)
        pieces = [token for token in tokens if len(token) > 1] + [token for token in tokens if len(token) == 1]
        user = [token for token in USER if gemma and token not in pieces]
        parts = {
            TYPES.CONTROL: SPECIAL[:3],
            TYPES.UNKNOWN: SPECIAL[3:],
            TYPES.USER_DEFINED: user,
            TYPES.BYTE: [f"<0x{byte:02X}>" for byte in range(256)],
            TYPES.NORMAL: pieces,
        }
        self.tokens = [token for part in parts.values() for token in part]
        self.types = [kind for kind, part in parts.items() for _ in part]
        first = len(self.tokens) - len(pieces)
        self.scores = [-1000.0 if kind == TYPES.USER_DEFINED else 0.0 for kind in self.types[:first]]
        self.scores += [-float(rank) for rank in range(len(pieces))]
        self.vocabulary = {token: id for id, token in enumerate(self.tokens)}
        self.pieces = dict(zip(pieces, self.scores[first:], strict=True))

    def write(self, path, spelled=str, **fields):
        tokens = [spelled(token) if kind == TYPES.USER_DEFINED else token
                  for token, kind in zip(self.tokens, self.types, strict=True)]  # fmt: skip
        return write_gguf(
            path, "llama", tokens, token_types=self.types, scores=self.scores,
            eos_token_id=1, bos_token_id=2, unknown_token_id=3, **fields,
        )  # fmt: skip

    def encode(self, text):
        """Joins the two neighbours that make the piece of the best score, the leftmost first, while there are such."""
        symbols = list(text)
        while True:
            joined = [left + right for left, right in pairwise(symbols)]
            best = max(
                (index for index, piece in enumerate(joined) if piece in self.pieces),
                key=lambda index: (self.pieces[joined[index]], -index),
                default=None,
            )
            if best is None:
                break
            symbols[best : best + 2] = [joined[best]]
        ids = []
        for symbol in symbols:
            known = [symbol] if symbol in self.vocabulary else [f"<0x{byte:02X}>" for byte in symbol.encode()]
            ids += [self.vocabulary[token] for token in known]
        return ids


@pytest.fixture(scope="module")
def llama_pieces():
    return Pieces(gemma=False)


@pytest.fixture(scope="module")
def gemma_pieces():
    return Pieces(gemma=True)


RANDOM = ["".join(np.random.default_rng(seed).choice(list("thedogfx \n,é漢"), 60)) for seed in range(20)]


@pytest.mark.parametrize("prompt", PROMPTS + RANDOM)
def test_pieces_are_those_of_sentencepiece_and_transformers(tmp_path, llama_pieces, prompt):
    text = llama_pieces.write(tmp_path / "a.gguf")
    ids = text.encode(prompt)
    assert ids == [2, *llama_pieces.encode(("▁" + prompt if prompt else "").replace(" ", "▁"))]
    if not prompt.startswith(" "):  # where transformers' class adds no space of its own
        pairs = generate_merges(llama_pieces.vocabulary, llama_pieces.pieces)
        peer = LlamaTokenizer(vocab=llama_pieces.vocabulary, merges=pairs, unk_token="<unk>")
        assert ids[1:] == peer.encode(prompt, add_special_tokens=False)
        assert text.decode(ids) == peer.decode(ids[1:])
    assert text.decode(ids) == prompt


@pytest.mark.parametrize("spelled", [str, lambda token: token.replace("▁", " ")], ids=["pieces", "spaces"])
@pytest.mark.parametrize("prompt", PROMPTS + RANDOM)
def test_gemma_is_that_of_transformers(tmp_path, gemma_pieces, prompt, spelled):
    text = gemma_pieces.write(tmp_path / "a.gguf", spelled, architecture="gemma3", add_space_prefix=False)
    # tokenizer.json of Gemma merges runs of spaces before all else, and adds the other tokens of its own
    user = {token: 1e3 - index for index, token in enumerate(USER) if "▁" in token}
    pairs = generate_merges(gemma_pieces.vocabulary, {**user, **gemma_pieces.pieces})
    peer = GemmaTokenizer(vocab=gemma_pieces.vocabulary, merges=pairs)
    peer.add_tokens([token for token in USER if "▁" not in token])
    assert text.encode(prompt) == [2, *peer.encode(prompt, add_special_tokens=False)]
    assert text.decode(text.encode(prompt)) == prompt


def test_phi_is_transformers_reading_of_the_file(tmp_path, llama_pieces):
    text = llama_pieces.write(tmp_path / "a.gguf", architecture="phi3", add_bos_token=False)
    fields = {"tokens": llama_pieces.tokens, "scores": llama_pieces.scores, "token_type": llama_pieces.types}
    peer, _ = convert_gguf_tokenizer("phi3", {**fields, "tokenizer_type": "llama"})
    for prompt in [*PROMPTS, *RANDOM, "<bos> the<eos>the dog"]:
        assert text.encode(prompt) == peer.encode(prompt, add_special_tokens=False).ids


def test_special_tokens_of_gemma(tmp_path, gemma_pieces):
    text = gemma_pieces.write(tmp_path / "a.gguf", architecture="gemma3", add_space_prefix=False)
    start = gemma_pieces.vocabulary["<start_of_turn>"]
    assert text.encode("<bos><start_of_turn>the")[:2] == [2, start]
    assert text.encode("a\n\n\nb")[2] == gemma_pieces.vocabulary["\n\n\n"]
    assert (text.spec.bos_token, text.spec.eos_token, text.spec.eos_ids) == ("<bos>", "<eos>", (1,))
    assert text.decode([2, *text.encode("the"), 1]) == "the"


def test_replies_stream_as_they_decode(tmp_path, llama_pieces):
    text = llama_pieces.write(tmp_path / "a.gguf")
    for prompt in PROMPTS + RANDOM:
        ids = text.encode(prompt)
        reply = text.reply()
        assert "".join(reply.push([id]) for id in ids) + reply.flush() == text.decode(ids)


def test_merges_are_by_score_then_length_of_the_left():
    pieces = {"a": -9.0, "b": -9.0, "ab": -2.0, "ba": -1.0, "aba": -3.0}
    assert merges(pieces) == [("b", "a"), ("a", "b"), ("ab", "a"), ("a", "ba")]


def test_a_vocabulary_without_scores_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no tokenizer\.ggml\.scores"):
        write_gguf(tmp_path / "a.gguf", "llama", ["a"])


def test_the_sampling_that_a_file_recommends(tmp_path, byte_level):
    said = {"general.sampling.temp": 0.7, "general.sampling.top_k": 20, "general.sampling.penalty_repeat": 1.05}
    spec = write_byte_level(tmp_path / "tiny.gguf", byte_level, "gpt-2", **said).spec
    assert spec.generation == {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05}
