"""The five workloads of bench/language/workloads.py, each as a program and as the same calls by the openai client.

A task makes the arguments of its programs from seeded words, runs one program by either way, and tells what came out:
the same texts from both. All sample greedily and past the end token, so that each reply has its number of tokens.
Lengths are in words; each is about one token. Left out: how they are timed (workloads.py).
"""

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from statistics import fmean
from typing import Any, ClassVar

import msgspec
from msgspec import Struct
from openai import AsyncOpenAI
from openai.types import CompletionUsage

from engine.lang import State, assistant, function, gen, select, system, user

Arguments = dict[str, Any]
EXACT: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


class Size(Struct, frozen=True):
    """How much of everything: programs of a task, words of what all share, of what each has alone, and of a reply."""

    programs: int
    shared: int
    own: int
    reply: int


class Naive:
    """The openai client. `extra` goes with every body; a salt of its own for each request keeps prefixes apart."""

    def __init__(self, client: AsyncOpenAI, model: str, *, salted: bool = False) -> None:
        self._client = client
        self._model = model
        self._salted = salted
        self._salts = random.Random(0)
        self.calls = self.prompt = self.cached = 0

    def _extra(self, **more: Any) -> dict[str, Any]:
        self.calls += 1
        if self._salted:
            more["cache_salt"] = f"{self._salts.getrandbits(64):x}"
        return {"ignore_eos": True, **more}

    def _count(self, usage: CompletionUsage | None) -> None:
        assert usage is not None, "a whole reply has its usage"
        self.prompt += usage.prompt_tokens
        details = usage.prompt_tokens_details
        self.cached += (details and details.cached_tokens) or 0

    async def text(self, prompt: str, tokens: int, **more: Any) -> str:
        """What the model says behind `prompt`."""
        made = await self._client.completions.create(
            model=self._model, prompt=prompt, max_tokens=tokens, temperature=0, extra_body=self._extra(**more)
        )
        self._count(made.usage)
        return made.choices[0].text

    async def chat(self, messages: Sequence[Any], tokens: int) -> str:
        """What the model answers to `messages`."""
        made = await self._client.chat.completions.create(
            model=self._model, messages=list(messages), max_tokens=tokens, temperature=0, extra_body=self._extra()
        )
        self._count(made.usage)
        return made.choices[0].message.content or ""

    async def select(self, prompt: str, choices: Sequence[str]) -> str:
        """That of `choices` whose tokens have the highest mean log-probability: a call for each, all at once."""

        async def score(choice: str) -> float:
            made = await self._client.completions.create(
                model=self._model,
                prompt=prompt + choice,
                max_tokens=0,
                echo=True,
                logprobs=0,
                extra_body=self._extra(),
            )
            self._count(made.usage)
            told = made.choices[0].logprobs
            assert told is not None and told.text_offset is not None and told.token_logprobs is not None
            return fmean(
                logprob or 0.0
                for offset, logprob in zip(told.text_offset, told.token_logprobs, strict=True)
                if offset >= len(prompt)
            )

        scores = await asyncio.gather(*map(score, choices))
        return choices[max(range(len(choices)), key=scores.__getitem__)]


class Task(ABC):
    """One workload. `words` are what its texts are made of."""

    name: ClassVar[str]
    program: ClassVar[Any]

    def __init__(self, size: Size, words: Sequence[str], seed: int) -> None:
        self.size = size
        self._words = words
        self._rng = random.Random(f"{self.name} {seed}")
        self.shared = self.text(size.shared)
        self.arguments = [self.argument(index) for index in range(size.programs)]
        self._rng.shuffle(self.arguments)

    def text(self, count: int) -> str:
        """So many words."""
        return "".join(self._rng.choices(self._words, k=max(count, 1)))

    @abstractmethod
    def argument(self, index: int) -> Arguments:
        """The arguments of program `index`."""

    @abstractmethod
    async def naive(self, calls: Naive, arguments: Arguments) -> list[str]:
        """The texts that one program makes, by the calls one by one."""

    async def made(self, s: State) -> list[str]:
        """The texts that a run of the program has made."""
        return list(await s.get("made"))


