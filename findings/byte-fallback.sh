#!/bin/sh
# A vocabulary with byte fallback (Llama 2, Mistral, Gemma) writes a rare character as one token for each of its bytes.
# tokenizers decodes neighbouring byte tokens as one run, and a run that is not UTF-8 as a whole becomes one U+FFFD for each
# byte: characters that were complete vanish again. SentencePiece, whose format this is, keeps every complete character of
# the same ids. So a reply that ends inside a character loses its neighbours too, text that a client has already been sent
# is not a prefix of the final text, and one stray byte costs the whole run. Any other token ends a run. A byte-level
# vocabulary (GPT-2, Llama 3, Qwen) does not do this: its decoder replaces only what is broken.
#
# Seen: tokenizers 0.23.3, sentencepiece 0.2.3, Python 3.11, 2026-11-30.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check tokenizers==0.23.3 sentencepiece==0.2.3
"$folder/venv/bin/python" - <<'PYTHON'
import io

import sentencepiece
from tokenizers import Tokenizer, decoders, models

trained = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["the cat sat on the mat", "a dog and a cat", "some more words"] * 20),
    model_writer=trained, vocab_size=300, model_type="bpe", byte_fallback=True, minloglevel=2,
)
theirs = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
vocabulary = {theirs.id_to_piece(id): id for id in range(theirs.get_piece_size())}
tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
byte_level = Tokenizer(models.BPE({"Ã": 0, "©": 1}, []))  # the bytes C3 and A9, in this alphabet
byte_level.decoder = decoders.ByteLevel()


def both(data):
    ids = [vocabulary[f"<0x{byte:02X}>"] if isinstance(byte, int) else vocabulary[byte] for byte in data]
    texts = tokenizer.decode(ids), theirs.decode(ids)
    print(f"{' '.join(f'{byte:02X}' if isinstance(byte, int) else byte for byte in data):24}", *map(ascii, texts))
    return texts


two = "éü".encode()
print(f"{'bytes':24} tokenizers, sentencepiece")
assert both(two) == ("éü", "éü")
assert both(two[:3]) == ("\ufffd" * 3, "é\ufffd")  # é was whole before C3 came
assert both([0xA9, *two]) == ("\ufffd" * 5, "\ufffdéü")  # one byte too many, at the other end
assert both([*two[:2], "a", 0xC3]) == ("éa\ufffd", "éa\ufffd")  # `a` ends the run
seen = byte_level.decode([0, 1, 0])
print(f"{'C3 A9 C3, byte-level':24} {ascii(seen)}")
assert seen == "é\ufffd"
PYTHON
