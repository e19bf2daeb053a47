#!/bin/sh
# A length bound or a pattern of a JSON string takes its escapes away in XGrammar. A plain string may hold \n, \" and \\;
# with `minLength: 1`, which Pydantic writes for Field(min_length=1), none of them can be said any more: no line break, no
# quote, no backslash, though JSON Schema counts characters of the value and forbids none. A pattern that asks for a quote,
# ^a"b$, takes no value that it describes, and it is compiled without a word. `minLength: 0` and `enum` keep escapes.
# llguidance takes all of these in the short spelling of an escape, but never \u0041, which XGrammar lets through in a
# plain string. jsonschema judges what is valid. So one schema gives code on many lines from one engine, and on one line
# from the other.
#
# Seen: xgrammar 0.2.9, llguidance 1.9.1, jsonschema 4.26.0, Python 3.11, 2026-11-30.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    xgrammar==0.2.9 llguidance==1.9.1 jsonschema==4.26.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' 2>"$folder/log" || { cat "$folder/log"; exit 1; }
import json

import jsonschema
import llguidance
import xgrammar


class Bytes:  # one token a byte, and an end
    tokens, eos_token_id, bos_token_id, unk_token_id = [*(bytes([byte]) for byte in range(256)), b""], 256, None, None

    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())


THEIRS = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
COMPILER = xgrammar.GrammarCompiler(
    xgrammar.TokenizerInfo(Bytes.tokens, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[256])
)


def verdicts(schema, text):
    said = [jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))]
    other = llguidance.LLMatcher(THEIRS, llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    assert not other.is_error(), other.get_error()
    said.append(other.try_consume_tokens(list(text.encode())) == len(text.encode()) and other.is_accepting())
    matcher = xgrammar.GrammarMatcher(COMPILER.compile_json_schema(json.dumps(schema), strict_mode=False))
    return [*said, all(matcher.accept_token(byte) for byte in text.encode()) and matcher.accept_token(256)]


print("valid by jsonschema, said by llguidance, said by xgrammar:")
TEXTS = '"a-b"', r'"a\nb"', r'"a\"b"', r'"a\\b"', r'"\u0041"'
plain, bound = [True] * 3, [True, True, False]
spelled = {"": [True, False, True], "bound": [True, False, False]}
for extra, expected in (
    ({}, plain), ({"minLength": 0}, plain),
    ({"minLength": 1}, bound), ({"maxLength": 99}, bound), ({"pattern": "^[^x]*$"}, bound),
):
    found = {text: verdicts({"type": "string"} | extra, text) for text in TEXTS}
    print(json.dumps(extra), *(f"{text} {''.join('-+'[each] for each in said)}" for text, said in found.items()), sep="   ")
    last = spelled["bound" if expected is bound else ""]
    assert list(found.values()) == [plain, *[expected] * 3, last], found
assert verdicts({"type": "string", "pattern": '^a"b$'}, r'"a\"b"') == bound
assert verdicts({"type": "string", "enum": ["a\nb"]}, r'"a\nb"') == plain
PYTHON
