"""How a request is told that it is too long, in words that other software recognises.

OpenAI's clients look for "maximum context length is N tokens". Anthropic's look for words of their own, which
`as_anthropic` makes of ours: both are here, so that the one reads what the other writes.
"""

import re

from engine.errors import RequestError

CODE = "context_length_exceeded"
PROMPT = re.compile(
    r"has (?:\d+ characters, which are at least )?(\d+) tokens, and the model's maximum context length is (\d+) tokens"
)
REPLY = re.compile(r"has (\d+) tokens and \w+ is (\d+), but the maximum context length is (\d+) tokens")


def prompt_too_long(tokens: int, most: int, *, characters: int = 0, name: str = "prompt") -> RequestError:
    """The error about a prompt of `tokens` tokens, at least, where prompt and reply together may have `most`.

    `characters` is how many the prompt has, if its tokens were not counted; `name` is what the client calls it."""
    size = f"{characters} characters, which are at least {tokens} tokens" if characters else f"{tokens} tokens"
    return RequestError(
        f"the {name} has {size}, and the model's maximum context length is {most} tokens, reply included; shorten it "
        f"to at most {most - 1} tokens",
        param=name,
        code=CODE,
    )


def reply_too_long(tokens: int, new: int, most: int) -> RequestError:
    """The error about a prompt of `tokens` tokens and a max_tokens of `new` that are over `most`."""
    return RequestError(
        f"the prompt has {tokens} tokens and max_tokens is {new}, but the maximum context length is {most} tokens for "
        f"both; lower it to at most {most - tokens}, or shorten the prompt",
        param="max_tokens",
        code=CODE,
    )


def as_anthropic(message: str) -> str:
    """One of the errors above in Anthropic's words, and ours behind them; any other as it is."""
    if (found := REPLY.search(message)) is not None:
        tokens, new, most = found.groups()
        return f"input length and `max_tokens` exceed context limit: {tokens} + {new} > {most}; {message}"
    if (found := PROMPT.search(message)) is not None:
        tokens, most = found.groups()
        return f"prompt is too long: {tokens} tokens > {int(most) - 1} maximum; {message}"
    return message
