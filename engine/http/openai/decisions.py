"""/v1/decisions, shaped as OpenAI's: questions about one input, answered with probabilities and without sampling.

Every question is asked behind the same input, which is computed once, and what may be answered is scored in one step
(engine/runtime/decisions.py). Left out: refusals, which a model that is only scored never gives.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal
from uuid import uuid4

import anyio.lowlevel
from aiohttp import web
from msgspec import Meta

from engine.conversation.parts import Call, Image, Message, Result, Shown, Text, Video
from engine.errors import RequestError, Words
from engine.http.fields import ECHO, LABEL, Rule
from engine.http.native.choices import planned_for, scored
from engine.http.openapi import Route
from engine.http.service import SERVICE, program_of, salt_of
from engine.http.sse import WORDS
from engine.http.tools import FEW_MESSAGES, input_messages
from engine.http.wire import Body, Priority, Reply, json_response
from engine.media.store import showing
from engine.messages.reply import Chunk
from engine.params.grammar import check_nesting
from engine.runtime.decisions import MOST_OPTIONS, MOST_QUESTIONS, Option, Question, check_questions, job_of

MARKED: Mapping[str, Rule] = {"prompt_cache_breakpoint": LABEL}


# ── bodies ───────────────────────────────────────────────────────────────────────────────────


class DecisionText(Body, tag_field="type", tag="input_text"):
    text: str
    prompt_cache_breakpoint: Any = None

    rules: ClassVar[Mapping[str, Rule]] = MARKED


class DecisionSaid(Body, tag_field="type", tag="output_text"):
    """What the assistant said."""

    text: str


class DecisionRefused(Body, tag_field="type", tag="refusal"):
    """That it declined."""

    refusal: str


class DecisionImage(Body, tag_field="type", tag="input_image"):
    """A picture, for a model that sees: a data: or an http(s): URL."""

    image_url: str
    detail: Literal["low", "high", "auto", "original"] | None = None
    prompt_cache_breakpoint: Any = None

    rules: ClassVar[Mapping[str, Rule]] = MARKED


class DecisionVideo(Body, tag_field="type", tag="input_video"):
    """A clip, as a picture: an extension."""

    video_url: str


class DecisionJson(Body, tag_field="type", tag="input_json"):
    """An object, or a list of these, which the model reads as text."""

    data: dict[str, Any] | list[dict[str, Any]]


PartBody = DecisionText | DecisionSaid | DecisionRefused | DecisionImage | DecisionVideo | DecisionJson
Content = str | list[PartBody]


class DecisionItem(Body):
    """A message, a call of a tool or of a custom tool, or what one returned.

    A message has `role` and `content`, a call `call_id`, `name`, and `arguments` or `input`, and what it returned
    `call_id` and `output`."""

    type: Literal["message", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output"] = (
        "message"
    )
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Content | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: Content | None = None
    namespace: Any = None
    id: Any = None
    status: Any = None
    phase: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {"namespace": ECHO, "id": ECHO, "status": ECHO, "phase": ECHO}


class DecisionChoice(Body):
    """What may be chosen: a string and a boolean of the same text differ."""

    value: str | bool
    description: str | None = None


class DecisionLevel(Body):
    label: str
    description: str | None = None


class PredicateQuestion(Body, tag_field="type", tag="predicate"):
    """How likely a statement about the input is true."""

    instructions: Content
    name: str | None = None


class ChoiceQuestion(Body, tag_field="type", tag="choice"):
    """Which of some choices fits the input."""

    instructions: Content
    choices: Annotated[list[DecisionChoice], Meta(min_length=2, max_length=MOST_OPTIONS)]
    name: str | None = None


class ScoreQuestion(Body, tag_field="type", tag="score"):
    """How the input rates on levels, the lowest first."""

    instructions: Content
    levels: Annotated[list[DecisionLevel], Meta(min_length=2, max_length=MOST_OPTIONS)]
    name: str | None = None


QuestionBody = PredicateQuestion | ChoiceQuestion | ScoreQuestion


class DecisionsBody(Body):
    """`cache_salt`, `priority` and `program` are extensions."""

    input: str | Annotated[list[DecisionItem], FEW_MESSAGES]
    questions: Annotated[list[QuestionBody], Meta(min_length=1, max_length=MOST_QUESTIONS)]
    model: str | None = None
    cache_salt: str | None = None
    program: str | None = None
    priority: Priority | None = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    safety_identifier: Any = None

    rules: ClassVar[Mapping[str, Rule]] = {
        "prompt_cache_key": LABEL,
        "prompt_cache_options": LABEL,
        "safety_identifier": LABEL,
    }


# ── replies ──────────────────────────────────────────────────────────────────────────────────


class PredicateAnswer(Reply, frozen=True, tag_field="type", tag="predicate"):
    name: str | None
    probability: float


class ChoiceProbability(Reply, frozen=True):
    value: str | bool
    probability: float


class ChoiceAnswer(Reply, frozen=True, tag_field="type", tag="choice"):
    """The likeliest choice; `confidence` is its probability."""

    name: str | None
    choice: str | bool
    confidence: float
    probabilities: list[ChoiceProbability]


class LevelProbability(Reply, frozen=True):
    """`value` is the level's place, the lowest is 0."""

    label: str
    value: int
    probability: float


