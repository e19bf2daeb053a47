"""Decisions: questions about one conversation, answered by the log-probabilities of what may be answered.

A question is said by the user behind the conversation, and each of its options is a text that the assistant may begin
with. All options of all questions are scored together (choices.py), and nothing is sampled. What is told is the
distribution over the options: a token is drawn among those that some option goes on with, and an option that others go
on from ("1" and "10") has what they leave. Pure logic. Left out: how the options are scored, and the routes' own words.
"""

import math
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from engine.conversation.parts import Message, alternating, said
from engine.errors import RequestError
from engine.messages.text import Tokenize
from engine.runtime.choices import Scores

Kind = Literal["predicate", "choice", "score"]
YES, NO = "Yes", "No"
MOST_QUESTIONS = 400
MOST_OPTIONS = 255
MOST_SCORED = 1024  # options of all questions together


class Option(Struct, frozen=True):
    """What may be answered, and what that means."""

    text: str
    description: str = ""


class Question(Struct, frozen=True):
    """A statement that is true or not, some choices, or some levels from the lowest to the highest."""

    kind: Kind
    instructions: str
    options: tuple[Option, ...] = (Option(YES), Option(NO))

    @property
    def texts(self) -> tuple[str, ...]:
        """What is scored, each text once."""
        return tuple(dict.fromkeys(option.text for option in self.options))

    def asked(self) -> str:
        """The words in which the model is asked."""
        if self.kind == "predicate":
            return f"{self.instructions}\n\nIs this true? Answer with {YES} or {NO} and nothing else."
        kinds = "of these" if self.kind == "choice" else "of these levels, from the lowest to the highest,"
        listed = "\n".join(
            f"- {option.text}: {option.description}" if option.description else f"- {option.text}"
            for option in self.options
        )
        return f"{self.instructions}\n\nAnswer with one {kinds} and nothing else:\n{listed}"

    def probabilities(self, scores: Sequence[Scores]) -> list[float]:
        """That of each option, from the scores of `texts`; they add up to 1. Options of one text share its own."""
        found = dict(zip(self.texts, probabilities(scores), strict=True))
        texts = [option.text for option in self.options]
        return [found[text] / texts.count(text) for text in texts]


def job_of(messages: Sequence[Message], question: Question) -> Tokenize:
    """The prompt of `question` behind `messages`, which stay the beginning of all prompts, with its options."""
    whole = alternating([*messages, said("user", question.asked())])
    return Tokenize(None, whole, {"add_generation_prompt": True}, endings=question.texts)


def check_questions(questions: Sequence[Question], name: str = "questions") -> None:
    """Raise RequestError for none, for too many, and for options that are too few, too many or empty."""
    if not 1 <= len(questions) <= MOST_QUESTIONS:
        raise RequestError(f"{name} has {len(questions)}; send from 1 to {MOST_QUESTIONS}", param=name)
    for index, question in enumerate(questions):
        path = f"{name}[{index}]"
        if not 2 <= len(question.options) <= MOST_OPTIONS:
            raise RequestError(f"{path} has {len(question.options)} options; send from 2 to {MOST_OPTIONS}", param=path)
        if not question.instructions.strip() or not all(option.text.strip() for option in question.options):
            raise RequestError(f"{path} has an empty text; say what is asked, and each option", param=path)
    if (total := sum(len(question.texts) for question in questions)) > MOST_SCORED:
        raise RequestError(
            f"{name} have {total} options together, and at most {MOST_SCORED} are taken; send several requests",
            param=name,
        )


def probabilities(scores: Sequence[Scores]) -> list[float]:
    """The share of each of `scores`, whose texts differ, in what any of them is likely to be answered."""
    total = [sum(each.logprobs) for each in scores]
    taken: dict[tuple[int, ...], dict[int, float]] = {}  # by the tokens so far, those that go on, and how likely
    for each in scores:
        for place, logprob in enumerate(each.logprobs):
            taken.setdefault(tuple(each.ids[:place]), {})[each.ids[place]] = logprob
    for index, each in enumerate(scores):
        if further := taken.get(tuple(each.ids)):
            left = 1.0 - sum(map(math.exp, further.values()))
            total[index] += math.log(max(left, 1e-12))
    highest = max(total)
    weights = [math.exp(each - highest) for each in total]
    return [weight / sum(weights) for weight in weights]
