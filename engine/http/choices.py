"""Replies as OpenAI's chat.completion(.chunk) and text_completion objects: choices, log-probabilities, usage.

Choice i of several is reply i: the prompts in order, `n` replies to each. All but the text of an event is encoded
once, so that a chunk without log-probabilities costs one string escape and one join.
"""

import codecs
import time
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from engine.http.sse import DONE
from engine.http.wire import to_json
from engine.messages import Chunk, TokenLogprob

NO_LOGPROBS = b',"logprobs":null,"finish_reason":null}]'


class Wording(Struct, frozen=True, kw_only=True):
    """What the answers to one request hold. `usage` adds an event of it at the end of a stream, `continuous_usage` one
    to each event; `echo` says that log-probabilities begin with the prompt's."""

    chat: bool
    samples: int = 1  # replies to each prompt
    choices: int = 1
    usage: bool = False
    continuous_usage: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    echo: bool = False


class OpenAIReply:
    """The replies to one request, chunk by chunk or whole."""

    def __init__(self, rid: str, model: str, wording: Wording) -> None:
        self._wording = wording
        self._last: list[Chunk | None] = [None] * wording.choices
        self._finished = 0
        self._offsets = [TextOffset() for _ in range(wording.choices)]
        chat = wording.chat
        self._head: dict[str, Any] = {"id": rid, "object": "chat.completion" if chat else "text_completion"}
        self._head |= {"created": int(time.time()), "model": model}
        kind = {"object": "chat.completion.chunk" if chat else "text_completion"}
        self._before_choices = b"data: " + to_json(self._head | kind)[:-1] + b',"choices":['
        content = b',"delta":{"content":' if chat else b',"text":'
        self._before = [self._before_choices + b'{"index":%d' % index + content for index in range(wording.choices)]
        self._plain_end = b',"usage":null}\n\n' if wording.usage else b"}\n\n"
        self._after = (b"}" if chat else b"") + NO_LOGPROBS + self._plain_end
        self._detailed = wording.logprobs or wording.prompt_logprobs or wording.continuous_usage

    def event(self, part: tuple[int, Chunk]) -> bytes:
        """The events of one choice's chunk: a chat's opens with the role and ends with its finish; the usage, if asked
        for, and DONE follow the last choice."""
        index, chunk = part
        chat = self._wording.chat
        opens = self._last[index] is None
        self._last[index] = chunk
        events = b""
        if chat and opens:
            events = self._choice(index, {"delta": {"role": "assistant", "content": ""}})
        if self._detailed:
            if chunk.text or chunk.logprobs or chunk.prompt_logprobs:
                fields: dict[str, Any] = {"delta": {"content": chunk.text}} if chat else {"text": chunk.text}
                events += self._choice(index, fields | self._scores(index, chunk))
        elif chunk.text:
            events += self._before[index] + to_json(chunk.text) + self._after
        if chunk.finish is not None:
            self._finished += 1
            events += self._choice(index, {"delta": {}} if chat else {"text": ""}, chunk)
            if self._finished == self._wording.choices:
                if self._wording.usage:
                    events += self._before_choices + b'],"usage":' + to_json(self._usage()) + b"}\n\n"
                events += DONE
        return events

    def _choice(self, index: int, fields: dict[str, Any], last: Chunk | None = None) -> bytes:
        end = self._plain_end
        if self._wording.continuous_usage:
            end = b',"usage":' + to_json(self._usage()) + b"}\n\n"
        return self._before_choices + to_json(choice(index, fields, last)) + b"]" + end

    def whole(self, replies: Sequence[Chunk]) -> bytes:
        """The object of replies that are not streamed, each joined into one chunk."""
        choices = []
        for index, reply in enumerate(replies):
            self._last[index] = reply
            message = {"role": "assistant", "content": reply.text, "refusal": None}
            fields: dict[str, Any] = {"message": message} if self._wording.chat else {"text": reply.text}
            choices.append(choice(index, fields | self._scores(index, reply), reply))
        return to_json(self._head | {"choices": choices, "usage": self._usage()})

    def _scores(self, index: int, chunk: Chunk) -> dict[str, Any]:
        """The log-probabilities in `chunk`, as far as the client asked for them."""
        wording = self._wording
        found: dict[str, Any] = {}
        if wording.logprobs and wording.chat:
            found["logprobs"] = {"content": [chat_logprob(token) for token in chunk.logprobs], "refusal": None}
        elif wording.logprobs:
            tokens = (*chunk.prompt_logprobs, *chunk.logprobs) if wording.echo else chunk.logprobs
            found["logprobs"] = text_logprobs(tokens, self._offsets[index])
        if wording.prompt_logprobs and chunk.prompt_logprobs:
            found["prompt_logprobs"] = [prompt_logprob(token) for token in chunk.prompt_logprobs]
        return found

    def _usage(self) -> dict[str, Any]:
        """OpenAI's usage object of what there is so far; a prompt counts once, however many replies it has."""
        prompts = [
            next((chunk for chunk in self._last[first : first + self._wording.samples] if chunk is not None), None)
            for first in range(0, self._wording.choices, self._wording.samples)
        ]
        asked = sum(chunk.prompt_tokens for chunk in prompts if chunk is not None)
        replied = sum(chunk.completion_tokens for chunk in self._last if chunk is not None)
        return {
            "prompt_tokens": asked,
            "completion_tokens": replied,
            "total_tokens": asked + replied,
            "prompt_tokens_details": {
                "cached_tokens": sum(chunk.cached_tokens for chunk in prompts if chunk is not None)
            },
        }


