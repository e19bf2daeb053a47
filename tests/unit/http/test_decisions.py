"""/v1/decisions through the openai client, to the fake device, whose log-probability of a token is `logprob`."""

import math
import typing
from typing import Any

import msgspec
import openai
import pytest
from openai.types import decision_create_params
from test_http import client
from test_http_choices import logprob, served

from engine.conversation.media import Placed, scored_after
from engine.conversation.parts import Call, Image, Message, Text, Video, said
from engine.errors import RequestError
from engine.http.openai.decisions import DecisionItem, DecisionsBody, messages_of
from engine.lang.server import in_openai_items
from engine.runtime.choices import Scores
from engine.runtime.decisions import MOST_SCORED, Option, Question, check_questions, job_of, probabilities

pytestmark = pytest.mark.anyio
TICKET = "I was charged twice. Please help."
PREDICATE: Any = {"type": "predicate", "name": "refund", "instructions": "A refund is due."}
CHOICE: Any = {
    "type": "choice", "name": "topic", "instructions": "What is it about?",
    "choices": [{"value": "billing", "description": "money"}, {"value": "bug"}, {"value": True}],
}  # fmt: skip
SCORE: Any = {
    "type": "score", "instructions": [{"type": "input_text", "text": "How urgent?"}],
    "levels": [{"label": "low"}, {"label": "medium"}, {"label": "high", "description": "now"}],
}  # fmt: skip

ASKED = (  # the same
    Question("predicate", "A refund is due."),
    Question("choice", "What is it about?", (Option("billing", "money"), Option("bug"), Option("true"))),
    Question("score", "How urgent?", (Option("low"), Option("medium"), Option("high", "now"))),
)


def shares(prompt: int, *texts: str) -> list[float]:
    """The probabilities of texts behind a prompt of so many tokens."""
    total = [sum(logprob(byte, prompt + place) for place, byte in enumerate(text.encode())) for text in texts]
    weights = [math.exp(each) for each in total]
    return [weight / sum(weights) for weight in weights]


async def test_each_kind_of_question_is_answered_behind_one_input() -> None:
    async with served() as (url, house), client(url) as api:
        answer = await api.decisions.create(model="echo", input=TICKET, questions=[PREDICATE, CHOICE, SCORE])
        assert house.front.text is not None
        lengths = []
        for question in ASKED:
            job = job_of([said("user", TICKET)], question)
            lengths.append(len(house.front.text.encode_chat(job.messages or [], **job.options)))
    refund, topic, urgency = answer.answers
    assert (refund.type, refund.name, topic.type, topic.name) == ("predicate", "refund", "choice", "topic")
    assert refund.type == "predicate" and refund.probability == pytest.approx(shares(lengths[0], "Yes", "No")[0])
    assert topic.type == "choice"
    expected = shares(lengths[1], "billing", "bug", "true")
    assert [each.probability for each in topic.probabilities] == pytest.approx(expected)
    assert [each.value for each in topic.probabilities] == ["billing", "bug", True]
    assert topic.confidence == pytest.approx(max(expected))
    assert topic.choice == ["billing", "bug", True][expected.index(max(expected))]
    assert urgency.type == "score" and urgency.name is None
    expected = shares(lengths[2], "low", "medium", "high")
    assert urgency.score == pytest.approx(expected[1] + 2 * expected[2])
    assert [(each.label, each.value) for each in urgency.probabilities] == [("low", 0), ("medium", 1), ("high", 2)]
    usage = answer.usage
    assert usage.input_tokens == sum(lengths) + len("No") + len("bug") + len("low")
    assert (usage.output_tokens, usage.total_tokens) == (0, usage.input_tokens)
    assert (
        usage.input_tokens_details.cache_write_tokens + usage.input_tokens_details.cached_tokens == usage.input_tokens
    )


