"""From token ids to the text of a reply: whole characters, as they become certain, up to what stops the reply.

    ids ──> Decoder: characters ──> ReplyDecoder: stop strings and expressions ──> text that may be sent

The text is searched for stop strings and expressions after each token, so the split of tokens over messages changes
nothing. Text that may become a stop is held back. Pure logic: it knows neither channels nor torch.
"""

import codecs
import itertools
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Protocol

import regex
from tokenizers import Tokenizer, decoders

from engine.errors import RequestError

REPLACEMENT = "\ufffd"  # what bytes that are not, or not yet, UTF-8 decode to
LONGEST_MATCH = 1024  # characters that a stop expression may match, and so holds back at most
UTF8 = codecs.getincrementaldecoder("utf-8")
MATCH_SECONDS = 0.1  # longest search for a stop expression after one token


class NoTexts(dict[int, str | None]):
    """A table without texts."""

    def __missing__(self, id: int) -> None:
        return None


NO_TEXTS: Mapping[int, str | None] = NoTexts()


class Decoder(Protocol):
    """Token ids in, text out as soon as it is certain; `flush` gives what never became certain.

    If `texts` has the text of an id, `push` of that id alone would return it and change nothing."""

    texts: Mapping[int, str | None]

    def push(self, ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether its tokens are bytes."""
    return isinstance(tokenizer.decoder, decoders.ByteLevel)


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids of special tokens, which have no text."""
    return frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def _written() -> str:
    """The 256 bytes as byte-level vocabularies write them: printable ones as themselves, any other as the next
    character from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


CHARMAP = codecs.charmap_build(_written())


def bytes_of(token: str) -> bytes:
    """The bytes of a byte-level token; an added one is written as it is."""
    try:
        return codecs.charmap_encode(token, "strict", CHARMAP)[0]
    except UnicodeEncodeError:
        return token.encode()


class TokenBytes(dict[int, bytes]):
    """The bytes of a byte-level token, filled in as ids are seen; `skipped` and unknown ones have none."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int] = frozenset()) -> None:
        self.texts = TokenTexts(self)
        self._tokenizer = tokenizer
        self._skipped = skipped

    def __missing__(self, id: int) -> bytes:
        token = None if id in self._skipped else self._tokenizer.id_to_token(id)
        spelled = self[id] = bytes_of(token or "")
        return spelled


class TokenTexts(dict[int, str | None]):
    """The text of a byte-level token by itself, None for one that begins a character; filled in as ids are seen."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes

    def __missing__(self, id: int) -> str | None:
        utf8 = UTF8("replace")
        text = utf8.decode(self._token_bytes[id])
        self[id] = None if utf8.getstate()[0] else text
        return self[id]


class ByteDecoder:
    """For byte-level tokenizers: tokens are bytes, and text is their UTF-8.

    Where no character is begun, the text of a token that begins none is in a table, `texts`."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._utf8 = UTF8("replace")
        self.texts: Mapping[int, str | None] = token_bytes.texts

    def push(self, ids: Sequence[int]) -> str:
        table = self._token_bytes
        text = self._utf8.decode(b"".join([table[id] for id in ids]))
        self.texts = NO_TEXTS if self._utf8.getstate()[0] else table.texts
        return text

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class ByteTokens:
    """The tokens of single bytes in a vocabulary with byte fallback, such as `<0xE6>`; it may have none.

    The tokenizers library decodes neighbouring byte tokens as one text. If that is not UTF-8, all of them become
    U+FFFD, also whole characters that a client may already have. SentencePiece keeps whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        found = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        ids = [id for id in found if id is not None]
        whole = len(ids) == 256 and tokenizer.decode([ids[ord("A")]], skip_special_tokens=False) == "A"
        self._ids = ids if whole else []
        self._bytes = {id: byte for byte, id in enumerate(self._ids)}

    def mended(self, ids: Sequence[int]) -> Sequence[int]:
        """`ids`, with the bytes of U+FFFD in the place of each byte or beginning of a character that is not UTF-8."""
        if self._bytes.keys().isdisjoint(ids):
            return ids
        mended: list[int] = []
        for of_bytes, run in groupby(ids, self._bytes.__contains__):
            if of_bytes:
                text = bytes(self._bytes[id] for id in run).decode("utf-8", "replace")
                mended += [self._ids[byte] for byte in text.encode()]
            else:
                mended += run
        return mended


class WindowDecoder:
    """For any other tokenizer: decodes the last tokens again, after those before them for context.

    A text that ends in U+FFFD may be a character cut in two and waits for more, for at most `PATIENCE` pushes.
    Byte tokens of which more than that many in a row are not UTF-8 may so come out as fewer or more U+FFFD than
    decoded as a whole.
    """

    PATIENCE = 16
    texts = NO_TEXTS

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], byte_tokens: ByteTokens) -> None:
        self._tokenizer = tokenizer
        self._byte_tokens = byte_tokens
        self._skipped = skipped
        self._ids: list[int] = []  # context, then tokens whose text is not released
        self._context = 0  # how many are context, and what they read
        self._context_text = ""
        self._waited = 0

    def push(self, ids: Sequence[int]) -> str:
        self._ids += [id for id in ids if id not in self._skipped]
        text = self._decode()
        new = text[len(self._context_text) :]
        if not new or (new.endswith(REPLACEMENT) and self._waited < self.PATIENCE):
            self._waited += 1
            return ""
        del self._ids[: self._context]
        self._context, self._context_text, self._waited = len(self._ids), self._decode(), 0
        return new

    def flush(self) -> str:
        return self._decode()[len(self._context_text) :]

    def _decode(self) -> str:
        ids = self._byte_tokens.mended(self._ids)
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)  # those to skip are not there
        return text


class NoDecoder:
    """For replies without text (`detokenize` false)."""

    texts = NO_TEXTS

    def push(self, ids: Sequence[int]) -> str:
        return ""

    def flush(self) -> str:
        return ""


class Spelling(dict[int, bytes]):
    """The bytes of any token as a person should see it, filled in as ids are seen: `special` tokens by their names.

    Ids that the tokenizer does not know are empty."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._byte_level = is_byte_level(tokenizer)
        self.special = special_ids(tokenizer)

    def __missing__(self, id: int) -> bytes:
        token: str = self._tokenizer.id_to_token(id) or ""
        if id in self.special:
            spelled = token.encode()
        elif self._byte_level:
            spelled = bytes_of(token)
        elif byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
            spelled = bytes([int(byte[1], 16)])
        else:
            spelled = token.replace("\u2581", " ").encode()  # SentencePiece writes a space so
        self[id] = spelled
        return spelled


def beginnings(stop: Sequence[str]) -> dict[str, list[str]]:
    """All proper beginnings of the texts in `stop`, longest first, by their last character."""
    by_last: dict[str, list[str]] = {}
    for start in sorted({word[:end] for word in stop for end in range(1, len(word))}, key=len, reverse=True):
        by_last.setdefault(start[-1], []).append(start)
    return by_last


class Expressions:
    """The stop expressions of one reply, and where in its text so far a match may still begin.

    A match has at most LONGEST_MATCH characters. Raises RequestError for an expression that takes too long.
    """

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self._patterns = [regex.compile(pattern) for pattern in patterns]
        self._text = ""
        self.open_from = 0  # a match begins here or later

    def skip(self, new: str) -> None:
        """Add `new` to the text; no match may begin before its end."""
        self._text += new
        self.open_from = len(self._text)

    def search(self, new: str) -> tuple[int, int, str] | None:
        """Add `new` to the text: end, start and pattern of the match that ends first, if there is one now."""
        self._text += new
        matches = []
        open_from = len(self._text)
        for pattern in self._patterns:
            try:
                match = pattern.search(self._text, self.open_from, partial=True, timeout=MATCH_SECONDS)
            except TimeoutError:
                message = f"the {{stop_regex}} {{pattern}} took over {MATCH_SECONDS} s to search; simplify it"
                facts = {"pattern": f"{pattern.pattern!r:.80}"}
                raise RequestError(message, param="stop_regex", facts=facts) from None
            if match is None:
                continue
            if match.partial:
                open_from = min(open_from, match.start())
            else:
                matches.append((match.end(), match.start(), pattern.pattern))
        self.open_from = max(open_from, len(self._text) - LONGEST_MATCH)
        return min(matches, key=lambda match: match[:2], default=None)


class ReplyDecoder:
    """Turns one reply's tokens into text that may be sent at once, and ends it at a stop string or expression.

    However the tokens are split over `push`, all that `push` and `flush` return is the text of the tokens up to
    the stop that is complete first; of several that end at one character, the longest. The first `min_tokens`
    tokens hold no stop, nor the beginning of one.

    `matched` is that stop, None until there is one. `kept` is then how many tokens hold the text before it. With
    `include_stop` the text ends after the stop, which is still sent only once it is complete, and `kept` counts so.
    """

    def __init__(
        self,
        decoder: Decoder,
        stop: tuple[str, ...] = (),
        stop_regex: tuple[str, ...] = (),
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        self.matched: str | None = None
        self.kept = 0
        self._decoder = decoder
        self._stop = stop
        self._expressions = Expressions(stop_regex) if stop_regex else None
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._ends_early = bool(stop or stop_regex)
        self._beginnings = beginnings(stop)
        self._held = ""  # text that could begin a stop
        self._length = 0  # characters of text so far, and per token those up to and with it
        self._ends: list[int] = []

    @property
    def decoder(self) -> Decoder:
        """What `push` does, where nothing ends the reply early."""
        return self._decoder

    @property
    def used(self) -> int:
        """Tokens read up to and with the one that completed `matched`."""
        return len(self._ends)

    def push(self, ids: Sequence[int]) -> str:
        """Take tokens; return the text that they make certain, in whole characters."""
        if not self._ends_early:
            return self._decoder.push(ids)
        released = ""
        for id in ids:  # one by one, for `kept`
            if self.matched is not None:
                break
            text = self._decoder.push((id,))
            self._length += len(text)
            self._ends.append(self._length)
            released += self._scan(text)
        return released

    def flush(self) -> str:
        """The reply has ended: return what is held. `matched` may become set, by a last, broken character."""
        if self.matched is not None:
            return ""
        text = self._decoder.flush()
        if not self._ends_early:
            return text
        released = ""
        if text:
            self._length += len(text)
            self._ends[-1] = self._length
            released = self._scan(text)
        held, self._held = self._held, ""
        return released + held

    def _scan(self, new: str) -> str:
        """Add `new` to the held text; return what of both is safe, holding back a possible beginning."""
        if len(self._ends) <= self._min_tokens:
            if self._expressions is not None:
                self._expressions.skip(new)
            return new
        text = self._held + new
        start = self._length - len(text)  # of `text` in the reply
        matches = [(start + at + len(word), start + at, word) for word in self._stop if (at := text.find(word)) >= 0]
        safe = len(text)
        for beginning in self._beginnings.get(text[-1:], ()):
            if text.endswith(beginning):
                safe -= len(beginning)
                break
        if self._expressions is not None:
            if match := self._expressions.search(new):
                matches.append(match)
            safe = min(safe, self._expressions.open_from - start)
        if matches:
            end, before, self.matched = min(matches, key=lambda match: match[:2])
            cut = end if self._include_stop else before
            self.kept = bisect_left(self._ends, cut) + 1 if cut else 0
            safe = cut - start
        self._held = "" if matches else text[safe:]
        return text[:safe]
