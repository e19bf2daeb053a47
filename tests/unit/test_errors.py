"""An error says the same fault in the words of whichever API is asked, wherever in the engine it was found."""

import re
from pathlib import Path

import msgspec
from hypothesis import given
from hypothesis import strategies as st

import engine.errors
from engine.errors import RequestError, Words, counted
from engine.messages.reply import Failed
from engine.params.lengths import prompt_too_long, reply_too_long

FIELD = "{max_tokens} is {given}; it must be {bound}, as {min_tokens} is"
FACTS = {"given": 7, "bound": "at most 5"}
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def test_an_error_is_told_in_the_words_of_an_api() -> None:
    error = RequestError(FIELD, param="max_tokens", code="c", status=409, facts=FACTS)
    assert str(error) == error.message == "max_tokens is 7; it must be at most 5, as min_tokens is"
    told = error.worded(Words({"max_tokens": "max_new_tokens", "seed": "sampling_seed"}))
    assert told.message == "max_new_tokens is 7; it must be at most 5, as min_tokens is"
    assert (told.param, told.code, told.status) == ("max_new_tokens", "c", 409)


def test_an_api_may_have_a_phrase_of_its_own() -> None:
    words = Words({"max_tokens": "limit"}, {FIELD: "too long: {given}; {message}"})
    error = RequestError(FIELD, param="max_tokens", facts=FACTS)
    assert error.worded(words).message == "too long: 7; limit is 7; it must be at most 5, as min_tokens is"
    assert error.worded(words.calling({"max_tokens": "cap"})).param == "cap"
    assert words.calling({}) is words


def test_an_error_of_one_of_several_prompts_begins_with_its_place_unless_it_names_it() -> None:
    words = Words({"max_tokens": "limit"}).at("text[3]", "prompt")
    long = prompt_too_long(9, 4).worded(words)
    assert long.param == "text[3]" and long.message.startswith("text[3]: the prompt has 9 tokens")
    assert RequestError("{prompt} is empty", param="prompt", facts={}).worded(words).message == "text[3] is empty"
    more = RequestError("{max_tokens} is 7", param="max_tokens", facts={}).worded(words.calling({"max_tokens": "cap"}))
    assert (more.param, more.message) == ("cap", "text[3]: cap is 7")
    assert RequestError("full; try again", status=503).worded(words).message == "full; try again"


def test_a_name_of_the_client_takes_the_place_of_a_fact() -> None:
    error = RequestError("{input} is empty", param="input", facts={"input": "the input"})
    assert (error.message, error.worded(Words({"input": "documents[1]"})).message) == (
        "the input is empty",
        "documents[1] is empty",
    )


@given(TEXT)
def test_what_is_no_template_is_told_as_it_is(text: str) -> None:
    error = RequestError(text, param="stop")
    told = error.worded(Words({"stop": "stop_sequences"}))
    assert (error.message, told.message, told.param) == (text, text, "stop_sequences")


@given(TEXT)
def test_a_fact_is_no_template(text: str) -> None:
    error = RequestError("{stop} is {given}", param="stop", facts={"given": text})
    assert error.worded(Words({"stop": "end"})).message == f"end is {text}"


def test_an_error_crosses_a_channel_with_its_facts() -> None:
    error = RequestError(FIELD, param="max_tokens", code="c", status=409, facts=FACTS)
    packed = msgspec.msgpack.encode(Failed.of("r", error))
    came = msgspec.msgpack.decode(packed, type=Failed).error
    assert came.worded(Words({"max_tokens": "n"})).message == error.worded(Words({"max_tokens": "n"})).message
    assert (came.param, came.code, came.status) == (error.param, error.code, error.status)


def test_one_thing_is_told_in_the_singular() -> None:
    said = [counted(count, "token") for count in (0, 1, 2)] + [counted(count, "entry", "entries") for count in (1, 2)]
    assert said == ["0 tokens", "1 token", "2 tokens", "1 entry", "2 entries"]
    assert str(reply_too_long(1, 64, 64)).startswith("the prompt has 1 token and max_tokens is 64, but the maximum ")
    assert "maximum context length is 64 tokens" in str(reply_too_long(1, 64, 64))
    assert "the prompt has 3 characters, which are at least 1 token, and" in str(prompt_too_long(1, 1, characters=3))


def test_a_count_before_a_plural_goes_through_counted() -> None:
    """Names of things that are counted, after a number that may be 1: `len(…)` or a %d."""
    things = "tokens|threads|requests|prompts|entries|messages|steps|rows|pages|bytes|files|texts|replies|characters"
    found = re.compile(rf"\{{len\([^{{}}]*\)\}} ({things})\b|%d ({things})\b")
    # These are many, or say 0: their bound is above 1.
    many = {"http/service.py", "http/openai/embeddings.py", "params/fields.py", "text/pool.py", "runtime/serve.py",
            "worker/profiling.py", "grammars/compiler.py"}  # fmt: skip
    root = Path(engine.errors.__file__).parent
    wrong = {
        f"{path.relative_to(root)}: {match[0]}"
        for path in root.rglob("*.py")
        if str(path.relative_to(root)) not in many
        for match in found.finditer(path.read_text())
    }
    assert not wrong