class ScoreAnswer(Reply, frozen=True, tag_field="type", tag="score"):
    """`score` is the mean of the levels' values by their probabilities, `confidence` the highest of these."""

    name: str | None
    score: float
    confidence: float
    probabilities: list[LevelProbability]


class DecisionInputDetails(Reply, frozen=True):
    cache_write_tokens: int
    cached_tokens: int


class DecisionOutputDetails(Reply, frozen=True):
    reasoning_tokens: int = 0


class DecisionUsage(Reply, frozen=True):
    """The prompt of each question counts once, whatever may be answered."""

    input_tokens: int
    input_tokens_details: DecisionInputDetails
    total_tokens: int
    output_tokens: int = 0
    output_tokens_details: DecisionOutputDetails = DecisionOutputDetails()


class DecisionReply(Reply, frozen=True):
    """Answers in the order of the questions."""

    answers: list[PredicateAnswer | ChoiceAnswer | ScoreAnswer]
    model: str
    usage: DecisionUsage


# ── the handler ──────────────────────────────────────────────────────────────────────────────


async def decisions(request: web.Request, body: DecisionsBody) -> web.Response:
    """Answer questions about an input."""
    service = request.app[SERVICE]
    service.check_model(body.model)
    request[WORDS] = words = Words({"prompt": "input", "messages": "input"})
    questions = [question_of(each, f"questions[{index}]") for index, each in enumerate(body.questions)]
    check_questions(questions)
    rid = f"decision-{uuid4().hex}"
    fields: dict[str, Any] = {
        "cache_salt": salt_of(body.cache_salt), "priority": body.priority or 0,
        "program": program_of(request, body.program),
    }  # fmt: skip
    plans = []
    async with showing(service.front.media, rid, messages_of(body.input)) as (messages, media):
        for number, question in enumerate(questions):
            job, texts, place = job_of(messages, question), question.texts, f"questions[{number}]"
            own = fields | {"media": media, "places": [place] * len(texts)}
            try:
                plans.append(await planned_for(service, job, texts, f"{rid}-{number}", **own))
            except RequestError as error:
                raise error.worded(words.at(place)) from None
            await anyio.lowlevel.checkpoint()  # each may take milliseconds, and there may be hundreds
        replies = await scored(request, plans, "decisions")
    answers, owns, at = [], [], 0
    for asked, question, plan in zip(body.questions, questions, plans, strict=True):
        owns.append(replies[at : at + len(plan.jobs)])
        at += len(plan.jobs)
        answers.append(answer_of(asked, question, question.probabilities(plan.read(owns[-1]))))
    return json_response(DecisionReply(answers, body.model or service.models[0], usage_of(owns)))


def answer_of(
    asked: QuestionBody, question: Question, likely: Sequence[float]
) -> PredicateAnswer | ChoiceAnswer | ScoreAnswer:
    """The answer to `question`, whose options are so `likely`."""
    match asked:
        case PredicateQuestion():
            return PredicateAnswer(asked.name, likely[0])
        case ChoiceQuestion(choices=choices):
            best = max(range(len(likely)), key=likely.__getitem__)
            told = [ChoiceProbability(each.value, share) for each, share in zip(choices, likely, strict=True)]
            return ChoiceAnswer(asked.name, choices[best].value, likely[best], told)
        case ScoreQuestion(levels=levels):
            rated = [
                LevelProbability(each.label, value, share)
                for value, (each, share) in enumerate(zip(levels, likely, strict=True))
            ]
            return ScoreAnswer(asked.name, sum(each.value * each.probability for each in rated), max(likely), rated)


