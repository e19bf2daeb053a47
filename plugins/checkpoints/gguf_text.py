"""The tokenizers of GGUF files, built from their metadata: byte-level BPE, and SentencePiece's BPE.

Left out, and refused by name: SentencePiece's unigram models, WordPiece.
"""

from typing import Any

from msgspec import Struct
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from engine.plugin import ConfigError, TextSpec
from engine_plugins.checkpoints.gguf_file import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # values of tokenizer.ggml.token_type
ENDS_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
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
    """The tokenizer of the metadata and what goes with it; `ends_of_reply` are control tokens, where it has them.

    Raises ConfigError for another kind of vocabulary, or a pre-tokenizer that is not in PRE_TOKENIZERS."""
    fields, tokens = file.fields, file.field("tokenizer.ggml.tokens")
    kinds = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    model = file.field("tokenizer.ggml.model")
    if model == "gpt2":
        cut = _cut(file)
        tokenizer, add_bos = _byte_level(file, tokens, cut), cut.add_bos
    elif model == "llama":
        tokens = [token.replace(SPACE, " ") if kind == USER_DEFINED else token
                  for token, kind in zip(tokens, kinds, strict=True)]  # fmt: skip
        tokenizer, add_bos = _sentencepiece(file, tokens, kinds), True
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
    ends = [fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    known_ends = (*ENDS_OF_TURN, *ends_of_reply)
    ends += [id for id, kind in enumerate(kinds) if kind == CONTROL and tokens[id] in known_ends]
    bos, eos = fields.get("tokenizer.ggml.bos_token_id"), ends[0]
    return TextSpec(
        tokenizer=tokenizer,
        eos_ids=tuple(sorted({id for id in ends if id is not None})),
        bos_id=bos,
        add_bos=bos is not None and bool(fields.get("tokenizer.ggml.add_bos_token", add_bos)),
        bos_token="" if bos is None else tokens[bos],
        eos_token="" if eos is None else tokens[eos],
        chat_template=fields.get("tokenizer.chat_template"),
    )


def _cut(file: GGUFFile) -> Cut:
    name = file.fields.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise ConfigError(f"{file.path} has the pre-tokenizer {name!r}; from GGUF this can read: {known}")
    return PRE_TOKENIZERS[name]


def _byte_level(file: GGUFFile, tokens: list[str], cut: Cut) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in file.field("tokenizer.ggml.merges")]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut.whole))
    if cut.composed:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, whole])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GGUFFile, tokens: list[str], kinds: list[int]) -> Tokenizer:
    """SentencePiece's BPE: spaces are characters of words, and what has no token falls back to its bytes.

    SentencePiece joins whichever two neighbours make the piece of the best score; here that is a list of merges."""
    scores = file.field("tokenizer.ggml.scores")
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    vocabulary = {token: id for id, token in enumerate(tokens)}
    pieces = {token: scores[id] for token, id in vocabulary.items() if kinds[id] == NORMAL}
    model: Any = models.BPE(vocabulary, merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    decode = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.fields.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        tokenizer.decoder = decoders.Sequence([*decode, decoders.Strip(" ", left=1)])
    else:
        tokenizer.normalizer = spaces
        tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer


def merges(pieces: dict[str, float]) -> list[tuple[str, str]]:
    """Every two of `pieces` that together are a third, best score of that first, then longest left part."""
    ranked = []
    for piece, score in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                ranked.append((-score, -cut, left, right))
    ranked.sort(key=lambda merge: merge[:2])
    return [(left, right) for *_, left, right in ranked]