# ── multi-turn ───────────────────────────────────────────────────────────────────────────────


@function
async def conversation(s: State, rules: str, turns: list[str], reply: int) -> None:
    s += system(rules)
    for number, turn in enumerate(turns):
        s += user(turn) + assistant(gen(f"answer {number}", max_tokens=reply))
    s.set_var("made", [await s.get(f"answer {number}") for number in range(len(turns))])


class MultiTurn(Task):
    """A conversation of six turns behind rules that all conversations have."""

    name = "multi-turn"
    program = conversation
    TURNS = 6

    def argument(self, index: int) -> Arguments:
        turns = [self.text(self.size.own) for _ in range(self.TURNS)]
        return {"rules": self.shared, "turns": turns, "reply": self.size.reply}

    async def naive(self, calls: Naive, arguments: Arguments) -> list[str]:
        messages = [{"role": "system", "content": arguments["rules"]}]
        made = []
        for turn in arguments["turns"]:
            messages.append({"role": "user", "content": turn})
            made.append(await calls.chat(messages, arguments["reply"]))
            messages.append({"role": "assistant", "content": made[-1]})
        return made


# ── tree of thought ──────────────────────────────────────────────────────────────────────────


@function
async def tree(s: State, question: str, prompts: list[str], branches: int, reply: int) -> None:
    s += question
    leaves, made = [s], []
    for prompt in prompts:
        groups = [leaf.fork(branches) for leaf in leaves]
        for group in groups:
            group += lambda index, prompt=prompt: f"{prompt} {index + 1}:"
            group += gen("thought", max_tokens=reply)
        leaves = [leaf for group in groups for leaf in group]
        made += [await leaf.get("thought") for leaf in leaves]
    s.set_var("made", made)


class TreeOfThought(Task):
    """Plans, their steps and their checks: two branches at each of three levels, behind examples that all share."""

    name = "tree-of-thought"
    program = tree
    BRANCHES = 2

    def argument(self, index: int) -> Arguments:
        return {
            "question": self.shared + self.text(self.size.own),
            "prompts": [self.text(8) for _ in range(3)],
            "branches": self.BRANCHES,
            "reply": self.size.reply,
        }

    async def naive(self, calls: Naive, arguments: Arguments) -> list[str]:
        leaves, made = [arguments["question"]], []
        for prompt in arguments["prompts"]:
            asked = [f"{leaf}{prompt} {index + 1}:" for leaf in leaves for index in range(arguments["branches"])]
            thoughts = await asyncio.gather(*(calls.text(each, arguments["reply"]) for each in asked))
            leaves = [each + thought for each, thought in zip(asked, thoughts, strict=True)]
            made += thoughts
        return made


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "house": {"enum": ["Gryffindor", "Hufflepuff", "Ravenclaw", "Slytherin"]},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "alive": {"type": "boolean"},
    },
    "required": ["name", "house", "age", "alive"],
    "additionalProperties": False,
}


@function
async def extraction(s: State, rules: str, text: str, reply: int) -> None:
    s += rules + text + "\nJSON: " + gen("facts", max_tokens=reply, json_schema=SCHEMA, ignore_eos=False)
    s.set_var("made", [await s.get("facts")])


class JsonDecoding(Task):
    """The facts of a text as JSON of a schema, behind examples that all texts share."""

    name = "json"
    program = extraction

    def argument(self, index: int) -> Arguments:
        return {"rules": self.shared, "text": self.text(self.size.own), "reply": self.size.reply}

    async def naive(self, calls: Naive, arguments: Arguments) -> list[str]:
        prompt = arguments["rules"] + arguments["text"] + "\nJSON: "
        schema = {"name": "facts", "schema": SCHEMA, "strict": True}
        asked = {"type": "json_schema", "json_schema": schema}
        return [await calls.text(prompt, arguments["reply"], response_format=asked, ignore_eos=False)]


