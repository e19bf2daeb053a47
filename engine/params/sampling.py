"""The bounds and the defaults of SamplingParams, in one place: HTTP and the offline API both check here.

Nothing is clamped or repaired: what a client asks for is served as asked, or refused with the bound. What
only the model knows (its length, its vocabulary) is checked where the prompt is tokenized. A field that a request
leaves out has the default of the model, if its generation_config.json states one, else that of OpenAI's API.
"""

import re
from collections.abc import Callable, Mapping
from math import prod
from types import MappingProxyType
from typing import Any

import msgspec
from msgspec import Struct

from engine.errors import RequestError
from engine.messages.request import SamplingParams
from engine.params.grammar import grammar_of

INT32_MAX = 2**31 - 1
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKENS = 1024
MAX_REGEXES = 4
MAX_REGEX_SIZE = 1 << 18
MAX_REGEX_SECONDS = 0.1
MAX_BIASES = 1024
MAX_BAD_WORDS = 128
MAX_ALLOWED = 1 << 18  # token ids: as many as the largest vocabularies have
MAX_LOGPROBS = 20  # likeliest tokens to report beside each
MAX_PENALTY = 2.0
MAX_REPETITION = 10.0
MAX_BIAS = 100.0
SAME_NAMES: Mapping[str, str] = MappingProxyType({})


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


OPTIONAL = tuple(name for name in SamplingDefaults.__struct_fields__ if name in SamplingParams.__struct_fields__)


def model_defaults(generation: Mapping[str, Any]) -> tuple[SamplingDefaults, list[str]]:
    """The defaults that a generation_config.json states, and a sentence for each value that is out of bounds.

    In place of such a value stands the API's own default. `do_sample: false` means temperature 0."""
    stated: dict[str, Any] = {}
    wrong = []
    for name in SamplingDefaults.__struct_fields__:
        if (value := generation.get(name)) is None:
            continue
        try:
            if name in OPTIONAL:
                check_sampling(SamplingParams(**{name: value}))
            else:
                _check_whole(name, value, 1, INT32_MAX, "leave it out for the model's length")
        except RequestError as error:
            wrong.append(error.message)
        else:
            stated[name] = value
    if (samples := generation.get("do_sample")) not in (None, True, False):
        wrong.append(f"do_sample is {_shown(samples)}; it must be true or false (false is temperature 0)")
    elif samples is False:
        stated["temperature"] = 0.0
    return SamplingDefaults(**stated), wrong


def check_sampling(params: SamplingParams, names: Mapping[str, str] = SAME_NAMES) -> None:
    """Raise RequestError for the first field that is out of bounds, of another type, NaN or infinite.

    `names` maps a field to what the client called it ("max_tokens" to "max_new_tokens"), for the message.
    """

    def name(field: str) -> str:
        return names.get(field, field)

    if params.temperature is not None:
        _check_real(name("temperature"), params.temperature, 0, 2, "0 is greedy, 1 the model's own distribution")
    if params.top_p is not None:
        greedy = "1 is off; for the likeliest token set temperature 0"
        _check_real(name("top_p"), params.top_p, 0, 1, greedy, open_low=True)
    if params.min_p is not None:
        _check_real(name("min_p"), params.min_p, 0, 1, "0 is off")
    if params.top_k is not None:
        _check_whole(name("top_k"), params.top_k, -1, INT32_MAX, "0 or -1 is off")
    if params.seed is not None:
        _check_whole(name("seed"), params.seed, -(2**63), 2**63 - 1, "leave it out for a fresh one")
    if params.max_tokens is not None:
        least = 1 if params.prompt_logprobs is None else 0  # 0: the prompt's log-probabilities and nothing more
        _check_whole(name("max_tokens"), params.max_tokens, least, INT32_MAX, "leave it out for the default")
    _check_texts(name("stop"), params.stop, MAX_STOPS)
    _check_texts(name("stop_regex"), params.stop_regex, MAX_REGEXES)
    for pattern in params.stop_regex:
        _check_regex(name("stop_regex"), pattern)
    _check_ids(name("stop_token_ids"), params.stop_token_ids, MAX_STOP_TOKENS)
    switches = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "detokenize", "json_object")
    for field in (*switches, "strict_schema"):
        if not isinstance(given := getattr(params, field), bool):
            raise _refusal(name(field), _shown(given), "true or false", "leave it out for the default")
    for field in () if params.detokenize else ("stop", "stop_regex"):
        if getattr(params, field):
            raise RequestError(
                f"detokenize is false and {name(field)} is given, which is looked for in the text; send stop_token_ids",
                param=name(field),
            )
    _check_adjustments(params, name)
    grammar_of(params, names)
    for field in ("logprobs", "prompt_logprobs"):
        if (wanted := getattr(params, field)) is not None:
            _check_whole(name(field), wanted, 0, MAX_LOGPROBS, "0 is the tokens' own alone")


