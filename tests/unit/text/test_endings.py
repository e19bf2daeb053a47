"""Texts that begin alike are encoded as each alone would be, whatever is said behind the first."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from bench.lib.synthetic import tokenizer as synthetic
from bench.lib.synthetic import words
from engine.text.endings import _cut, encoded

SIZE = 4096
WORDS = words(SIZE)
PIECES = st.sampled_from(
    [*WORDS[:40], "ab", "é", " 12", "345", "\n\n", "  ", "<|", "|>", "<|stop|>", ".", " don't", "漢字", " "]
)
LONG = "".join(WORDS[:60])  # beyond the margin


def made(**options: bool) -> Tokenizer:
    found = synthetic(SIZE, True)
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **options)
    found.add_special_tokens([AddedToken("<|stop|>", special=True)])
    return found


SPLIT, WHOLE = made(use_regex=True), made(use_regex=False)


def alone(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@settings(deadline=None)
@given(st.lists(PIECES, max_size=30), st.lists(PIECES, max_size=6), st.lists(st.lists(PIECES), min_size=1, max_size=4))
def test_each_text_has_the_tokens_that_it_has_alone(head: list[str], tail: list[str], endings: list[list[str]]) -> None:
    first = "".join(head) + LONG + "".join(tail)
    texts = [first, *(first + "".join(ending) for ending in endings)]
    for tokenizer in (SPLIT, WHOLE):
        found = encoded(tokenizer, texts, special=False, lossless=True)
        assert found == [alone(tokenizer, text) for text in texts]


def test_only_the_end_is_encoded_again_where_words_are_apart() -> None:
    (encoding,) = SPLIT.encode_batch([LONG], add_special_tokens=False)
    cut = _cut(LONG, encoding)
    assert cut is not None and len(LONG) - 160 < cut[1] <= len(LONG) - 128 and LONG[cut[1]] == " "
    (encoding,) = WHOLE.encode_batch([LONG], add_special_tokens=False)
    assert _cut(LONG, encoding) is None  # it is all one word to this tokenizer


@pytest.mark.parametrize("lossless", [True, False])
def test_texts_that_begin_otherwise_and_words_of_other_models(lossless: bool) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = ["a b " * 100, "b a", "a b " * 100 + "a"]
    assert encoded(tokenizer, texts, special=True, lossless=lossless) == [alone(tokenizer, text) for text in texts]
