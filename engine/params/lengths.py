"""Whether a text fits a model, checked once for the tokenizer and the scheduler, and whether it is Unicode.

An error about a length says so in words that other software recognises: OpenAI's clients look for "maximum context
length is N tokens". Anthropic's look for words of their own, which `ANTHROPIC_PHRASES` makes of the same facts.
"""

from collections.abc import Mapping
from types import MappingProxyType

from engine.errors import RequestError, counted

CODE = "context_length_exceeded"
PROMPT_TOO_LONG = (
    "the prompt has {size}, and the model's maximum context length is {most} tokens, reply included; shorten it to at "
    "most {most_prompt} tokens"
)
REPLY_TOO_LONG = (
    "the prompt has {size} and {max_tokens} is {new}, but the maximum context length is {most} tokens for "
    "both; lower it to at most {room}, or shorten the prompt"
)
ANTHROPIC_PHRASES: Mapping[str, str] = MappingProxyType(
    {
        PROMPT_TOO_LONG: "prompt is too long: {tokens} tokens > {most_prompt} maximum; {message}",
        REPLY_TOO_LONG: "input length and `max_tokens` exceed context limit: {tokens} + {new} > {most}; {message}",
    }
)
# `{input}` in a template: embeddings, which have several, name the one at fault.
THE_INPUT: Mapping[str, str] = MappingProxyType({"input": "the input"})


def check_length(prompt: int, new: int, most: int) -> None:
    """Raise RequestError unless a prompt of `prompt` tokens and a reply of `new`, at least one, are at most `most`."""
    if prompt + 1 > most:
        raise prompt_too_long(prompt, most)
    if prompt + new > most:
        raise reply_too_long(prompt, new, most)


def prompt_too_long(tokens: int, most: int, *, characters: int = 0) -> RequestError:
    """The error about a prompt of `tokens` tokens, at least, where prompt and reply together may have `most`.

    `characters` is how many the prompt has, if its tokens were not counted."""
    size = counted(tokens, "token")
    size = f"{characters} characters, which are at least {size}" if characters else size
    facts: dict[str, str | int | float] = {"size": size, "tokens": tokens, "most": most, "most_prompt": most - 1}
    return RequestError(PROMPT_TOO_LONG, param="prompt", code=CODE, facts=facts)


def reply_too_long(tokens: int, new: int, most: int) -> RequestError:
    """The error about a prompt of `tokens` tokens and a max_tokens of `new` that are over `most`."""
    facts: dict[str, str | int | float] = {
        "size": counted(tokens, "token"),
        "tokens": tokens,
        "new": new,
        "most": most,
        "room": most - tokens,
    }
    return RequestError(REPLY_TOO_LONG, param="max_tokens", code=CODE, facts=facts)


def check_unicode(text: str, field: str) -> None:
    """Raise RequestError when `text` of `field` cannot be written as UTF-8: JSON may carry half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"{{{field}}} holds half of a surrogate pair, {{half}}; send whole characters"
        raise RequestError(message, param=field, facts={"half": repr(text[error.start])}) from None