def _check_adjustments(params: SamplingParams, name: Callable[[str], str]) -> None:
    """What changes logits before a token is drawn."""
    longest = INT32_MAX if params.max_tokens is None else params.max_tokens
    _check_whole(name("min_tokens"), params.min_tokens, 0, longest, "0 is off; max_tokens bounds it")
    for field in ("presence_penalty", "frequency_penalty"):
        _check_real(name(field), getattr(params, field), -MAX_PENALTY, MAX_PENALTY, "0 is off")
    if (repetition := params.repetition_penalty) is not None:
        _check_real(name("repetition_penalty"), repetition, 0, MAX_REPETITION, "1 is off", open_low=True)
    if not isinstance(params.logit_bias, dict) or len(params.logit_bias) > MAX_BIASES:
        shown = f"{len(params.logit_bias)} biases" if isinstance(params.logit_bias, dict) else _shown(params.logit_bias)
        raise _refusal(name("logit_bias"), shown, f"a bias for each of at most {MAX_BIASES} token ids", "send fewer")
    for token, bias in params.logit_bias.items():
        _check_whole(name("logit_bias"), token, 0, INT32_MAX, "send ids of the model's vocabulary")
        _check_real(name("logit_bias"), bias, -MAX_BIAS, MAX_BIAS, "-100 is as good as a ban")
    _check_texts(name("bad_words"), params.bad_words, MAX_BAD_WORDS)
    _check_ids(name("allowed_token_ids"), params.allowed_token_ids, MAX_ALLOWED)


def _refusal(name: str, value: str, bound: str, remedy: str) -> RequestError:
    return RequestError(f"{name} is {value}; it must be {bound} ({remedy})", param=name)


def _check_real(name: str, value: object, low: float, high: float, remedy: str, *, open_low: bool = False) -> None:
    bound = f"a number above {low} and at most {high}" if open_low else f"a number from {low} to {high}"
    # The comparison is written so that NaN fails it.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise _refusal(name, _shown(value), bound, remedy)
    if open_low and value == low:
        raise _refusal(name, _shown(value), bound, remedy)


def _check_whole(name: str, value: object, low: int, high: int, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _refusal(name, _shown(value), f"a whole number from {low} to {high}", remedy)


def _check_ids(name: str, ids: tuple[int, ...], most: int) -> None:
    if len(ids) > most:
        raise _refusal(name, f"{len(ids)} ids", f"at most {most}", "send fewer")
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) <= INT32_MAX:
        return  # quick where there are many
    for token in ids:
        _check_whole(name, token, 0, INT32_MAX, "send ids of the model's vocabulary")


def _check_texts(name: str, texts: tuple[str, ...], most: int) -> None:
    if isinstance(texts, str) or len(texts) > most:
        shown = _shown(texts) if isinstance(texts, str) else f"{len(texts)} strings"
        raise _refusal(name, shown, f"a list of at most {most} strings", "send fewer")
    for text in texts:
        if not isinstance(text, str) or not text:
            raise _refusal(name, _shown(text), "strings, none of them empty", f"leave {name} out, or the empty one")
        if len(text) > MAX_STOP_LENGTH:
            shown = f"a string of {len(text)} characters"
            raise _refusal(name, shown, f"strings of at most {MAX_STOP_LENGTH}", "send a shorter one")


def _check_regex(name: str, pattern: str) -> None:
    import regex  # here, as nobody who sends none should wait for it

    size = _compiled_size(pattern)
    if size > MAX_REGEX_SIZE:
        bound = f"an expression of at most {MAX_REGEX_SIZE} characters when its repetitions are written out"
        raise _refusal(name, _shown(pattern), bound, "repeat less, nest less, leave comments and the flag x out")
    try:
        matches_nothing = regex.compile(pattern).search("", timeout=MAX_REGEX_SECONDS) is not None
    except (regex.error, RecursionError, OverflowError, TimeoutError) as error:
        raise _refusal(name, _shown(pattern), "a regular expression", f"correct it: {error}") from None
    if matches_nothing:
        raise _refusal(name, _shown(pattern), "an expression that matches no empty text", "it would end every reply")


def _compiled_size(pattern: str) -> int:
    """A bound of what compiling `pattern` writes out: X{2} becomes XX, X+ and X{1,} become XX*, at every level, so that
    a few characters could take all memory there is. Comments, which could hide a repetition, are too much."""
    if re.search(r"\(\?[\w-]*x|\(\?#", pattern):
        return MAX_REGEX_SIZE + 1
    counted = re.findall(r"\{(\d{1,9})(,?)", pattern)
    repeats = prod(max(1, int(least) + bool(more)) for least, more in counted)
    return len(pattern) * repeats * 2 ** pattern.count(")+")


def _shown(value: object) -> str:
    """`value` for a message: whole if short, else its beginning."""
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
