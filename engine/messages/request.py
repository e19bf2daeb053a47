"""A request on its way in: as its client says it, and as the scheduler and the device take it."""

from typing import Annotated, Any, Literal

from msgspec import Meta

from engine.conversation.parts import Message as ChatMessage
from engine.messages.base import Message, Part

GrammarKind = Literal["json_object", "json_schema", "regex", "ebnf", "lark", "choice", "structural_tag"]


class Grammar(Part, frozen=True):
    """What a reply must be. Two that are equal are compiled once, so `source` is text whatever the kind: JSON for a
    schema, a structural tag and a choice (a list of strings), nothing for json_object.

    With `after` the reply is free until that text has come (the end of the reasoning), and the grammar begins behind
    it. `strict`, of a schema: no property and no item that it does not name. `beside` is what else the client asked
    for, where this was put together of that and of its tools: so a refusal can tell the two apart. `tools` are their
    names, in the order of their schemas in `source`.
    """

    kind: GrammarKind
    source: str = ""
    after: str = ""
    strict: bool = True
    beside: "Grammar | None" = None
    tools: tuple[str, ...] = ()


class SamplingParams(Part, frozen=True, kw_only=True):
    """How one request is sampled and when it ends, as its client says it; bounds are in engine/params/sampling.py."""

    # None: the default of the model, or of the API (engine.params.sampling.SamplingDefaults).
    temperature: Annotated[float | None, Meta(description="0 is greedy, 1 the model's own distribution")] = None
    top_p: Annotated[
        float | None, Meta(description="keep the likeliest tokens of this total probability; 1 is off")
    ] = None
    top_k: Annotated[int | None, Meta(description="keep this many of the likeliest tokens; 0 or -1 is off")] = None
    min_p: Annotated[
        float | None, Meta(description="keep tokens at least this share as likely as the best; 0 is off")
    ] = None
    seed: Annotated[int | None, Meta(description="the same seed samples the same reply; default: a fresh one")] = None
    max_tokens: Annotated[int | None, Meta(description="longest reply; default: what the model's length leaves")] = None
    stop: Annotated[tuple[str, ...], Meta(description="a string that ends the reply and is not part of it")] = ()
    stop_token_ids: Annotated[tuple[int, ...], Meta(description="a token id that ends the reply")] = ()
    ignore_eos: Annotated[bool, Meta(description="run on past the model's own end tokens")] = False
    stop_regex: Annotated[tuple[str, ...], Meta(description="a regular expression that ends the reply")] = ()
    min_tokens: Annotated[int, Meta(description="shortest reply: nothing stops it before")] = 0
    presence_penalty: Annotated[float, Meta(description="taken from the logit of what the reply has said")] = 0.0
    frequency_penalty: Annotated[float, Meta(description="the same, for each time it was said")] = 0.0
    repetition_penalty: Annotated[
        float | None, Meta(description="makes what prompt or reply hold less likely, above 1; 1 is off")
    ] = None
    logit_bias: Annotated[dict[int, float], Meta(description="added to logits: token id to bias, as JSON")] = {}  # noqa: RUF012 - msgspec copies it
    bad_words: Annotated[tuple[str, ...], Meta(description="a text that the reply must not hold")] = ()
    allowed_token_ids: Annotated[tuple[int, ...], Meta(description="a token id to sample; others are not")] = ()
    logprobs: Annotated[
        int | None, Meta(description="log-probabilities of the reply's tokens, and of so many likeliest ones")
    ] = None
    prompt_logprobs: Annotated[int | None, Meta(description="the same for the prompt's tokens")] = None
    skip_special_tokens: Annotated[bool, Meta(description="leave special tokens out of the text")] = True
    include_stop_str_in_output: Annotated[
        bool, Meta(description="end the text with what stopped it, a special token too if these are not skipped")
    ] = False
    detokenize: Annotated[bool, Meta(description="make text of the tokens; without, there are only ids")] = True
    json_object: Annotated[bool, Meta(description="the reply is a JSON object")] = False
    json_schema: Annotated[str | None, Meta(description="the reply is JSON of this JSON schema")] = None
    regex: Annotated[str | None, Meta(description="the reply matches this regular expression, from end to end")] = None
    ebnf: Annotated[str | None, Meta(description="the reply is of this grammar, in EBNF (GBNF), from `root`")] = None
    lark: Annotated[str | None, Meta(description="the reply is of this grammar, in Lark's syntax, from `start`")] = None
    choice: Annotated[tuple[str, ...], Meta(description="a text that the reply may be; it is one of them")] = ()
    structural_tag: Annotated[str | None, Meta(description="which parts of the reply have a grammar, as JSON")] = None
    strict_schema: Annotated[
        bool, Meta(description="the reply has no property that the JSON schema does not name, though it may allow them")
    ] = True


