"""An error says the same fault in the words of whichever API is asked, wherever in the engine it was found."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import RequestError, Words
from engine.messages.reply import Failed

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
