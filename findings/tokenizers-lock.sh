#!/bin/sh
# Tokenizer.encode holds the interpreter's lock until the whole text is encoded: no other Python thread runs meanwhile, so
# moving it to a thread does not free an event loop. encode_batch_fast of a list with one text gives the same ids and lets
# other threads run. Tokenizer.decode holds the lock as well.
#
# The script encodes one long text while a second thread wakes every millisecond, and compares the longest time that this
# thread could not run with the time of the call.
#
# Seen: tokenizers 0.23.3, Python 3.11, 2 cores, 2026-11-29.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PYTHON'
import threading
import time

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
words = [f"word{number * 7919 % 10007}" for number in range(20_000)]
trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
tokenizer.train_from_iterator([" ".join(words)], trainer)
text = " ".join(words * 8)


def share_blocked(call):
    """The longest time that another thread could not run, as a share of the call's; and the result."""
    over, longest = threading.Event(), [0.0]

    def tick():
        last = time.perf_counter()
        while not over.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            longest[0], last = max(longest[0], now - last), now

    thread = threading.Thread(target=tick)
    thread.start()
    time.sleep(0.1)
    longest[0] = 0.0
    began = time.perf_counter()
    result = call()
    took = time.perf_counter() - began
    over.set()
    thread.join()
    return longest[0] / took, took, result


alone, took, encoding = share_blocked(lambda: tokenizer.encode(text))
print(f"encode             {took:5.2f} s, another thread was blocked for {alone:4.0%} of it")
batch, took, (batched,) = share_blocked(lambda: tokenizer.encode_batch_fast([text]))
print(f"encode_batch_fast  {took:5.2f} s, another thread was blocked for {batch:4.0%} of it")
ids = encoding.ids
back, took, _ = share_blocked(lambda: tokenizer.decode(ids))
print(f"decode             {took:5.2f} s, another thread was blocked for {back:4.0%} of it")
assert batched.ids == ids
assert alone > 0.8 and back > 0.8, "encode or decode lets other threads run now"
assert batch < 0.5, "encode_batch_fast holds the lock now"
PYTHON
