"""A text is refused before it is encoded only where it is sure to have too many tokens."""

from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from engine.errors import RequestError
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.registry import Plugins
from engine.plugin.specs import TextSpec
from engine.text.tokenizer import MOST_CHARACTERS, Text, width_of


def byte_level(*merges: tuple[str, str], without: str = "") -> Tokenizer:
    """One token a byte, but for those `without`, and one for each of `merges`."""
    symbols = [symbol for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()) if symbol not in without]
    vocabulary = {token: id for id, token in enumerate([*symbols, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def changed(**parts: Any) -> Tokenizer:
    tokenizer = byte_level()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


@cache
def kept() -> list[Tokenizer]:
    """Tokenizers that leave out nothing, or bytes alone."""
    composed = byte_level(("Ç", "ĸ"))  # the bytes of \u01d6, which NFC makes of three characters
    composed.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(" ", "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return [
        byte_level(("a", "b"), ("ab", "ab")),
        byte_level(("a", "b"), without="c"),
        composed,
        changed(pre_tokenizer=pre_tokenizers.Sequence([split, level])),
        open_checkpoint(Plugins.load(()), "smollm2-135m").text().tokenizer,
    ]


@settings(deadline=None)
@given(text=st.text(st.characters(codec="utf-8")) | st.text("abcu\x04 \u0308\u0304", max_size=200))
@example("ab" * 50)
@example("c" * 50)
@example("u\u0308\u0304" * 20)
def test_no_text_has_fewer_tokens_than_that(text: str) -> None:
    for tokenizer in kept():
        width = width_of(tokenizer)
        assert width is not None
        assert width.fewest(text) <= len(tokenizer.encode(text, add_special_tokens=False).ids)


def test_of_a_tokenizer_that_may_leave_text_out_nothing_is_said() -> None:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    swallows = byte_level()
    swallows.add_tokens([AddedToken("<mark>", lstrip=True)])
    cuts = byte_level()
    cuts.enable_truncation(5)
    bert = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    bert.normalizer, bert.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    for tokenizer in (
        bert,
        swallows,
        cuts,
        changed(normalizer=normalizers.Strip()),
        changed(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), level])),
        changed(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), level])),
        byte_level(without="ł"),  # the byte 0x80
    ):
        assert width_of(tokenizer) is None


def test_a_text_is_refused_by_its_tokens() -> None:
    keeps = Text(TextSpec(tokenizer=byte_level(), eos_ids=()))
    merges = Text(TextSpec(tokenizer=byte_level(("a", "b"), ("ab", "ab")), eos_ids=()))
    with pytest.raises(RequestError, match="the input has 41 characters, which are at least 11 tokens, and at most 10"):
        merges.encode("x" * 41, most=10, name="input")
    assert len(keeps.encode("x" * 10, most=10)) == 10
    bert = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    bert.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    drops = Text(TextSpec(tokenizer=bert, eos_ids=()))
    assert drops.encode("a" + " " * 10_000 + "a", most=10) == [1, 1]
    with pytest.raises(
        RequestError, match="the prompt has 4194305 characters, and at most 4194304 are tokenized at once"
    ):
        drops.encode(" " * (MOST_CHARACTERS + 1), most=10)
