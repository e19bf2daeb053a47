"""Masks inside JSON strings of bounded length, without a walk over the vocabulary.

In a string that may have `left` more characters, a token that is nothing but ordinary characters may come next if it
has at most `left` of them: a table has the mask for each number. A second matcher decides about all other tokens (the
closing quote and what follows in the same token, an escape, a part of a character). Its vocabulary lacks the ordinary
tokens, and it reads the reply byte by byte. The two together are exactly the mask of the whole vocabulary:

    upto[left] ──┐
                 ├── or ──> mask          in place of walking, at 9 characters left, all tokens of 10 and more
    few tokens ──┘

The number of characters left is found by offering a character that the schema's own words do not have: if it is
allowed, all ordinary characters are. `probe_of` leaves out schemas for which that is not true: those whose strings have
patterns or formats, and choices between strings and words.
"""

import json
import re
from collections.abc import Callable, Sequence

import llguidance
import numpy as np

from engine.plugin import Vocabulary
from engine_plugins.grammars.llguidance.json_names import objects

FEW = 24  # characters left, up to which the table is the quicker way: longer tokens are few
NOT_FREE = frozenset({"pattern", "format", "patternProperties", "propertyNames", "contentEncoding", "x-guidance"})
CHOICES = frozenset({"anyOf", "oneOf", "allOf", "$ref", "$dynamicRef"})
WORDS = frozenset({"enum", "const"})
EXTRAORDINARY = re.compile(rb'[\x00-\x1f"\\\x7f]')  # bytes; those of longer characters are none of them
PROBES = "~^`|;_@QZ#%&*+=<>zqxj"  # rare in schemas

MakeTokenizer = Callable[[Vocabulary, Sequence[bytes], list[str]], llguidance.LLTokenizer]


def probe_of(source: str) -> str:
    """A character that a JSON schema's words do not have, if it has strings of bounded length and none that this module
    does not know how to handle; else nothing."""
    schema = json.loads(source)
    keys: set[str] = set()
    mixed = False
    for node in objects(schema):
        keys |= node.keys()
        mixed |= isinstance(node.get("type"), list)
    if "maxLength" not in keys or keys & NOT_FREE or ((mixed or keys & CHOICES) and keys & WORDS):
        return ""
    words = json.dumps(schema, ensure_ascii=False)
    return next((character for character in PROBES if character not in words), "")


def ordinary_length(token: bytes) -> int:
    """Characters of a token that is nothing but ordinary ones; else 0."""
    if EXTRAORDINARY.search(token):
        return 0
    try:
        return len(token.decode())
    except UnicodeDecodeError:
        return 0


class FreeStrings:
    """What one vocabulary needs. `upto[left]`, int32 [FEW + 1, words], is the mask of what is ordinary and not longer.

    A token of ordinary characters is left out of the few if it can be spelled by others, of one byte each."""

    def __init__(self, vocabulary: Vocabulary, make: MakeTokenizer, limits: llguidance.LLParserLimits) -> None:
        tokens = vocabulary.tokens
        self._limits = limits
        self._tokens = tokens
        self.lengths = [0 if id in vocabulary.special else ordinary_length(token) for id, token in enumerate(tokens)]
        alone = {token[0]: id for id, token in enumerate(tokens) if len(token) == 1 and id not in vocabulary.special}
        self._byte_ids = alone
        bytes_alone = bytes(alone)
        self._left_out = [
            length > 0 and len(token) > 1 and not token.strip(bytes_alone)
            for token, length in zip(tokens, self.lengths, strict=True)
        ]
        lengths = np.array(self.lengths)
        bits = np.zeros((FEW + 1, -(-len(tokens) // 32) * 32), bool)
        for left in range(FEW + 1):
            bits[left, : len(tokens)] = (lengths > 0) & (lengths <= left)
        self.upto = np.packbits(bits, axis=1, bitorder="little").view("<i4")
        few = [b"" if out else token for token, out in zip(tokens, self._left_out, strict=True)]
        self._tokenizer = make(vocabulary, few, [])

    def prepare(self, text: str, source: str) -> "FreeString | None":
        """For replies in the grammar `text`, made of the JSON schema `source`; None where this would be of no use."""
        probe = probe_of(source)
        if not probe or ord(probe) not in self._byte_ids:
            return None
        matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
        return FreeString(self, matcher, [self._byte_ids[ord(probe)]] * (FEW + 1))

    def spelled(self, token: int) -> list[int]:
        """`token`, in tokens that are among the few."""
        if not self._left_out[token]:
            return [token]
        return [self._byte_ids[byte] for byte in self._tokens[token]]


class FreeString:
    """What is known of the string that one reply is in, if it is in one."""

    __slots__ = ("_ask", "_few", "_left", "_pending", "_probe", "_strings")

    def __init__(self, strings: FreeStrings, few: llguidance.LLMatcher, probe: list[int]) -> None:
        self._strings = strings
        self._few = few
        self._probe = probe
        self._pending: list[int] = []  # tokens that `few` has not read
        self._left = 0
        self._ask = True

    def copy(self) -> "FreeString":
        """The same, for another reply at its beginning."""
        return FreeString(self._strings, self._few.deep_copy(), self._probe)

    def push(self, token: int) -> None:
        """`token` has come."""
        self._pending.append(token)
        length = self._strings.lengths[token]
        if not length or self._left > FEW:
            self._ask = True
        elif self._left:
            self._left -= length

    def left(self, full: llguidance.LLMatcher) -> int:
        """How many ordinary characters may come, if the table is the quicker way to say so; else 0."""
        if self._ask:
            self._left = full.validate_tokens(self._probe)
            self._ask = False
        return self._left if self._left <= FEW else 0

    def caught_up(self) -> llguidance.LLMatcher:
        """The matcher of few tokens, once it has read all that has come."""
        spelled = [byte for token in self._pending for byte in self._strings.spelled(token)]
        self._pending.clear()
        taken = self._few.consume_tokens(spelled)
        assert taken, "the same text was taken by the matcher of all tokens"
        return self._few