# ── few-shot select ──────────────────────────────────────────────────────────────────────────

LETTERS = (" A", " B", " C", " D")


@function
async def answering(s: State, examples: str, question: str) -> None:
    s += examples + question + "\nAnswer:" + select("answer", LETTERS)
    s.set_var("made", [await s.get("answer")])


class FewShot(Task):
    """A question of a subject behind the examples of that subject; its answer is one of four letters."""

    name = "few-shot"
    program = answering
    SUBJECTS = 4

    def __init__(self, size: Size, words: Sequence[str], seed: int) -> None:
        self._subjects: list[str] = []
        super().__init__(size, words, seed)

    def argument(self, index: int) -> Arguments:
        if not self._subjects:
            self._subjects = [self.text(self.size.shared) for _ in range(self.SUBJECTS)]
        return {"examples": self._subjects[index % self.SUBJECTS], "question": self.text(self.size.own)}

    async def naive(self, calls: Naive, arguments: Arguments) -> list[str]:
        prompt = arguments["examples"] + arguments["question"] + "\nAnswer:"
        return [await calls.select(prompt, LETTERS)]


# ── agents ───────────────────────────────────────────────────────────────────────────────────

TOOLS = (" search", " lookup", " finish")


@function
async def agent(s: State, rules: str, question: str, observations: list[str], reply: int) -> None:
    s += rules + question
    for number, observation in enumerate(observations):
        s += "\nThought:" + gen(f"thought {number}", max_tokens=reply)
        s += "\nAction:" + select(f"tool {number}", TOOLS)
        s += "\nObservation:" + observation
    names = [f"{name} {number}" for number in range(len(observations)) for name in ("thought", "tool")]
    s.set_var("made", [await s.get(name) for name in names])


class Agents(Task):
    """ReAct: four rounds of a thought, a tool chosen among three, and what that observes; rules that all share."""

    name = "agents"
    program = agent
    ROUNDS = 4

    def argument(self, index: int) -> Arguments:
        return {
            "rules": self.shared,
            "question": self.text(self.size.own),
            "observations": [self.text(self.size.own) for _ in range(self.ROUNDS)],
            "reply": self.size.reply,
        }

    async def naive(self, calls: Naive, arguments: Arguments) -> list[str]:
        said, made = arguments["rules"] + arguments["question"], []
        for observation in arguments["observations"]:
            said += "\nThought:"
            made.append(await calls.text(said, arguments["reply"]))
            said += made[-1] + "\nAction:"
            made.append(await calls.select(said, TOOLS))
            said += made[-1] + "\nObservation:" + observation
        return made


TASKS: tuple[type[Task], ...] = (MultiTurn, TreeOfThought, JsonDecoding, FewShot, Agents)
# A laptop's processor does not read a thousand tokens a second; a GPU reads some hundred thousand. There the naive
# selects take longest, tens of milliseconds of Python on both sides for the log-probabilities of each prompt.
SIZES: dict[str, dict[str, Size]] = {
    "small": {
        "multi-turn": Size(4, 96, 16, 8),
        "tree-of-thought": Size(3, 192, 16, 6),
        "json": Size(6, 256, 24, 64),
        "few-shot": Size(8, 256, 16, 0),
        "agents": Size(2, 160, 12, 6),
    },
    "full": {
        "multi-turn": Size(128, 1000, 100, 16),
        "tree-of-thought": Size(64, 1500, 60, 16),
        "json": Size(256, 1500, 100, 96),
        "few-shot": Size(128, 1500, 80, 0),
        "agents": Size(32, 1500, 50, 16),
    },
}


def resized(size: Size, factor: float) -> Size:
    """With so many times the programs."""
    return msgspec.structs.replace(size, programs=max(1, round(size.programs * factor)))
