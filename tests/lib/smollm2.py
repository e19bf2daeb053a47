"""What the default model is known to answer: ids and logits by transformers, in float32 from the same file."""

from engine import SamplingParams

COUNTING = "1, 2, 3, 4, 5, 6, 7,"
COUNTING_IDS = [216, 40, 28, 216, 41, 28, 216, 33, 32, 28, 216, 33, 33, 28, 216, 33, 34, 28, 216, 33, 35, 28, 216, 33]
LETTERS = "a b c d e f g h"
LETTERS_IDS = [
    2056, 544, 501, 303, 283, 304, 263, 273, 7329, 412, 262, 252,
    326, 386, 267, 1792, 329, 1892, 1892, 198, 198, 1348, 314, 253,
]  # fmt: skip
FRANCE = "The capital of France is"
FRANCE_LOGITS = {7042: 17.3713, 260: 14.8886, 4528: 13.245, 2250: 13.0095, 1315: 12.9515}
GREEDY = SamplingParams(temperature=0, max_tokens=24)
OTHERS = ["Once upon a time", "def main():", FRANCE, "x" * 300]
