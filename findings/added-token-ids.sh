#!/bin/sh
# The ids of `added_tokens` in a tokenizer.json are only read where the model's vocabulary has the token too. All others are
# numbered again when the file is loaded, in order, from the number of entries of the vocabulary on, and without a word. In a
# vocabulary whose ids have a hole, that number is an id in use: two tokens share it, and the older cannot be decoded any
# more. transformers loads the same file the same way, whatever `added_tokens_decoder` in tokenizer_config.json says, so
# the end-of-sequence id it reports is not the file's. A file that tokenizers wrote loads as written; converters beware.
#
# Seen: tokenizers 0.23.3, transformers 5.24.0, Python 3.11, 2026-11-30.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check tokenizers==0.23.3 transformers==5.24.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def written(vocabulary, added):
    tokens = [{"id": id, "content": content, **FLAGS} for content, id in added.items()]
    return json.dumps({"version": "1.0", "added_tokens": tokens,
                       "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}})


def loaded(vocabulary, added):
    tokenizer = Tokenizer.from_str(written(vocabulary, added))
    ids = {content: tokenizer.token_to_id(content) for content in added}
    print(f"{json.dumps(vocabulary):28} + {json.dumps(added):20} -> {json.dumps(ids)}")
    return tokenizer, ids


assert loaded({"a": 0, "b": 1}, {"<end>": 2})[1] == {"<end>": 2}
assert loaded({"a": 0, "b": 1}, {"<end>": 9})[1] == {"<end>": 2}
assert loaded({"a": 0, "b": 1, "<end>": 9}, {"<end>": 9})[1] == {"<end>": 9}  # in the vocabulary: its id stands
assert loaded({"a": 0, "b": 1}, {"<x>": 9, "<y>": 7})[1] == {"<x>": 2, "<y>": 3}
tokenizer, ids = loaded({"a": 0, "b": 2}, {"<end>": 3})  # two entries, so 2 comes next, which is b
assert ids == {"<end>": 2} and tokenizer.token_to_id("b") == 2
assert tokenizer.encode("b").ids == [2] and tokenizer.decode([2], skip_special_tokens=False) == "<end>"

folder = Path(sys.argv[1])
(folder / "tokenizer.json").write_text(written({"a": 0, "b": 1}, {"<end>": 9}))
stated = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
stated["added_tokens_decoder"] = {"9": {"content": "<end>", **FLAGS}}
(folder / "tokenizer_config.json").write_text(json.dumps(stated))
eos = AutoTokenizer.from_pretrained(folder).eos_token_id
print(f"transformers: eos_token_id {eos}, where both files say 9")
assert eos == 2
PYTHON
