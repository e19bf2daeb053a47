"""The options of `engine chat` and `engine bench`, declared as engine/config.py declares the engine's, and the flags of
sampling, which derive from the table of its fields.

They stand apart because they configure a client, not an engine: they are flags only, without a variable in the
environment.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from engine.options.option import Option, Positive, options_of
from engine.params.grammar import GrammarKeywords
from engine.params.sampling import SamplingParams


class ChatOptions(Struct, frozen=True, kw_only=True):
    """Chat."""

    url: Annotated[
        str | None, Meta(description="server to talk to (http://host:port); default: the model runs in this process")
    ] = None
    system: Annotated[str | None, Meta(description="system prompt to begin with")] = None
    image: Annotated[
        tuple[str, ...], Meta(description="images or videos that the first message shows, a.png,b.mp4: files or URLs")
    ] = ()


class ExpertsOptions(Struct, frozen=True, kw_only=True):
    """Experts."""

    url: Annotated[str, Meta(description="server to look at")] = "http://127.0.0.1:8000"
    seconds: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="how often to look again, until interrupted; default: once"),
    ] = None


class HeldOptions(Struct, frozen=True, kw_only=True):
    """Cache."""

    url: Annotated[str, Meta(description="server to look at")] = "http://127.0.0.1:8000"
    cache_salt: Annotated[str | None, Meta(description="salt of the sessions that are listed; default: none")] = None


class TopOptions(Struct, frozen=True, kw_only=True):
    """Top."""

    url: Annotated[str, Meta(description="server to look at")] = "http://127.0.0.1:8000"
    once: Annotated[bool, Meta(description="print one look and end")] = False


class LengthOptions(Struct, frozen=True, kw_only=True):
    """Prompts and replies."""

    input_len: Annotated[
        int, Meta(ge=1, description="words of a prompt; a word is one token in most models' vocabularies")
    ] = 128
    output_len: Annotated[int, Meta(ge=1, description="tokens of a reply, which does not end before")] = 64
    seed: Annotated[int, Meta(description="the same seed makes the same prompts and arrivals")] = 0


class TrafficOptions(LengthOptions, frozen=True, kw_only=True):
    """Traffic."""

    traffic: Annotated[
        Literal["random", "shared-prefix", "multi-turn"],
        Meta(description="unrelated prompts, prompts that begin alike, or conversations that grow"),
    ] = "random"
    requests: Annotated[int, Meta(ge=1, description="how many requests in all, turns counted singly")] = 64
    range_ratio: Annotated[
        float, Meta(ge=0, le=1, description="spread of the lengths: they are drawn from L*(1-R) to L*(1+R)")
    ] = 0.0
    groups: Annotated[int, Meta(ge=1, description="shared-prefix: how many different prefixes")] = 4
    prefix_len: Annotated[int, Meta(ge=1, description="shared-prefix: words that a group has before its prompts")] = 256
    turns: Annotated[int, Meta(ge=1, description="multi-turn: requests of a conversation; each adds --input-len")] = 4


class LoadOptions(Struct, frozen=True, kw_only=True):
    """Load."""

    url: Annotated[
        str | None, Meta(description="server to measure (http://host:port); default: start one with the options below")
    ] = None
    api: Annotated[
        Literal["openai", "chat", "native"],
        Meta(description="openai is /v1/completions of any server, chat /v1/chat/completions; native is /generate"),
    ] = "openai"
    concurrency: Annotated[
        Positive | None, Meta(description="requests open at any time; default: 8, where no --rate is given")
    ] = None
    rate: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="requests a second (conversations, with multi-turn) in a Poisson process, however many open"),
    ] = None
    clients: Annotated[
        str, Meta(description="processes that send the load, a number, or auto: by cores and by --concurrency")
    ] = "auto"
    warmup: Annotated[int, Meta(ge=0, description="unmeasured requests that come first, one after another")] = 1
    timeout: Annotated[float, Meta(gt=0, description="seconds after which a request has failed")] = 600.0
    extra_body: Annotated[
        str | None,
        Meta(description="JSON object to merge into each request's body; null leaves out a field that we send"),
    ] = None


class RepeatOptions(Struct, frozen=True, kw_only=True):
    """Repetition."""

    repeat: Annotated[int, Meta(ge=1, description="how often it is measured")] = 5


class BatchOptions(RepeatOptions, frozen=True, kw_only=True):
    """Batch."""

    batch: Annotated[int, Meta(ge=1, description="requests that start together; the next batch waits for the last")] = 1


class ReportOptions(Struct, frozen=True, kw_only=True):
    """Report."""

    json: Annotated[str | None, Meta(description="file to write the figures to, as JSON")] = None
    plot: Annotated[str | None, Meta(description="file to draw the distributions in, as SVG")] = None


def sampling_options() -> tuple[Option, ...]:
    """What a command line, or /set, may say of a request: the keywords of SamplingParams."""
    fields = (option for option in options_of(SamplingParams) if option.name != "grammar")
    return (*fields, *options_of(GrammarKeywords))
