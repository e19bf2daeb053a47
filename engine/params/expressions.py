"""Regular expressions that end a reply, and how a value that cannot be taken is refused."""

import re
from math import prod

from engine.errors import RequestError, shown

MAX_REGEX_SIZE = 1 << 18
MAX_REGEX_SECONDS = 0.1


def refusal(field: str, given: str, bound: str, remedy: str) -> RequestError:
    """The error that `field` is `given`; the remedy may name the field in braces."""
    facts = {"given": given, "bound": bound}
    return RequestError(f"{{{field}}} is {{given}}; it must be {{bound}} ({remedy})", param=field, facts=facts)


def check_expression(field: str, pattern: str) -> None:
    """Raise RequestError unless `pattern` is a regular expression that is cheap to compile and matches some text."""
    import regex  # here, as nobody who sends none should wait for it

    size = _compiled_size(pattern)
    if size > MAX_REGEX_SIZE:
        bound = f"an expression of at most {MAX_REGEX_SIZE} characters when its repetitions are written out"
        raise refusal(field, shown(pattern), bound, "repeat less, nest less, leave comments and the flag x out")
    try:
        matches_nothing = regex.compile(pattern).search("", timeout=MAX_REGEX_SECONDS) is not None
    except (regex.error, RecursionError, OverflowError, TimeoutError) as error:
        facts = {"given": shown(pattern), "error": str(error)}
        message = f"{{{field}}} is {{given}}; it must be a regular expression (correct it: {{error}})"
        raise RequestError(message, param=field, facts=facts) from None
    if matches_nothing:
        bound = "an expression that matches no empty text"
        raise refusal(field, shown(pattern), bound, "it would end every reply")


def _compiled_size(pattern: str) -> int:
    """A bound of what compiling `pattern` writes out: X{2} becomes XX, X+ and X{1,} become XX*, at every level, so that
    a few characters could take all memory there is. Comments, which could hide a repetition, are too much."""
    if re.search(r"\(\?[\w-]*x|\(\?#", pattern):
        return MAX_REGEX_SIZE + 1
    counted = re.findall(r"\{(\d{1,9})(,?)", pattern)
    repeats = prod(max(1, int(least) + bool(more)) for least, more in counted)
    return len(pattern) * repeats * 2 ** pattern.count(")+")
