"""The sampling fields, in one table: `SamplingParams`, each of whose fields says what it is, holds and is called.

    temperature: Annotated[float | None, Meta(description=…), Real(0, 2, …), Named(responses="temperature")] = None
                           type          the flag's help      bounds         what each API calls it    default

The checks, the bodies of every API, the ranges in the OpenAPI document, the flags and /set of the chat derive from it.
`Sampling`, below, is what the device takes of a request: a field of the same name in both is handed on as it is.

Nothing is clamped or repaired: what a client asks for is served as asked, or refused with the bound. What
only the model knows (its length, its vocabulary) is checked where the prompt is tokenized. A field that a request
leaves out has the default of the model, if its generation_config.json states one, else that of OpenAI's API.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, get_type_hints

import msgspec
from msgspec import Meta, Struct

from engine.params.fields import (
    INT32_MAX,
    Api,
    Biases,
    Checker,
    Expressions,
    Ids,
    Named,
    Real,
    Switch,
    Texts,
    Whole,
    least_length,
    reply_length,
    table_of,
)
from engine.params.grammar import Grammar, GrammarKeywords, TakesGrammar

MAX_STOPS = 16
MAX_STOP_TOKENS = 1024
MAX_REGEXES = 4
MAX_BIASES = 1024
MAX_BAD_WORDS = 128
MAX_ALLOWED = 1 << 18  # token ids: as many as the largest vocabularies have
MAX_LOGPROBS = 20  # likeliest tokens to report beside each
MAX_PENALTY = 2.0
MAX_REPETITION = 10.0
MAX_BIAS = 100.0

if TYPE_CHECKING:  # so that a type checker knows the keywords; they cannot be read back, `grammar` can
    _Keywords = GrammarKeywords
else:
    _Keywords = Struct


class SamplingParams(_Keywords, frozen=True, kw_only=True, array_like=True, metaclass=TakesGrammar):
    """How one request is sampled and when it ends, as its client says it. In the place of `grammar` it takes one of the
    keywords of GrammarKeywords, json_schema="…" or regex="…", and raises RequestError where that is wrong."""

    # None: the default of the model, or of the API (SamplingDefaults).
    temperature: Annotated[
        float | None,
        Meta(description="0 is greedy, 1 the model's own distribution"),
        Real(0, 2, "0 is greedy, 1 the model's own distribution"),
        Named(responses="temperature", anthropic="temperature"),
    ] = None
    top_p: Annotated[
        float | None,
        Meta(description="keep the likeliest tokens of this total probability; 1 is off"),
        Real(0, 1, "1 is off; for the likeliest token set temperature 0", above=True),
        Named(responses="top_p", anthropic="top_p"),
    ] = None
    top_k: Annotated[
        int | None,
        Meta(description="keep this many of the likeliest tokens; 0 or -1 is off"),
        Whole(-1, INT32_MAX, "0 or -1 is off"),
        Named(responses="top_k", anthropic="top_k"),
    ] = None
    min_p: Annotated[
        float | None,
        Meta(description="keep tokens at least this share as likely as the best; 0 is off"),
        Real(0, 1, "0 is off"),
        Named(responses="min_p"),
    ] = None
    seed: Annotated[
        int | None,
        Meta(description="the same seed samples the same reply; default: a fresh one"),
        Whole(-(2**63), 2**63 - 1, "leave it out for a fresh one"),
        Named(native="sampling_seed", responses="seed"),
    ] = None
    max_tokens: Annotated[
        int | None,
        Meta(description="longest reply; default: what the model's length leaves"),
        Whole(1, INT32_MAX, "leave it out for the default", within=reply_length),
        Named(
            chat="max_tokens max_completion_tokens",
            native="max_new_tokens",
            responses="max_output_tokens",
            anthropic="max_tokens",
        ),
    ] = None
    stop: Annotated[
        tuple[str, ...],
        Meta(description="a string that ends the reply and is not part of it"),
        Texts(MAX_STOPS, body=str | list[str] | None, sought=True),
        Named(responses="stop", anthropic="stop_sequences"),
    ] = ()
    stop_token_ids: Annotated[
        tuple[int, ...], Meta(description="a token id that ends the reply"), Ids(MAX_STOP_TOKENS)
    ] = ()
    ignore_eos: Annotated[bool, Meta(description="run on past the model's own end tokens"), Switch()] = False
    stop_regex: Annotated[
        tuple[str, ...],
        Meta(description="a regular expression that ends the reply"),
        Expressions(MAX_REGEXES, body=str | list[str] | None, sought=True),
    ] = ()
    min_tokens: Annotated[
        int,
        Meta(description="shortest reply: nothing stops it before"),
        Whole(0, INT32_MAX, "0 is off; the length of the reply bounds it", within=least_length),
        Named(native="min_new_tokens"),
    ] = 0
    presence_penalty: Annotated[
        float,
        Meta(description="taken from the logit of what the reply has said"),
        Real(-MAX_PENALTY, MAX_PENALTY, "0 is off"),
    ] = 0.0
    frequency_penalty: Annotated[
        float, Meta(description="the same, for each time it was said"), Real(-MAX_PENALTY, MAX_PENALTY, "0 is off")
    ] = 0.0
    repetition_penalty: Annotated[
        float | None,
        Meta(description="makes what prompt or reply hold less likely, above 1; 1 is off"),
        Real(0, MAX_REPETITION, "1 is off", above=True),
        Named(chat="repetition_penalty repeat_penalty", completions="repetition_penalty repeat_penalty"),
    ] = None
    logit_bias: Annotated[
        dict[int, float],
        Meta(description="added to logits: token id to bias, as JSON"),
        Biases(MAX_BIASES, Real(-MAX_BIAS, MAX_BIAS, "-100 is as good as a ban")),
    ] = {}  # noqa: RUF012 - msgspec copies it
    bad_words: Annotated[
        tuple[str, ...], Meta(description="a text that the reply must not hold"), Texts(MAX_BAD_WORDS)
    ] = ()
    allowed_token_ids: Annotated[
        tuple[int, ...], Meta(description="a token id to sample; others are not"), Ids(MAX_ALLOWED, some=True)
    ] = ()
    logprobs: Annotated[
        int | None,
        Meta(description="log-probabilities of the reply's tokens, and of so many likeliest ones"),
        Whole(0, MAX_LOGPROBS, "0 is the tokens' own alone"),
        Named(chat="top_logprobs", native="", responses="top_logprobs"),
    ] = None
    prompt_logprobs: Annotated[
        int | None,
        Meta(description="the same for the prompt's tokens"),
        Whole(0, MAX_LOGPROBS, "0 is the tokens' own alone"),
        Named(native=""),
    ] = None
    skip_special_tokens: Annotated[bool, Meta(description="leave special tokens out of the text"), Switch()] = True
    include_stop_str_in_output: Annotated[
        bool,
        Meta(description="end the text with what stopped it, a special token too if these are not skipped"),
        Switch(),
        Named(native="include_stop_str_in_output no_stop_trim"),
    ] = False
    detokenize: Annotated[bool, Meta(description="make text of the tokens; without, there are only ids"), Switch()] = (
        True
    )
    grammar: Grammar | None = None  # what the reply must be


class Sampling(Struct, frozen=True, array_like=True):
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


class SamplingDefaults(Struct, frozen=True):
    """The values of sampling fields that a request leaves out; as written here, those of OpenAI's API.

    `max_new_tokens` bounds the reply where neither the request nor its API has a bound."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None

    def under(self, params: SamplingParams) -> "SamplingDefaults":
        """The values in force for `params`: theirs, and these where they have none."""
        said = {name: value for name in OPTIONAL if (value := getattr(params, name)) is not None}
        return msgspec.structs.replace(self, **said)


# ── what derives from it ─────────────────────────────────────────────────────────────────────

FIELDS = table_of(SamplingParams)
APIS = Named.__struct_fields__
RANGES: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {field.name: field.kind.range for field in FIELDS if isinstance(field.kind, Real | Whole)}
)
OPTIONAL = tuple(name for name in SamplingDefaults.__struct_fields__ if name in SamplingParams.__struct_fields__)
# The fields that the device takes as the client says them.
HANDED_ON = tuple(name for name, _ in get_type_hints(Sampling).items() & get_type_hints(SamplingParams).items())
check_sampling = Checker(FIELDS)
CHAT, COMPLETIONS, NATIVE, RESPONSES, ANTHROPIC = (Api(api, FIELDS) for api in APIS)
