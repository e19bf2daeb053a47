"""The bounds of SamplingParams: both ends are accepted, what is beyond them is refused by name."""

import math
from typing import Any

import msgspec
import pytest

from engine.errors import RequestError, Words
from engine.http.anthropic.messages import MessagesBody
from engine.http.native.generate import NativeSampling
from engine.http.openai.chat import ChatBody
from engine.http.openai.completions import CompletionBody
from engine.http.responses.bodies import ResponsesBody
from engine.params.defaults import model_defaults
from engine.params.grammar import Grammar, keywords_of
from engine.params.sampling import (
    ANTHROPIC,
    CHAT,
    COMPLETIONS,
    FIELDS,
    NATIVE,
    RESPONSES,
    Api,
    SamplingDefaults,
    SamplingParams,
    check_sampling,
)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0, "top_p": 1e-9, "min_p": 0, "top_k": -1, "max_tokens": 1, "seed": -(2**63)},
        {"temperature": 2.0, "top_p": 1, "min_p": 1.0, "top_k": 2**31 - 1, "seed": 2**63 - 1, "max_tokens": 2**31 - 1},
        {"stop": ("a",) * 16, "stop_token_ids": (0, 2**31 - 1), "ignore_eos": True},
        {
            "stop_regex": ("a+b", r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}", r"(\w+\s)+\w{3}", "(?i)end"),
            "min_tokens": 5,
            "max_tokens": 5,
            "bad_words": ("x",) * 128,
        },
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 10, "logit_bias": {0: -100, 9: 100}},
        {"allowed_token_ids": (3,), "logprobs": 0, "prompt_logprobs": 20},
    ],
)
def test_accepted(fields: dict[str, Any]) -> None:
    check_sampling(SamplingParams(**fields))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-0.1, 2.1, math.nan, math.inf, -math.inf, True, "1")),
        *(("top_p", value) for value in (0, 0.0, -1, 1.1, math.nan)),
        *(("min_p", value) for value in (-0.1, 1.1, math.nan)),
        *(("top_k", value) for value in (-2, 2**31, 1.0, True)),
        *(("seed", value) for value in (2**63, -(2**63) - 1, 1.5)),
        *(("max_tokens", value) for value in (0, -1, 2**31, False)),
        *(("stop", value) for value in (("",), ("a",) * 17, "word", ("a" * 1025,), (b"a",))),
        *(("stop_token_ids", value) for value in ((-1,), (2**31,), (1.0,), (0,) * 1025)),
        ("ignore_eos", 1),
        *(("stop_regex", value) for value in (("(",), ("a*",), ("",), ("a",) * 5, "a", ("a{99999999999999999999}",))),
        *(("stop_regex", ("(?:" * 20 + "a" + end * 20,)) for end in (")+", "){1,}", "){2}", ")(?#)+")),
        *(("stop_regex", (value,)) for value in ("(a{1000}){1000}", "(?ix)a", "(?V1x:a)")),
        *(("min_tokens", value) for value in (-1, 2**31, 1.0)),
        *(("presence_penalty", value) for value in (-2.1, 2.1, math.nan, None)),
        ("frequency_penalty", 3),
        *(("repetition_penalty", value) for value in (0, -1, 10.1)),
        *(("logit_bias", value) for value in ({1: 101}, {-1: 0}, {"1": 0}, [1], dict.fromkeys(range(1025), 0.0))),
        *(("bad_words", value) for value in (("",), "x", ("x",) * 129)),
        *(("allowed_token_ids", value) for value in ((-1,), (True,))),
        *((field, value) for field in ("logprobs", "prompt_logprobs") for value in (-1, 21, True)),
    ],
)
def test_refused(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{field} is .*; it must be .* \\(.*\\)$") as caught:
        check_sampling(SamplingParams(**{field: value}))
    assert (caught.value.param, caught.value.status) == (field, 400)


def test_the_clients_own_name_is_used() -> None:
    with pytest.raises(RequestError, match=r"^max_tokens is 0") as caught:
        check_sampling(SamplingParams(max_tokens=0))
    told = caught.value.worded(Words(NATIVE.names))
    assert told.message.startswith("max_new_tokens is 0;") and told.param == "max_new_tokens"


def test_min_tokens_within_max_tokens() -> None:
    with pytest.raises(RequestError, match=r"^min_tokens is 6; it must be a whole number from 0 to 5"):
        check_sampling(SamplingParams(max_tokens=5, min_tokens=6))


@pytest.mark.parametrize(
    ("generation", "defaults"),
    [
        ({}, SamplingDefaults()),
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20}, SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20)),
        ({"min_p": 0.1, "repetition_penalty": 1.05}, SamplingDefaults(min_p=0.1, repetition_penalty=1.05)),
        ({"max_new_tokens": 512, "do_sample": True}, SamplingDefaults(max_new_tokens=512)),
        ({"do_sample": False, "temperature": 0.6, "top_k": 5}, SamplingDefaults(temperature=0.0, top_k=5)),
        ({"temperature": None, "top_k": None, "bos_token_id": 1, "eos_token_id": [2]}, SamplingDefaults()),
    ],
)
def test_the_defaults_that_a_model_states(generation: dict[str, Any], defaults: SamplingDefaults) -> None:
    assert model_defaults(generation) == (defaults, [])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-1, 2.5, "0.6", True, [1], math.nan)),
        *(("top_p", value) for value in (0, 1.5)),
        *(("top_k", value) for value in (-5, 2.5)),
        ("min_p", 3),
        ("repetition_penalty", 0),
        *(("max_new_tokens", value) for value in (0, 1.5, 2**40)),
        ("do_sample", "no"),
    ],
)
def test_a_default_out_of_bounds_is_named_and_the_others_stand(field: str, value: Any) -> None:
    others = {"top_k": 7} if field == "temperature" else {"temperature": 0.5}
    defaults, (sentence,) = model_defaults({**others, field: value})
    assert defaults == SamplingDefaults(**others)  # type: ignore[arg-type]
    assert sentence.startswith(f"{field} is ")