def usage_of(replies: Sequence[Sequence[Chunk]]) -> DecisionUsage:
    """The tokens of all questions, each by the replies to its options."""
    read = sum(min(each.prompt_tokens for each in own) for own in replies)
    cached = sum(min(each.cached_tokens for each in own) for own in replies)
    return DecisionUsage(read, DecisionInputDetails(read - cached, cached), read)


def question_of(body: QuestionBody, path: str) -> Question:
    """What is asked. Raises RequestError for choices that are not told apart."""
    shown = parts_of(body.instructions, f"{path}.instructions")
    if any(not isinstance(part, Text) for part in shown):
        raise RequestError(
            f"{path}.instructions has an image or a video; put it into input", param=f"{path}.instructions"
        )
    instructions = "".join(part.text for part in shown if isinstance(part, Text))
    match body:
        case PredicateQuestion():
            return Question("predicate", instructions)
        case ChoiceQuestion(choices=choices):
            kind, field, values = "choice", "choices", [each.value for each in choices]
            options = tuple(Option(text_of(each.value), each.description or "") for each in choices)
            keys: list[Any] = [(type(value), value) for value in values]
        case ScoreQuestion(levels=levels):
            kind, field = "score", "levels"
            options = tuple(Option(each.label, each.description or "") for each in levels)
            keys = [each.label for each in levels]
    if len(set(keys)) < len(keys):
        raise RequestError(f"{path}.{field} has an option twice; each must be unique", param=f"{path}.{field}")
    return Question("choice" if kind == "choice" else "score", instructions, options)


def text_of(value: str | bool) -> str:
    """A choice in words."""
    return value if isinstance(value, str) else "true" if value else "false"


def messages_of(input: str | list[DecisionItem]) -> list[Message]:
    """`input` as messages; calls are part of what the assistant said."""
    return input_messages(input, _message)


NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "custom_tool_call": ("call_id", "name", "input"),
    "custom_tool_call_output": ("call_id", "output"),
}


def _message(item: DecisionItem, path: str) -> Message:
    for field in NEEDED[item.type]:
        if getattr(item, field) is None:
            raise RequestError(f"{path}.{field} is missing; a {item.type} needs one", param=f"{path}.{field}")
    match item.type:
        case "function_call":
            return Message("assistant", (Call(item.name or "", item.arguments or "", item.call_id),))
        case "custom_tool_call":  # its input is any text; to the model it is an argument
            return Message("assistant", (Call(item.name or "", json.dumps({"input": item.input}), item.call_id),))
        case "function_call_output" | "custom_tool_call_output":
            return Message("tool", (Result(item.call_id, parts_of(item.output, f"{path}.output")),))
    role = "system" if item.role == "developer" else item.role or "user"
    return Message(role, parts_of(item.content, f"{path}.content"))


def parts_of(content: Content | None, path: str) -> tuple[Shown, ...]:
    """A text or a list of parts, as the model is shown them."""
    if isinstance(content, str):
        return (Text(content),) if content else ()
    found: list[Shown] = []
    for index, part in enumerate(content or ()):
        match part:
            case DecisionText(text=text) | DecisionSaid(text=text) | DecisionRefused(refusal=text):
                found.append(Text(text))
            case DecisionJson(data=data):
                check_nesting(data, f"{path}[{index}].data")
                found.append(Text(json.dumps(data, ensure_ascii=False)))
            case DecisionImage():
                detail = None if part.detail == "original" else part.detail
                found.append(Image(part.image_url, f"{path}[{index}]", "input_image", detail))
            case DecisionVideo(video_url=url):
                found.append(Video(url, f"{path}[{index}]", "input_video"))
    return tuple(found)


ROUTES = (Route("POST", "/v1/decisions", decisions, takes=DecisionsBody, gives=DecisionReply),)