async def test_every_kind_of_item_of_an_input_is_read() -> None:
    items: Any = [
        {"role": "developer", "content": "Judge."},
        {"role": "user", "content": [
            {"type": "input_text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit"}},
            {"type": "input_json", "data": [{"b": 1}]},
        ]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "c"}, {"type": "refusal", "refusal": "d"}],
         "phase": "final_answer"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "e"}]},
        {"type": "custom_tool_call", "call_id": "2", "name": "g", "input": "h"},
        {"type": "custom_tool_call_output", "call_id": "2", "output": "i"},
    ]  # fmt: skip
    async with served() as (url, _), client(url) as api:
        answer = await api.decisions.create(
            model="echo", input=items, questions=[PREDICATE], prompt_cache_key="k", safety_identifier="s",
            prompt_cache_options={"mode": "implicit", "ttl": "30m"},
        )  # fmt: skip
    assert answer.answers[0].type == "predicate" and 0 < answer.answers[0].probability < 1


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"questions": []}, "questions"),
        ({"questions": [{**CHOICE, "choices": [{"value": "a"}]}]}, "choices"),
        ({"questions": [{**CHOICE, "choices": [{"value": "a"}, {"value": "a"}]}]}, "an option twice"),
        ({"questions": [{**SCORE, "levels": [{"label": "a"}, {"label": " "}]}]}, "has an empty text"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f"}]}, "input[0].arguments is missing"),
        ({"input": []}, "input is empty"),
        (
            {"questions": [{**PREDICATE, "instructions": [{"type": "input_image", "image_url": "data:,"}]}]},
            "has an image or a video; put it into input",
        ),
    ],
)
async def test_what_cannot_be_decided_is_refused(asked: dict, says: str) -> None:
    async with served() as (url, _), client(url) as api:
        with pytest.raises(openai.BadRequestError) as refused:
            await api.decisions.create(**{"model": "echo", "input": "x", "questions": [PREDICATE], **asked})
    assert says in str(refused.value)


def test_every_field_of_the_openai_client_is_known() -> None:
    params = decision_create_params
    assert set(typing.get_type_hints(params.DecisionCreateParams)) <= set(DecisionsBody.__struct_fields__)
    for item in typing.get_args(params.InputUnionMember1):
        assert set(typing.get_type_hints(item)) <= set(DecisionItem.__struct_fields__)


def test_an_option_that_others_go_on_from_has_what_they_leave() -> None:
    one = Scores([1], [math.log(0.6)])
    ten = Scores([1, 0], [math.log(0.6), math.log(0.25)])
    two = Scores([2], [math.log(0.1)])
    assert probabilities([one, ten, two]) == pytest.approx([0.45 / 0.7, 0.15 / 0.7, 0.1 / 0.7])


def test_a_boolean_and_a_string_of_one_text_share_what_it_has() -> None:
    question = Question("choice", "?", (Option("true"), Option("true"), Option("no")))
    likely = question.probabilities([Scores([1], [math.log(0.6)]), Scores([2], [math.log(0.4)])])
    assert likely == pytest.approx([0.3, 0.3, 0.4])


def test_the_input_is_the_beginning_of_every_prompt() -> None:
    both = [job_of([said("system", "s"), said("user", "input")], Question("predicate", each)) for each in "ab"]
    texts = [[message.text for message in job.messages or []] for job in both]
    assert [text[0] for text in texts] == ["s", "s"] and all(text[1].startswith("input\n") for text in texts)
    answered = job_of([Message("user", ()), said("assistant", "x")], Question("predicate", "a"))
    assert [message.role for message in answered.messages or []] == ["user", "assistant", "user"]


def test_a_chat_becomes_items_and_the_same_messages_again() -> None:
    """What `decide` sends of a program that has shown media and called a tool."""
    shown = [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": {"url": "data:,i"}},
        {"type": "video_url", "video_url": {"url": "data:,v"}},
    ]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": shown},
        {"role": "assistant", "content": "wait", "tool_calls": [call]},
        {"role": "tool", "content": "r", "tool_call_id": "1"},
        {"role": "assistant", "content": [{"type": "text", "text": "so"}]},
    ]
    read = messages_of(msgspec.convert(in_openai_items(chat), list[DecisionItem]))
    assert [message.role for message in read] == ["system", "user", "assistant", "tool", "assistant"]
    assert [[*message.shown] for message in read] == [
        [Text("s")],
        [
            Text("see"),
            Image("data:,i", "input[1].content[1]", "input_image"),
            Video("data:,v", "input[1].content[2]", "input_video"),
        ],
        [Text("wait")],
        [Text("r")],
        [Text("so")],
    ]
    assert (read[2].calls, read[3].answers) == ([Call("f", "{}", "1")], "1")


@pytest.mark.parametrize(("asked", "after"), [(3, 3), (99, 11), (-3, 9), (-13, 0)])
def test_what_is_scored_is_counted_from_the_beginning_or_from_the_end(asked: int, after: int) -> None:
    assert scored_after(asked, 12, Placed([])) == after


def test_a_choice_that_changes_what_comes_before_a_picture_is_refused() -> None:
    placed = Placed([], spans=(((2, 3),), ((6, 2),)))
    assert scored_after(-5, 12, placed) == 7
    with pytest.raises(RequestError, match="something else before an image"):
        scored_after(-6, 12, placed)


def test_too_many_options_together_are_refused() -> None:
    many = [Question("choice", "?", tuple(Option(str(index)) for index in range(255)))] * (MOST_SCORED // 255 + 1)
    with pytest.raises(RequestError, match="1275 options together, and at most 1024"):
        check_questions(many)
