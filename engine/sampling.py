"""The bounds of SamplingParams, in one place: HTTP and the offline API both check here.

Nothing is clamped or repaired: what a client asks for is served as asked, or refused with the bound. What
only the model knows (its length, its vocabulary) is checked where the prompt is tokenized.
"""

from collections.abc import Mapping
from types import MappingProxyType

from engine.errors import RequestError
from engine.messages import SamplingParams

INT32_MAX = 2**31 - 1
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKENS = 1024
SAME_NAMES: Mapping[str, str] = MappingProxyType({})


def check_sampling(params: SamplingParams, names: Mapping[str, str] = SAME_NAMES) -> None:
    """Raise RequestError for the first field that is out of bounds, of another type, NaN or infinite.

    `names` maps a field to what the client called it ("max_tokens" to "max_new_tokens"), for the message.
    """

    def name(field: str) -> str:
        return names.get(field, field)

    _check_real(name("temperature"), params.temperature, 0, 2, "0 is greedy, 1 the model's own distribution")
    _check_real(name("top_p"), params.top_p, 0, 1, "1 is off; for the likeliest token set temperature 0", open_low=True)
    _check_real(name("min_p"), params.min_p, 0, 1, "0 is off")
    _check_whole(name("top_k"), params.top_k, -1, INT32_MAX, "0 or -1 is off")
    if params.seed is not None:
        _check_whole(name("seed"), params.seed, -(2**63), 2**63 - 1, "leave it out for a fresh one")
    if params.max_tokens is not None:
        _check_whole(name("max_tokens"), params.max_tokens, 1, INT32_MAX, "leave it out for the default")
    _check_stops(name("stop"), params.stop)
    if len(params.stop_token_ids) > MAX_STOP_TOKENS:
        count = len(params.stop_token_ids)
        raise _refusal(name("stop_token_ids"), f"{count} ids", f"at most {MAX_STOP_TOKENS}", "send fewer")
    for token in params.stop_token_ids:
        _check_whole(name("stop_token_ids"), token, 0, INT32_MAX, "send ids of the model's vocabulary")
    if not isinstance(params.ignore_eos, bool):
        raise _refusal(name("ignore_eos"), repr(params.ignore_eos), "true or false", "leave it out for false")


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


def _check_stops(name: str, stops: tuple[str, ...]) -> None:
    if isinstance(stops, str) or len(stops) > MAX_STOPS:
        shown = _shown(stops) if isinstance(stops, str) else f"{len(stops)} strings"
        raise _refusal(name, shown, f"a list of at most {MAX_STOPS} strings", "send fewer")
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise _refusal(name, _shown(stop), "strings, none of them empty", "leave it out to stop at no string")
        if len(stop) > MAX_STOP_LENGTH:
            shown = f"a string of {len(stop)} characters"
            raise _refusal(name, shown, f"strings of at most {MAX_STOP_LENGTH}", "stop at a shorter string")


def _shown(value: object) -> str:
    """`value` for a message: whole if short, else its beginning."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
