"""The reply decoder against `tokenizer.decode` of the whole: any tokens, any split, any stop strings."""

from collections.abc import Iterable
from itertools import chain

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.errors import RequestError
from engine.plugin.specs import TextSpec
from engine.text.decoding import LONGEST_MATCH, bytes_of
from engine.text.tokenizer import Text

SPECIAL = "<|end|>"
ADDED = "naïve word"  # an added token that is no special one: letters, a space and a character beyond ASCII


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello"), ("Ã", "©"), ("ð", "Ł")]
    tokens = [*alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(SPECIAL, special=True), AddedToken(ADDED)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdeho,.", "he", "▁he"]
    merges = [("h", "e"), ("▁", "he")]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    strip = decoders.Strip(" ", 1, 0)
    replace = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_tokens([AddedToken(SPECIAL, special=True)])
    return tokenizer


BYTE_LEVEL, BYTE_FALLBACK = (Text(TextSpec(make(), eos_ids=())) for make in (byte_level, byte_fallback))


def joined(parts: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


def split(ids: list[int], at: list[int]) -> list[list[int]]:
    return [ids[start:end] for start, end in zip([0, *at], [*at, len(ids)], strict=True)]


letters = st.sampled_from(["a", "b", "hello", " hello", "é", "ï", "漢", "😀", "\u200d", "\n", "\ufffd", "\u0301"])
texts = st.lists(letters, max_size=12).map("".join)
any_ids = st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=24)
text_ids = texts.map(BYTE_LEVEL.encode)
byte_level_ids = st.one_of(any_ids, text_ids, st.tuples(text_ids, any_ids, text_ids).map(joined))


def cut(whole: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, found one character at a time."""
    for end in range(len(whole) + 1):
        ending = [word for word in stop if whole[:end].endswith(word)]
        if ending:
            longest = max(ending, key=len)
            return whole[: end - len(longest)], longest
    return whole, None


@st.composite
def replies(draw, text: Text, ids: st.SearchStrategy) -> tuple[list[int], list[list[int]], tuple[str, ...]]:
    """Token ids, a split of them, and stop strings of which some occur."""
    whole = draw(ids)
    splits = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=len(whole))))
    parts = split(whole, splits)
    said = text.decode(whole)
    inside = st.tuples(st.integers(0, max(len(said) - 1, 0)), st.integers(1, 4)).map(lambda at: said[at[0] : sum(at)])
    words = st.one_of(inside, inside.map(lambda word: word + "x"), st.text("abé😀\ufffd", min_size=1, max_size=3))
    return whole, parts, tuple(word for word in draw(st.lists(words, max_size=3)) if word)


def check(text: Text, reply: tuple[list[int], list[list[int]], tuple[str, ...]]) -> None:
    ids, parts, stop = reply
    decoder = text.reply(stop)
    pushed = [decoder.push(part) for part in parts]
    said = "".join(pushed) + decoder.flush()
    expected, matched = cut(text.decode(ids), stop)
    assert said == expected
    assert decoder.matched == matched
    assert decoder.push(ids[:1]) == "" if matched else True
    if matched:
        assert text.decode(ids[: decoder.kept]).startswith(expected)
        if "\ufffd" not in text.decode(ids) and decoder.kept:
            assert not text.decode(ids[: decoder.kept - 1]).startswith(expected)


@given(replies(BYTE_LEVEL, byte_level_ids))
def test_byte_level_reply_is_the_whole_decoded_up_to_the_stop(reply):
    check(BYTE_LEVEL, reply)


@given(byte_level_ids)
def test_a_text_in_the_table_is_what_pushing_the_token_would_say(ids):
    decoder, other = BYTE_LEVEL.reply().decoder, BYTE_LEVEL.reply()
    for id in ids:
        text = decoder.texts[id]
        assert (decoder.push([id]) if text is None else text) == other.push([id])
    assert decoder.flush() == other.flush()


def test_a_token_of_whole_characters_is_in_the_table_unless_a_character_is_begun():
    decoder = BYTE_LEVEL.reply().decoder
    (letter,) = BYTE_LEVEL.encode("a")
    begins = next(id for id in range(BYTE_LEVEL.vocab_size) if BYTE_LEVEL.spelling[id] == b"\xc3")
    assert (decoder.texts[letter], decoder.texts[begins]) == ("a", None)
    assert decoder.push([begins]) == ""
    assert decoder.texts[letter] is None
    assert decoder.push([letter]) == "\ufffda"
    assert decoder.texts[letter] == "a"


valid_fallback_ids = st.lists(
    st.one_of(texts.map(BYTE_FALLBACK.encode), st.just([BYTE_FALLBACK.vocab_size - 1])), max_size=4
).map(joined)


@given(replies(BYTE_FALLBACK, valid_fallback_ids))
def test_byte_fallback_reply_is_the_whole_decoded_up_to_the_stop(reply):
    check(BYTE_FALLBACK, reply)


@given(st.lists(st.integers(0, BYTE_FALLBACK.vocab_size - 1), max_size=40))
def test_broken_byte_fallback_neither_raises_nor_waits_for_ever(ids):
    decoder = BYTE_FALLBACK.reply()
    for id in ids:
        decoder.push([id])
        assert len(decoder._decoder._ids) < 64
    decoder.flush()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("日本".encode()[:-1], "日\ufffd"),  # as a reply ends at max_tokens
        (b"\xe6" + "日本".encode(), "\ufffd日本"),
        ("日".encode() + b"\xe6" + "本".encode(), "日\ufffd本"),
        ("é".encode() * 20 + b"\xc3", "é" * 20 + "\ufffd"),
    ],
)
def test_a_broken_byte_leaves_the_characters_beside_it_whole(data, expected):
    ids = [BYTE_FALLBACK.id_of(f"<0x{byte:02X}>") for byte in data]
    assert BYTE_FALLBACK.decode(ids) == expected
    decoder = BYTE_FALLBACK.reply()
    assert "".join(decoder.push([id]) for id in ids) + decoder.flush() == expected


PATTERNS = ["a+b", "h.llo", "[ab]{2,}", r"e\s*h", "(?i)HE|o", r"\bhe", "b|a.*b", "(?<=o)a", "o$", "é|ï+b?", "😀{2}"]


def stopped(
    text: Text,
    ids: list[int],
    stop: tuple,
    patterns: tuple,
    min_tokens: int,
    *,
    skip: bool = True,
    include: bool = False,
) -> tuple[str, str | None]:
    """The text and what ends it, looked for in all of the text after each token."""
    decoder = text.reply(skip_special_tokens=skip)
    said, skipped = "", 0
    for count, id in enumerate([*ids, None], start=1):
        said += decoder.flush() if id is None else decoder.push([id])
        if min(count, len(ids)) <= min_tokens:
            skipped = len(said)
            continue
        found = [(said.find(word, skipped) + len(word), said.find(word, skipped), word) for word in stop]
        found = [match for match in found if match[1] >= 0]
        for pattern in patterns:
            if match := regex.search(pattern, said, pos=skipped):
                found.append((match.end(), match.start(), pattern))
        if found:
            end, start, matched = min(found, key=lambda match: match[:2])
            return said[: end if include else start], matched
    return said, None


@given(
    byte_level_ids,
    st.lists(st.integers(0, 24), max_size=5),
    st.lists(st.sampled_from(["hello", "a", "ob", "hé", SPECIAL, "d|>"]), max_size=1).map(tuple),
    st.lists(st.sampled_from(PATTERNS), max_size=2).map(tuple),
    st.sampled_from([0, 0, 1, 5]),
    st.booleans(),
    st.booleans(),
)
def test_however_tokens_are_split_the_first_stop_ends_the_reply(ids, at, stop, patterns, min_tokens, skip, include):
    parts = split(ids, sorted(min(place, len(ids)) for place in at))
    decoder = BYTE_LEVEL.reply(stop, patterns, min_tokens, skip_special_tokens=skip, include_stop=include)
    said = "".join([decoder.push(part) for part in parts]) + decoder.flush()
    expected = stopped(BYTE_LEVEL, ids, stop, patterns, min_tokens, skip=skip, include=include)
    assert (said, decoder.matched) == expected
    if include and decoder.matched is not None:
        assert decoder.kept == decoder.used


@pytest.mark.parametrize("text", [BYTE_LEVEL, BYTE_FALLBACK])
@given(data=st.data())
def test_special_tokens_are_shown_if_they_are_not_skipped(text, data):
    special = text.vocab_size - (2 if text is BYTE_LEVEL else 1)
    pieces = st.one_of(texts.map(text.encode), st.just([special]))
    ids = data.draw(st.lists(pieces, max_size=6).map(joined))
    for skip in (True, False):
        decoder = text.reply(skip_special_tokens=skip)
        said = "".join(decoder.push([id]) for id in ids) + decoder.flush()
        assert said == text.decode(ids, skip_special_tokens=skip)
        assert said.count(SPECIAL) == (0 if skip else ids.count(special))


def test_without_text_there_is_none():
    decoder = BYTE_LEVEL.reply(detokenize=False)
    assert (decoder.push(BYTE_LEVEL.encode("hello")), decoder.flush(), decoder.matched) == ("", "", None)


@pytest.mark.parametrize(
    ("pattern", "texts", "said", "matched"),
    [
        (r"\d{3}", ["a1", "2", "b", "12", "3"], ["a", "", "12b", "", ""], True),
        ("h.*o", ["ah", "b", "x", "o"], ["a", "", "", ""], True),
        ("foo|bar", ["fo", "b", "a", "x"], ["", "fo", "", "bax"], False),
        ("x", ["abc"], ["abc"], False),
    ],
)
def test_an_expression_holds_back_only_what_may_match(pattern, texts, said, matched):
    decoder = BYTE_LEVEL.reply((), (pattern,))
    assert [decoder.push(BYTE_LEVEL.encode(text)) for text in texts] == said
    assert (decoder.matched == pattern) == matched


def test_an_expression_holds_back_no_more_than_its_bound():
    for pattern, said in [("a.*z", LONGEST_MATCH + 50), ("a+z", 50)]:  # the only a is given up; the last ones are held
        text = ("a" + "b" * (LONGEST_MATCH + 49)) if pattern == "a.*z" else "a" * (LONGEST_MATCH + 50)
        decoder = BYTE_LEVEL.reply((), (pattern,))
        assert len(decoder.push(BYTE_LEVEL.encode(text))) == said
        assert decoder.push(BYTE_LEVEL.encode("z")) == ("z" if pattern == "a.*z" else "")


def test_an_expression_that_takes_too_long_is_an_error_of_the_request():
    decoder = BYTE_LEVEL.reply((), ("(a|a)*c",))
    with pytest.raises(RequestError, match=r"\(a\|a\)\*c.*simplify") as error:
        decoder.push(BYTE_LEVEL.encode("a" * 60 + "b"))
    assert error.value.param == "stop_regex"


@given(texts, st.lists(st.text("ab\nhelo", min_size=1, max_size=4), min_size=1, max_size=3))
def test_holds_back_only_what_may_begin_a_stop_string(text, stop):
    decoder = BYTE_LEVEL.reply(tuple(stop))
    said = ""
    for id in BYTE_LEVEL.encode(text):
        said += decoder.push([id])
        if decoder.matched:
            return
    held = text.removeprefix(said)
    starts = {word[:length] for word in stop for length in range(1, len(word))}
    assert held == max((start for start in starts if text.endswith(start)), key=len, default="")


@pytest.mark.parametrize(
    ("text", "stop", "said", "matched"),
    [
        ("hello a hello b", ("a hel",), "hello ", "a hel"),  # ends inside a token
        ("aab", ("ab",), "a", "ab"),  # a false start overlaps the match
        ("abcd", ("abcd", "bc"), "a", "bc"),  # complete first, though it begins later
        ("xabc", ("bc", "abc"), "x", "abc"),  # complete together: the longest
        ("ab", ("abc",), "ab", None),  # a beginning that stays one is released at the end
        ("a😀b", ("😀",), "a", "😀"),
    ],
)
def test_stop_strings(text, stop, said, matched):
    decoder = BYTE_LEVEL.reply(stop)
    assert "".join(decoder.push([id]) for id in BYTE_LEVEL.encode(text)) + decoder.flush() == said
    assert decoder.matched == matched


def test_kept_counts_the_tokens_before_the_stop():
    ids = BYTE_LEVEL.encode("hello hello a")
    assert len(ids) == 4
    for stop, kept in [(" a", 2), ("a", 3), ("lo a", 2), ("hello", 0), (" hello", 1)]:
        decoder = BYTE_LEVEL.reply((stop,))
        decoder.push(ids)
        assert (decoder.matched, decoder.kept) == (stop, kept)


def test_an_incomplete_character_waits_and_is_replaced_at_the_end():
    ids = BYTE_LEVEL.encode("😀")
    decoder = BYTE_LEVEL.reply()
    assert [decoder.push([id]) for id in ids] == ["", "", "😀"]
    decoder = BYTE_LEVEL.reply()
    assert decoder.push(ids[:-1]) == ""
    assert decoder.flush() == "\ufffd"


def test_empty_stop_string_is_refused():
    with pytest.raises(RequestError, match="empty string would end") as refusal:
        BYTE_LEVEL.reply(("a", ""))
    assert refusal.value.param == "stop"


# ── the bytes of tokens ──────────────────────────────────────────────────────────────────────


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_byte_level_tokens_are_the_bytes_of_their_text(text: str) -> None:
    written = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert b"".join(bytes_of(token) for token, _ in written) == text.encode()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_tokens_that_no_bytes_are_written_as_are_taken_as_they_are(text: str) -> None:
    added = text + " "  # a byte-level vocabulary writes a space as another character
    assert bytes_of(added) == added.encode()
