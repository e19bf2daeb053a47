#!/bin/sh
# XGrammar holds to each of two keywords of a JSON schema and, where they stand side by side, to only one of them. `pattern`
# takes `maxLength` away, and so does a format; a format takes `pattern`; `minimum` takes `multipleOf`; `enum` takes `type`
# and `maximum`; `$ref` and `anyOf` take all beside them; two branches of `allOf` take each other, and any JSON at all passes.
# `required` is kept only of names that `properties` has. The schema compiles, in strict mode too, and of six of these ten not
# even the log tells. Pydantic writes such pairs: Field(pattern=…, max_length=…), Field(ge=0, multiple_of=5). llguidance
# holds to both in each case, and jsonschema says what is valid. So a schema that was tried keyword by keyword lets invalid
# replies through once it is put together, and whoever skips validation, because the grammar is exact, passes them on.
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
import os

import jsonschema
import llguidance
import xgrammar

ENDS = 256
TOKENS = [*(bytes([byte]) for byte in range(256)), b""]


class Bytes:  # what llguidance asks of a tokenizer
    tokens, eos_token_id, bos_token_id, unk_token_id = TOKENS, ENDS, None, None

    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())


TOKENIZER = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
COMPILER = xgrammar.GrammarCompiler(
    xgrammar.TokenizerInfo(TOKENS, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[ENDS])
)


def by_llguidance(schema, reply):
    matcher = llguidance.LLMatcher(TOKENIZER, llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(list(reply)) == len(reply) and matcher.is_accepting()


def by_xgrammar(schema, reply):
    """Whether it lets the reply through, and whether it wrote anything to the log when it compiled the schema."""
    before = os.fstat(2).st_size
    matcher = xgrammar.GrammarMatcher(COMPILER.compile_json_schema(json.dumps(schema), strict_mode=True))
    said = os.fstat(2).st_size > before
    return all(matcher.accept_token(byte) for byte in reply) and matcher.accept_token(ENDS), said


LOW = {"$defs": {"number": {"type": "integer"}}}
CASES = (  # one keyword, the other, and a reply that only the other forbids; then whether the log tells
    ({"type": "string", "pattern": "^[a-z]+$"}, {"type": "string", "maxLength": 2}, "abc", True),
    ({"type": "string", "format": "email"}, {"type": "string", "maxLength": 3}, "a@b.cde", True),
    ({"type": "string", "format": "date"}, {"type": "string", "pattern": "^2026-..-..$"}, "1999-01-01", False),
    ({"type": "integer", "minimum": 0}, {"type": "integer", "multipleOf": 5}, 7, True),
    ({"enum": ["a", 1]}, {"type": "string"}, 1, False),
    ({"enum": [1, 20]}, {"type": "integer", "maximum": 5}, 20, False),
    ({"$ref": "#/$defs/number", **LOW}, {"type": "integer", "maximum": 3}, 9, False),
    ({"anyOf": [{"minimum": 3}, {"type": "string"}]}, {"type": "integer"}, "a", False),
    ({"allOf": [{"type": "integer"}]}, {"allOf": [{"maximum": 5, "type": "integer"}]}, 9, True),
    ({"type": "object", "properties": {"a": True}}, {"type": "object", "required": ["b"]}, {"a": 1}, False),
)
for one, other, value, told in CASES:
    both = one | other
    if "allOf" in one:
        both = {"allOf": one["allOf"] + other["allOf"]}
    reply = json.dumps(value).encode()
    passed, said = by_xgrammar(both, reply)
    print(f"{json.dumps(both)}\n    {reply.decode()}: let through by xgrammar, {'with a line in' if said else 'not in'} the log")
    assert passed and said == told and not by_llguidance(both, reply)
    assert not jsonschema.Draft202012Validator(both).is_valid(value)
    assert by_xgrammar(one, reply)[0]
    if "required" not in other:  # alone it is passed over as well
        assert not by_xgrammar(other, reply)[0], other
PYTHON
