"""The jobs on texts of requests and their sizes, the same in the front and in a text process.

A job and its answer are structs, so they do not depend on the process that does the job. Pure logic.
"""

from array import array
from typing import Any

import msgspec

from engine.actors.tokenizer import Admission
from engine.conversation.parts import Message
from engine.conversation.parts import Text as TextPart
from engine.errors import RequestError, counted
from engine.messages.request import Embed, Generate
from engine.messages.text import Detokenize, Detokenized, Prepare, Prepared, TextAnswer, TextJob, Tokenize, Tokenized
from engine.text.tokenizer import Text

LARGE = 20_000  # characters: a larger job is not done in the event loop, where it would hold up others
A_MESSAGE = 100  # characters that cost as much as rendering one message
IDS = 5  # token ids that cost as much as a character


def perform(admission: Admission, job: TextJob) -> TextAnswer:
    """The answer to `job`. Raises RequestError if it cannot be done as requested."""
    match job:
        case Prepare(request, max_model_len, vocab_size):
            admission.max_model_len, admission.vocab_size = max_model_len, vocab_size
            return Prepared(*admission.admit(request))
        case Tokenize():
            return _tokenized(admission.text, job)
        case Detokenize():
            return _detokenized(admission.text, job)


def _tokenized(text: Text, job: Tokenize) -> Tokenized:
    if job.messages is None:
        ids = text.encode(job.text or "", job.special, most=job.most)
    else:
        ids = text.encode_chat(job.messages, special=job.special, most=job.most, media=job.media, **job.options)
    if len(ids) > job.most:
        raise RequestError(
            f"the prompt has {counted(len(ids), 'token')}, and at most {job.most} are taken; send it in parts",
            param="prompt",
            code="context_length_exceeded",
        )
    return Tokenized(array("i", ids).tobytes(), [text.token(id) for id in ids] if job.names else None)


def _detokenized(text: Text, job: Detokenize) -> Detokenized:
    ids = array("i", job.ids)
    if ids and max(ids) >= text.vocab_size:
        index = next(index for index, id in enumerate(ids) if id >= text.vocab_size)
        message = f"tokens[{index}] is {ids[index]}, outside the vocabulary; use ids from 0 to {text.vocab_size - 1}"
        raise RequestError(message, param=f"tokens[{index}]")
    return Detokenized(text.decode(ids.tolist(), job.skip_special_tokens))


# ── how much work it is ──────────────────────────────────────────────────────────────────────


def size_of(job: TextJob) -> int:
    """The size of a job: the number of characters that take about as long to encode."""
    match job:
        case Prepare(Generate() as request):
            if request.messages is not None:
                return _conversation(request.messages, request.tools, request.chat_template)
            return len(request.text or "") + _ids(request.ids)
        case Prepare(Embed() as request):
            return len(request.text or "") + _ids(request.ids)
        case Tokenize():
            if job.messages is not None:
                return _conversation(job.messages, job.options.get("tools"), job.options.get("chat_template"))
            return len(job.text or "")
        case Detokenize():
            return len(job.ids) // 4
    raise AssertionError(f"{type(job).__name__} is no job")


def _ids(ids: bytes | None) -> int:
    return len(ids or b"") // (4 * IDS)


def _conversation(messages: list[Message], tools: list[dict[str, Any]] | None, template: str | None) -> int:
    """The size of a conversation. A template of the request may do anything, so it is never small."""
    size = A_MESSAGE * len(messages) + (0 if template is None else LARGE + len(template))
    if tools:
        size += _written(tools)
    for message in messages:
        size += sum(len(part.text) for part in message.shown if isinstance(part, TextPart))
        size += sum(len(call.name) + len(call.arguments) for call in message.calls)
        size += len(message.reasoning or "")
    return size


def _written(value: Any) -> int:
    """The length of `value` as JSON; 0 for a value that nests too deeply, which is refused before it costs anything."""
    try:
        try:
            return len(msgspec.json.encode(value))
        except (TypeError, ValueError):  # what no JSON says: it comes from a program
            return len(str(value))
    except RecursionError:
        return 0
