"""Token ids of texts that begin alike: the first is encoded whole, the others from a word near its end.

A pre-tokenizer reads from left to right, so what comes before the beginning of a word has the same tokens in all texts
that share it. That this holds is checked on the first text itself; where it does not, all are encoded whole. Pure
logic. Left out: texts that share less than nearly all of the first.
"""

from collections.abc import Sequence
from typing import Any

MARGIN = 128  # characters before the end of the first text: as far as a pre-tokenizer or a special token may look ahead


def encoded(tokenizer: Any, texts: Sequence[str], *, special: bool, lossless: bool) -> list[list[int]]:
    """The ids of each of `texts`; with `special` as the tokenizer adds to them. `lossless` says that its tokens stand
    for all characters, each for some that follow one another. May be called in a thread: the lock is not held."""
    first, *others = texts
    (whole,) = tokenizer.encode_batch([first], add_special_tokens=special)
    cut = _cut(first, whole) if lossless and others else None
    if cut is not None:
        tokens, characters = cut
        if all(text.startswith(first[:characters]) for text in others):
            ends = [text[characters:] for text in texts]
            own, *rest = (each.ids for each in tokenizer.encode_batch_fast(ends, add_special_tokens=False))
            if own == whole.ids[tokens:]:
                return [whole.ids, *(whole.ids[:tokens] + ids for ids in rest)]
    return [whole.ids, *(each.ids for each in tokenizer.encode_batch_fast(others, add_special_tokens=special))]


def _cut(text: str, encoding: Any) -> tuple[int, int] | None:
    """The last beginning of a word that is far enough from the end: how many tokens and characters come before it."""
    words, offsets = encoding.word_ids, encoding.offsets
    for token in range(len(words) - 1, 0, -1):
        start = offsets[token][0]
        if start > len(text) - MARGIN or words[token] is None or words[token] == words[token - 1]:
            continue
        if start and text[start] != " " and text[start - 1] == " ":
            start -= 1  # some tokenizers do not count the space among the word's characters
        if text[start : start + 1] == " " and text[start + 1 : start + 2].isalpha():
            return token, start
    return None
