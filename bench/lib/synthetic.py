"""A tokenizer of a real one's size for models that have only a config.json: byte-level BPE of made-up words.

Its tokens are spread as a multilingual vocabulary's are: words with and without a space before them, capitals, digits,
punctuation as JSON and code have it, runs of spaces, Chinese. What is decoded, and what a grammar lets through, costs
what it would with a real one. A text is encoded byte by byte; with `whole_words` a word of the vocabulary is one token,
and a text of such words costs the search for words and a look into the vocabulary for each. All but MARKS of its added
tokens have a text then: dummy weights draw each id as often as any other, and a token without a text is no event.
"""

import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

LETTERS, WEIGHTS = (
    "etaoinshrdlucmfwypvbgkjqxz",
    (120, 90, 80, 75, 70, 67, 63, 60, 59, 42, 40, 27, 27, 24, 22, 23, 20, 19, 10, 15, 20, 8, 2, 1, 2, 1),
)
PUNCTUATION = " .,;:!?()[]{}<>\"'/\\|@#$%^&*-_=+~`\n\t"
JSON_TOKENS = (
    '{"', '":', '",', '"}', '["', '"]', '":"', '","', '": "', '", "', "],", "},", "[{", "}]", '"],"',
)  # fmt: skip
SPECIAL = 300  # ids at the end, the model's own ends among them
MARKS = 4  # the last of these


def tokens(size: int, seed: int = 0) -> list[bytes]:
    """`size` different texts, the 256 bytes first."""
    rng = random.Random(seed)
    made: dict[bytes, None] = {bytes([byte]): None for byte in range(256)}
    made |= dict.fromkeys(text.encode() for text in JSON_TOKENS)
    kinds, shares = zip(*KINDS.items(), strict=True)
    while len(made) < size:
        (kind,) = rng.choices(kinds, shares)
        made.setdefault(kind(rng).encode())
    return list(made)


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, WEIGHTS, k=rng.choice((2, 3, 3, 4, 4, 5, 5, 6, 7, 8, 9, 10, 12))))


def _marks(rng: random.Random) -> str:
    return "".join(rng.choices(PUNCTUATION, k=rng.randint(1, 3)))


KINDS: dict[Any, int] = {
    lambda rng: " " + _word(rng): 45,
    _word: 30,
    lambda rng: _word(rng).capitalize(): 5,
    lambda rng: " " + _word(rng).capitalize(): 5,
    lambda rng: _marks(rng) + _marks(rng): 3,
    lambda rng: _marks(rng) + _word(rng): 2,
    lambda rng: rng.choice("\n \t") * rng.randint(2, 16): 1,
    lambda rng: "".join(chr(rng.randint(0x4E00, 0x9FFF)) for _ in range(rng.randint(1, 3))): 8,
    lambda rng: "".join(rng.choices("0123456789", k=rng.randint(1, 3))): 1,
}


def words(size: int) -> list[str]:
    """The words of `tokenizer(size)` that begin with a space and are of small letters: each is one token of it."""
    spelled = [token.decode(errors="ignore") for token in tokens(size - SPECIAL)]
    return [word for word in spelled if word.startswith(" ") and word[1:].isascii() and word[1:].islower()]


def tokenizer(size: int, whole_words: bool = False) -> Tokenizer:
    spelled = tokens(size - SPECIAL)
    # As byte-level BPE writes bytes: the printable ones as themselves, the others as the characters from U+0100 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    symbols = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    vocabulary = {"".join(symbols[byte] for byte in token): id for id, token in enumerate(spelled)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=whole_words))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=whole_words)
    made.decoder = decoders.ByteLevel()
    silent = range(size - MARKS if whole_words else len(spelled), size)
    made.add_tokens([AddedToken(f"<|{id}|>", special=id in silent) for id in range(len(spelled), size)])
    return made


@contextmanager
def with_tokenizer(model: Path, whole_words: bool = False) -> Iterator[Path]:
    """A directory like `model` that has a tokenizer as well; it ends replies with the last of its special tokens."""
    config = json.loads((model / "config.json").read_text())
    size = config["vocab_size"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": size - 1}))
        tokenizer(size, whole_words).save(str(folder / "tokenizer.json"))
        yield folder