def test_what_a_request_says_wins() -> None:
    model = SamplingDefaults(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.1)
    said = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
    assert model.under(said) == SamplingDefaults()
    assert model.under(SamplingParams()) == model
    assert model.under(SamplingParams(top_k=-1)).top_k == -1


@pytest.mark.parametrize(
    ("api", "body"),
    [
        (CHAT, ChatBody),
        (COMPLETIONS, CompletionBody),
        (NATIVE, NativeSampling),
        (RESPONSES, ResponsesBody),
        (ANTHROPIC, MessagesBody),
    ],
)
def test_a_body_has_the_fields_of_the_table(api: Api, body: type[msgspec.Struct]) -> None:
    names = {name for name, _ in api.columns}
    assert names <= set(body.__struct_fields__)
    assert {field.name for _, field in api.columns} == set(api.names) <= {field.name for field in FIELDS}


def test_names_of_one_field_are_one_field() -> None:
    body = msgspec.convert({"messages": [], "repeat_penalty": 1.5, "stop": "x", "logit_bias": {3: 1}}, ChatBody)
    said = {"repetition_penalty": 1.5, "stop": ("x",), "logit_bias": {3: 1.0}}
    assert CHAT.given(body) == (said, {"repetition_penalty": "repeat_penalty"})
    both = msgspec.convert({"messages": [], "max_tokens": 3, "max_completion_tokens": 3}, ChatBody)
    assert CHAT.given(both) == ({"max_tokens": 3}, {})
    differ = msgspec.convert({"messages": [], "max_tokens": 3, "max_completion_tokens": 4}, ChatBody)
    with pytest.raises(RequestError, match="max_tokens is 3 and max_completion_tokens is 4; they mean the same"):
        CHAT.given(differ)
    assert CHAT.given(msgspec.convert({"messages": []}, ChatBody)) == ({}, {})


def test_a_keyword_makes_the_grammar() -> None:
    assert SamplingParams(regex="a+").grammar == Grammar("regex", "a+")
    assert SamplingParams(json_schema="{}", strict_schema=False).grammar == Grammar("json_schema", "{}", strict=False)
    assert SamplingParams(choice=(), regex=None, json_object=False).grammar is None
    with pytest.raises(RequestError, match="grammar and regex are given"):
        SamplingParams(regex="a", grammar=Grammar("json_object"))


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"json_object": True},
        {"json_schema": "{}", "strict_schema": False},
        {"regex": "a"},
        {"choice": ("a", "b")},
        {"structural_tag": "{}"},
    ],
)
def test_a_grammar_leads_back_to_its_keywords(keywords: dict[str, Any]) -> None:
    assert keywords_of(SamplingParams(**keywords).grammar) == keywords
