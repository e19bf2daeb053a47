"""However a reply's tokens come, in whatever steps, a stream of it says what the whole reply says, in each API.

Text in UTF-8 with characters cut in two, stop strings and expressions, log-probabilities, finish reasons, usage.
"""

from array import array
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from test_reply_decoder import BYTE_LEVEL, PATTERNS, byte_level_ids, split

from engine.actors.detokenizer import Replies
from engine.http.native.generate import NativeReply, Scores
from engine.http.openai.replies import OpenAIReply, Wording
from engine.messages.reply import Chunk, Finish, Tokens
from engine.messages.request import Open
from engine.runtime.front import joined
from engine.testing.fake import made_up

PROMPT = BYTE_LEVEL.encode("hello é")


@st.composite
def asked(draw: Any) -> dict[str, Any]:
    """What a request asks for, and the tokens it gets: the last may be a stop id."""
    return {
        "ids": draw(byte_level_ids.filter(bool)),
        "splits": draw(st.lists(st.integers(0, 24), max_size=8)),
        "stop": draw(st.lists(st.sampled_from(["hello", "a", "é", "lo h"]), max_size=1).map(tuple)),
        "stop_regex": draw(st.lists(st.sampled_from(PATTERNS), max_size=1).map(tuple)),
        "min_tokens": draw(st.sampled_from([0, 0, 3])),
        "echo": draw(st.sampled_from(["", "hello é"])),
        "top": draw(st.sampled_from([None, 0, 2])),
        "prompt_top": draw(st.sampled_from([None, 0, 2])),
        "skip": draw(st.booleans()),
        "include": draw(st.booleans()),
        "finish": draw(st.sampled_from(["stop", "length", "abort"])),
    }


def chunks_of(ask: dict[str, Any], parts: list[list[int]]) -> list[Chunk]:
    """What the detokenizer says of a reply that comes in `parts`."""
    replies = Replies(BYTE_LEVEL)
    prompt = None if ask["prompt_top"] is None else array("i", PROMPT).tobytes()
    stops = (ask["stop"], ask["stop_regex"], ask["min_tokens"])
    kinds = {"skip_special_tokens": ask["skip"], "include_stop": ask["include"]}
    replies.open(Open("r", len(PROMPT), *stops, ask["echo"], prompt, **kinds))
    made: list[Chunk] = []
    at, first = len(PROMPT), True
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        matched = part[-1] if ask["finish"] == "stop" and part else None
        finish = Finish(0, ask["finish"], matched) if last else None
        scored = () if ask["top"] is None or not part else (made_up(0, at, array("i", part), ask["top"]),)
        prompt_scored = ()
        if first and part and ask["prompt_top"] is not None and len(PROMPT) > 1:
            prompt_scored = (made_up(0, 1, array("i", PROMPT[1:]), ask["prompt_top"]),)
        cached = ((0, 2),) if first and part else ()
        first, at = first and not part, at + len(part)
        counts, tokens = array("i", [len(part)]).tobytes(), array("i", part).tobytes()
        prefills = ((0, 0.25),) if cached else ()
        columns = ((finish,) if finish else (), cached, scored, prompt_scored, (), prefills)
        step = Tokens(number, ["r"], counts, tokens, *columns)
        made += replies.tokens(step)[0]
    return made


def decoded(events: bytes) -> list[Any]:
    *data, done, end = events.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [msgspec.json.decode(event.removeprefix("data: ")) for event in data]


def summed(events: list[dict[str, Any]], chat: bool) -> dict[str, Any]:
    """The choice that a client puts together from the events of a stream; with a chat's log-probabilities of the
    prompt, which stand beside it."""
    beside = ("prompt_logprobs",)
    choices = [event["choices"][0] | {name: event[name] for name in beside if name in event} for event in events]
    whole = dict(choices[-1], logprobs=None)
    whole["text"] = "".join(choice.pop("delta").get("content", "") if chat else choice["text"] for choice in choices)
    whole.pop("delta", None)
    for choice in choices:
        whole |= {"prompt_logprobs": choice["prompt_logprobs"]} if "prompt_logprobs" in choice else {}
        for name, values in (choice["logprobs"] or {}).items():
            told = whole["logprobs"] = whole["logprobs"] or {}
            told[name] = told.get(name, []) + values if isinstance(values, list) else values
    return whole


@given(asked(), st.booleans())
def test_an_openai_stream_says_what_the_whole_says(ask: dict[str, Any], chat: bool) -> None:
    ids = ask["ids"]
    parts = split(ids, sorted(min(place, len(ids) - 1) for place in ask["splits"]))
    wording = Wording(
        chat=chat, usage=True, logprobs=ask["top"] is not None, prompt_logprobs=ask["prompt_top"] is not None,
        echo=bool(ask["echo"]),
    )  # fmt: skip
    pieces, at_once = chunks_of(ask, parts), chunks_of(ask, [ids])
    seconds = [chunk.prefill_seconds for chunk in pieces if chunk.ids]
    assert seconds == [0.25, *[None] * (len(seconds) - 1)][: len(seconds)]  # with the first token, once
    assert joined(pieces).prefill_seconds == joined(at_once).prefill_seconds
    whole = msgspec.json.decode(OpenAIReply("r", "m", wording).whole([joined(at_once)]))
    streaming = OpenAIReply("r", "m", wording)
    *events, usage = decoded(b"".join(streaming.event((0, chunk)) for chunk in pieces))
    (choice,) = whole["choices"]
    if chat:
        choice["text"] = choice.pop("message")["content"]
        choice |= {"prompt_logprobs": whole["prompt_logprobs"]} if "prompt_logprobs" in whole else {}
    told = summed(events, chat)
    if choice["logprobs"] is not None and told["logprobs"] is None:  # a reply without a token: nothing to stream
        assert not any(choice["logprobs"].values())
        del choice["logprobs"], told["logprobs"]
    assert told == choice
    assert usage["usage"] == whole["usage"]


@given(asked())
def test_the_last_native_event_is_the_whole(ask: dict[str, Any]) -> None:
    ids = ask["ids"]
    parts = split(ids, sorted(min(place, len(ids) - 1) for place in ask["splits"]))
    start = -1 if ask["prompt_top"] is None else 1
    scores = Scores(ask["top"] is not None, start, ask["top"] or 0, True)
    streaming = NativeReply(["r"], [scores], listed=False)
    events = decoded(b"".join(streaming.event((0, chunk)) for chunk in chunks_of(ask, parts)))
    whole = NativeReply(["r"], [scores], listed=False).whole([joined(chunks_of(ask, [ids]))])
    assert events[-1] == msgspec.json.decode(whole)


@given(asked())
def test_no_stream_says_what_it_must_not(ask: dict[str, Any]) -> None:
    """What is sent at any time is a beginning of the whole reply: nothing of a stop is sent and taken back."""
    (whole,) = [joined(chunks_of(ask, [ask["ids"]]))]
    said = ""
    for chunk in chunks_of(ask, [[id] for id in ask["ids"]]):
        said += chunk.text
        assert whole.text.startswith(said)
    assert said == whole.text