class Generate(Message, frozen=True):
    """http → tokenizer: one request; exactly one of `text`, `ids` (int32) and `messages` is set.

    Where `sampling.max_tokens` is None, `default_max_tokens` bounds the reply if there is that much room; where that is
    None too, the model's own default does. Requests
    share cached prefixes with those of the same `cache_salt` alone. With `echo` the reply's text begins with the
    prompt. A `grammar` takes the place of what `sampling` says of one: for what clients ask for in other words, as a
    tool to be called.
    """

    rid: str
    sampling: SamplingParams
    text: str | None = None
    ids: bytes | None = None
    messages: list[ChatMessage] | None = None
    priority: int = 0
    default_max_tokens: int | None = None
    # How the chat template writes `messages`: see Text.render_chat.
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: dict[str, Any] | None = None
    cache_salt: str = ""
    echo: bool = False
    chat_template: str | None = None  # in the place of the model's own
    grammar: Grammar | None = None
    tools: list[dict[str, Any]] | None = None  # that the chat template describes, as OpenAI writes them
    opening: str = ""  # of the reply, put behind the prompt of `messages` and not part of the reply's text
    show_marks: bool = False  # leave those special tokens in the text that the parsers look for
    special: bool | None = None  # add the tokenizer's special tokens to the prompt; None: to `text`, not to `messages`
    last: int | None = None  # keep only so many tokens of the prompt, its last; -1: as many as there is room for
    tell_prompt: bool = False  # the ids of the prompt's tokens


class Embed(Message, frozen=True):
    """http → tokenizer: make a vector of one prompt; exactly one of `text` and `ids` (int32) is set. `first` keeps only
    so many tokens of it, its first; -1: as many as the model takes."""

    rid: str
    text: str | None = None
    ids: bytes | None = None
    priority: int = 0
    first: int | None = None


class Open(Message, frozen=True):
    """tokenizer → detokenizer: tokens of `rid` will come; turn them into text until one of `stop` or `stop_regex`.

    Neither is looked for in the first `min_tokens` tokens. `echo` goes before the reply's text. `prompt` (int32) is
    there where the prompt's log-probabilities are asked for; `prompt_only` says that no token of the reply is. The
    next three fields are those of SamplingParams, and `show_marks` is Generate's. `prompt_ids` (int32) are there where
    the prompt's ids are asked for.
    """

    rid: str
    prompt_tokens: int
    stop: tuple[str, ...]
    stop_regex: tuple[str, ...] = ()
    min_tokens: int = 0
    echo: str = ""
    prompt: bytes | None = None
    prompt_only: bool = False
    skip_special_tokens: bool = True
    include_stop: bool = False
    detokenize: bool = True
    show_marks: bool = False
    prompt_ids: bytes = b""


class Sampling(Part, frozen=True):
    """What the device needs to sample one row. `seed` is always set; `top_k` 0 is off.

    All ids are int32. `stop_ids` are not sampled before `min_tokens`; of each of `bad_words`, the last token not
    after the ones before it; nothing but `allowed_ids`, if there are any. `logprobs` and `prompt_logprobs` are how
    many of the likeliest tokens to report beside a token's own log-probability; -1 is none at all.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bias_ids: bytes = b""
    biases: bytes = b""  # float32
    min_tokens: int = 0
    stop_ids: bytes = b""
    bad_words: tuple[bytes, ...] = ()
    allowed_ids: bytes = b""
    logprobs: int = -1
    prompt_logprobs: int = -1


class Admit(Message, frozen=True):
    """tokenizer → scheduler: a checked request. `ids` is int32; `max_new` 0 asks for a vector in place of tokens.

    `keys` (int32, one an id) is what prefixes are shared by, where that is not the ids themselves (cache/keys.py)."""

    rid: str
    ids: bytes
    sampling: Sampling
    stop_ids: tuple[int, ...]
    max_new: int
    priority: int = 0
    cache_salt: str = ""
    grammar: Grammar | None = None
    keys: bytes = b""


class Abort(Message, frozen=True):
    """http → tokenizer → scheduler: end `rid` now, freeing its pages; unknown ids are ignored."""

    rid: str


class StopHit(Message, frozen=True):
    """detokenizer → scheduler: a stop string ended `rid` after `keep` tokens; nobody waits for more."""

    rid: str
    keep: int


Job = Generate | Embed
