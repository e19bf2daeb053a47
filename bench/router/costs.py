"""How long a step takes on one H200: Llama-3.1-8B in bfloat16, from the figures of bench/RESULTS.md.

bench/router/check.py holds it against figures that it was not made from.

A step of n tokens takes what its matrices take, which is read off between measured points, and what attention takes:
cached keys and values are read at the memory's speed, and pairs of a prompt's queries and keys take what FA3 took for a
prompt of 4,000 tokens. Left out: the host, and steps that several requests' shared prefixes make cheaper.
"""

from bisect import bisect_right

# Tokens in a step to the milliseconds of a decode step of as many rows (`decode_step`, `latency`: contexts of 192
# tokens in the mean, whose reading is taken off), and of one prompt of 4,000 tokens without its attention.
POINTS = ((1, 4.03), (8, 4.74), (32, 5.15), (64, 5.67), (128, 6.80), (256, 10.6), (4000, 90.8 - 10.3))
CONTEXT = 192
BYTES = 2 * 32 * 8 * 128 * 2  # of keys and values of a token: two, layers, heads, their size, bfloat16
BANDWIDTH = 4.3e12  # bytes a second
PAIR = 10.3e-3 / (4000 * 4000 / 2)  # seconds

_tokens = [tokens for tokens, _ in POINTS]
_seconds = [ms / 1e3 - (tokens * CONTEXT * BYTES / BANDWIDTH if tokens <= 256 else 0) for tokens, ms in POINTS]


def step_seconds(tokens: int, context: int, pairs: int) -> float:
    """A step that computes `tokens` tokens; rows that decode read `context` cached tokens in all, and in prompts there
    are `pairs` pairs of a query and a key."""
    right = min(max(1, bisect_right(_tokens, tokens)), len(_tokens) - 1)
    low, high = _tokens[right - 1], _tokens[right]
    products = _seconds[right - 1] + (_seconds[right] - _seconds[right - 1]) * (tokens - low) / (high - low)
    return max(products, _seconds[0]) + context * BYTES / BANDWIDTH + pairs * PAIR
