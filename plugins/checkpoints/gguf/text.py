"""The tokenizers of GGUF files, built from their metadata: byte-level BPE, and SentencePiece's BPE.

Left out, and refused by name: SentencePiece's unigram models, WordPiece.
"""

import math
from typing import Any

from msgspec import Struct
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from engine.plugin import ConfigError, Terms, TextSpec
from engine_plugins.checkpoints.gguf.file import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # values of tokenizer.ggml.token_type
ENDS_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
LARGEST_ID = (1 << 32) - 1  # of a token, as a field can hold it; some files write that for none
NAMED = "tokenizer.chat_template."  # what begins the fields of further templates
SPACE = "\u2581"  # what SentencePiece writes for a space


class Cut(Struct, frozen=True):
    """A `tokenizer.ggml.pre`: the text is cut at each pattern in turn, every match a piece of its own.

    `composed` text is brought to Unicode's NFC first. A piece that is a token as it stands is not put together from
    smaller ones if `whole`. `add_bos` is whether a text begins with the first token if the file does not say.
    """

    patterns: tuple[str, ...]
    composed: bool = False
    whole: bool = False
    add_bos: bool = False


GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = Cut((WORDS.replace("DIGITS", r"\p{N}"),), composed=True)
THREE_DIGITS = (WORDS.replace("DIGITS", r"\p{N}{1,3}"),)
LLAMA3 = Cut(THREE_DIGITS, whole=True, add_bos=True)
PRE_TOKENIZERS = {
    "dbrx": Cut(THREE_DIGITS),  # Phi-4 has it too
    "deepseek-r1-qwen": QWEN2,
    "gpt-2": Cut((GPT2_WORDS,)),
    "llama-bpe": LLAMA3,
    "llama-v3": LLAMA3,
    "llama3": LLAMA3,
    "qwen2": QWEN2,
    "smollm": Cut((r"\p{N}", GPT2_WORDS)),
}


def text_spec(file: GGUFFile, ends_of_reply: tuple[str, ...]) -> TextSpec:
    """The tokenizer of the metadata and what goes with it; `ends_of_reply` are control tokens, if the vocabulary has
    them.

    Raises ConfigError for another kind of vocabulary, or a pre-tokenizer that is not in PRE_TOKENIZERS."""
    fields = Terms(file.fields, str(file.path))
    tokens, model = list(fields.words("tokenizer.ggml.tokens")), fields.word("tokenizer.ggml.model")
    if not tokens:
        raise fields.wrong("tokenizer.ggml.tokens", "a list of tokens that is not empty")
    kinds = list(fields.integers("tokenizer.ggml.token_type", len(tokens))) or [NORMAL] * len(tokens)
    if model == "gpt2":
        cut = _cut(fields)
        tokenizer, add_bos = _byte_level(fields, tokens, cut), cut.add_bos
    elif model == "llama":
        tokens = [token.replace(SPACE, " ") if kind == USER_DEFINED else token
                  for token, kind in zip(tokens, kinds, strict=True)]  # fmt: skip
        tokenizer, add_bos = _sentencepiece(fields, tokens, kinds), True
    else:
        raise ConfigError(
            f"{file.path} has a {model!r} vocabulary; from GGUF this can read: gpt2 (byte-level BPE), "
            "llama (SentencePiece's BPE)"
        )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    ends = [_token_id(fields, key, len(tokens)) for key in ("eos", "eot", "eom")]
    known_ends = (*ENDS_OF_TURN, *ends_of_reply)
    ends += [id for id, kind in enumerate(kinds) if kind == CONTROL and tokens[id] in known_ends]
    bos, eos = _token_id(fields, "bos", len(tokens)), ends[0]
    return TextSpec(
        tokenizer=tokenizer,
        eos_ids=tuple(sorted({id for id in ends if id is not None})),
        bos_id=bos,
        add_bos=bos is not None and fields.flag("tokenizer.ggml.add_bos_token", add_bos),
        bos_token="" if bos is None else tokens[bos],
        eos_token="" if eos is None else tokens[eos],
        chat_template=fields.word("tokenizer.chat_template", None),
        named_templates={key.removeprefix(NAMED): fields.word(key) for key in fields if key.startswith(NAMED)},
    )


def _token_id(fields: Terms, key: str, count: int) -> int | None:
    """The id of the token that a field names; None if there is no such field or no such token, as in llama.cpp."""
    id = fields.integer(f"tokenizer.ggml.{key}_token_id", None, low=0, high=LARGEST_ID)
    return id if id is None or id < count else None


def _cut(fields: Terms) -> Cut:
    name = fields.word("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise ConfigError(f"{fields.source} has the pre-tokenizer {name!r}; from GGUF this can read: {known}")
    return PRE_TOKENIZERS[name]


def _bpe(fields: Terms, vocabulary: dict[str, int], merges: list[Any], **options: Any) -> Tokenizer:
    """Byte-level BPE. Raises ConfigError for a merge that does not make a token of two tokens."""
    try:
        return Tokenizer(models.BPE(vocabulary, merges, **options))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"the tokenizer in {fields.source} is inconsistent: {error}") from error


def _byte_level(fields: Terms, tokens: list[str], cut: Cut) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in fields.words("tokenizer.ggml.merges")]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    tokenizer = _bpe(fields, vocabulary, merges, ignore_merges=cut.whole)
    if cut.composed:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, whole])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: Terms, tokens: list[str], kinds: list[int]) -> Tokenizer:
    """SentencePiece's BPE: spaces are characters of words, and what has no token falls back to its bytes.

    SentencePiece joins whichever two neighbours make the piece of the best score; here that is a list of merges."""
    scores = fields.numbers("tokenizer.ggml.scores", len(tokens), above=-math.inf)
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    vocabulary = {token: id for id, token in enumerate(tokens)}
    pieces = {token: scores[id] for token, id in vocabulary.items() if kinds[id] == NORMAL}
    tokenizer = _bpe(fields, vocabulary, merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    spaces = normalizers.Replace(" ", SPACE)
    decode = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.flag("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        tokenizer.decoder = decoders.Sequence([*decode, decoders.Strip(" ", left=1)])
    else:
        tokenizer.normalizer = spaces
        tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer


def merges(pieces: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of `pieces` that together are a third piece, by the score of that, best first, then by the longest left
    part."""
    ranked = []
    for piece, score in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                ranked.append((-score, -cut, left, right))
    ranked.sort(key=lambda merge: merge[:2])
    return [(left, right) for *_, left, right in ranked]
