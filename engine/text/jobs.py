"""The jobs on texts of requests and their sizes, the same in the front and in a text process.

A job and its answer are structs, so they do not depend on the process that does the job. Pure logic.
"""

from array import array
from typing import Any

import msgspec

from engine.actors.tokenizer import Admission
from engine.conversation.parts import Message, said
from engine.conversation.parts import Text as TextPart
from engine.errors import RequestError, counted
from engine.messages.request import Embed, Generate
from engine.messages.text import Detokenize, Detokenized, Prepare, Prepared, TextAnswer, TextJob, Tokenize, Tokenized
from engine.text.endings import MARGIN
from engine.text.tokenizer import Prompt, Text

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
    prompts = _prompts(text, job)
    ids, *ended = text.encode_alike(prompts)
    if len(longest := max((ids, *ended), key=len)) > job.most:
        raise RequestError(
            f"the prompt has {counted(len(longest), 'token')}, and at most {job.most} are taken; send it in parts",
            param="prompt",
            code="context_length_exceeded",
        )
    names = [text.token(id) for id in ids] if job.names else None
    return Tokenized(array("i", ids).tobytes(), names, tuple(array("i", each).tobytes() for each in ended))


def _prompts(text: Text, job: Tokenize) -> list[Prompt]:
    """What `job` asks for the tokens of, and the same with each ending. Where a chat template writes the first ending
    as it is, others that neither begin nor end with a space are not written out again: there may be hundreds."""
    before = _prompt(text, job)
    made = [before]
    as_it_is = False
    for ending in job.endings:
        if as_it_is and ending.strip() == ending:
            made.append(msgspec.structs.replace(before, text=before.text + ending))
        else:
            made.append(_prompt(text, job, ending))
            as_it_is = as_it_is or made[-1].text == before.text + ending
    return made


def _prompt(text: Text, job: Tokenize, ending: str = "") -> Prompt:
    """What `job` asks for the tokens of, with `ending` behind it."""
    if job.messages is None:
        return text.prompt((job.text or "") + ending, job.special, most=job.most)
    messages, options = job.messages, job.options
    if ending:
        *before, last = messages if options.get("continue_final_message") else (*messages, said("assistant", ""))
        messages = [*before, msgspec.structs.replace(last, parts=(*last.parts, TextPart(ending)))]
        options = {**options, "add_generation_prompt": False, "continue_final_message": True}
    return text.conversation(messages, special=job.special, most=job.most, media=job.media, **options)


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
            endings = sum(map(len, job.endings)) + MARGIN * len(job.endings)
            if job.messages is not None:
                size = _conversation(job.messages, job.options.get("tools"), job.options.get("chat_template"))
                return size + endings + A_MESSAGE * len(job.messages) * len(job.endings)
            return len(job.text or "") + endings
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