def choice(index: int, fields: dict[str, Any], last: Chunk | None) -> dict[str, Any]:
    """One entry of `choices`; `matched_stop`, an extension, is the stop string, expression or token id at its end."""
    shared = {"index": index, "logprobs": None, **fields, "finish_reason": None}
    return shared if last is None else shared | {"finish_reason": last.finish, "matched_stop": last.matched}


# ── log-probabilities ────────────────────────────────────────────────────────────────────────


def chat_logprob(token: TokenLogprob) -> dict[str, Any]:
    """A token as chat completions word it: its bytes are exact where it is only a part of a character."""
    return _entry(token) | {"top_logprobs": [_entry(likely) for likely in token.top]}


def _entry(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "bytes": list(token.bytes), "logprob": token.logprob}


def prompt_logprob(token: TokenLogprob) -> dict[str, Any] | None:
    """A token of the prompt as vLLM words it: by id, its own first; None for the first, which nothing predicts."""
    if token.logprob is None:
        return None
    return {
        str(one.id): {"logprob": one.logprob, "rank": one.rank, "decoded_token": one.text}
        for one in (*(other for other in token.top if other.id != token.id), token)
    }


class TextOffset:
    """Where in a text the next token begins, in characters."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0

    def advance(self, token: TokenLogprob) -> int:
        """Where `token` begins: with the character that it completes, if it does not begin one."""
        before = self._at
        self._at += len(self._utf8.decode(token.bytes))
        return before


def text_logprobs(tokens: Sequence[TokenLogprob], offset: TextOffset) -> dict[str, Any]:
    """Tokens as text completions word them. The likeliest are in a dictionary, a token itself among them."""
    top: list[dict[str, float | None] | None] = []
    for token in tokens:
        entries = {token_name(one): one.logprob for one in (*token.top, token)}
        top.append(None if token.logprob is None else entries)
    return {
        "tokens": [token_name(token) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": top,
        "text_offset": [offset.advance(token) for token in tokens],
    }


def token_name(token: TokenLogprob) -> str:
    """A token's text, or its bytes, written as OpenAI writes them, where they are no text."""
    if "\ufffd" in token.text:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)
    return token.text
