"""Sampling fields that a request leaves out have the model's defaults, over every API."""

import logging
from typing import Any

import aiohttp
import msgspec
import pytest
from http_front import FakeFront, serving, text_of

from engine.actors.tokenizer import Admission
from engine.config import resolve
from engine.messages.request import Generate
from engine.params.sampling import SamplingDefaults, SamplingParams
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.registry import Plugins
from engine.runtime.launch import say_sampling_defaults
from engine.text.fallback import sampling_defaults
from engine.text.tokenizer import Text

pytestmark = pytest.mark.anyio
MODEL = SamplingDefaults(temperature=0.25, top_p=0.5, top_k=3, min_p=0.125, repetition_penalty=1.5, max_new_tokens=9)


def admission() -> Admission:
    text = Text(open_checkpoint(Plugins.load(()), "echo").text(), defaults=MODEL)
    made = Admission(text)
    made.max_model_len = 100
    return made


def test_a_request_without_values_gets_the_models() -> None:
    _, admitted = admission().admit(Generate("r", SamplingParams(), text="hi"))
    used = admitted.sampling
    assert (used.temperature, used.top_p, used.top_k, used.min_p, used.repetition_penalty) == (0.25, 0.5, 3, 0.125, 1.5)
    assert admitted.max_new == 9


def test_a_requests_own_values_win() -> None:
    params = SamplingParams(temperature=1, top_p=1, top_k=-1, min_p=0, repetition_penalty=1, max_tokens=20)
    _, admitted = admission().admit(Generate("r", params, text="hi"))
    used = admitted.sampling
    assert (used.temperature, used.top_p, used.top_k, used.min_p, used.repetition_penalty) == (1, 1, 0, 0, 1)
    assert admitted.max_new == 20


def test_the_default_length_of_an_api_comes_before_the_models() -> None:
    _, admitted = admission().admit(Generate("r", SamplingParams(), text="hi", default_max_tokens=16))
    assert admitted.max_new == 16


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5}),
        ("/generate", {"text": "a"}),
    ],
)
async def test_no_api_has_values_of_its_own(path: str, body: dict[str, Any]) -> None:
    front = FakeFront()
    front.text = text_of("{{ messages[0].content }}")
    front.text.defaults = MODEL
    async with serving(front) as url, aiohttp.ClientSession(url) as session:
        async with session.post(path, json=body) as response:
            assert response.status == 200
            reply = await response.json()
        async with session.get("/model_info") as response:
            assert (await response.json())["sampling_defaults"] == msgspec.to_builtins(MODEL)
    said = front.asked[0].sampling
    assert {said.temperature, said.top_p, said.top_k, said.min_p, said.repetition_penalty} == {None}
    if path == "/v1/responses":  # which says the values in force
        assert (reply["temperature"], reply["top_p"]) == (0.25, 0.5)


def test_the_start_says_the_defaults_and_names_those_out_of_bounds(caplog: pytest.LogCaptureFixture) -> None:
    spec = open_checkpoint(Plugins.load(()), "echo").text()
    spec = msgspec.structs.replace(spec, generation={"temperature": 7, "top_p": 0.9})
    with caplog.at_level(logging.INFO):
        say_sampling_defaults(spec, resolve({}))
    assert sampling_defaults(spec, resolve({}))[0] == SamplingDefaults(top_p=0.9)
    wrong, said = caplog.messages
    assert "temperature is 7; it must be a number from 0 to 2" in wrong
    assert "top_p 0.9" in said and "--sampling-defaults openai" in said
    assert sampling_defaults(spec, resolve({"sampling_defaults": "openai"})) == (SamplingDefaults(), [])


def test_the_embedded_chat_model_has_its_cards() -> None:
    spec = open_checkpoint(Plugins.load(()), "smollm2-135m").text()
    assert spec.generation == {"temperature": 0.2, "top_p": 0.9}
