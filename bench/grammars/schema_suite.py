"""What the grammar engines make of the official JSON-Schema-Test-Suite: the table of bench/RESULTS.md.

    python -m bench.grammars.schema_suite [--suite FOLDER] [--engine llguidance|xgrammar] [--show]
    python -m bench.grammars.schema_suite --fetch FOLDER

FOLDER is the suite's, with the drafts in it; without one, the copy in jsonschema's source distribution is fetched with
pip. A schema is taken, or refused by name. Of one that is taken, a valid instance must be let through token by token in
one of its spellings (the order of an object's properties, 1.0 or 1), and an invalid one in none. The suite's `optional`
tests are counted by themselves.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from engine.errors import RequestError
from engine.grammars.closed import prepared
from engine.params.grammar import Grammar
from engine.plugin.registry import Plugins, resolve
from engine.plugin.specs import CompiledGrammar, GrammarEngine, Vocabulary

PACKAGE = "jsonschema==4.26.0"  # whose source distribution has the suite
DRAFTS = {
    "draft7": "http://json-schema.org/draft-07/schema#",  # named by no schema of its own in the suite
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
}
PARTS = ("", "optional", "optional/format")
END = 256
WORDS = Vocabulary([*(bytes([byte]) for byte in range(256)), b"<end>"], frozenset({END}), (END,))
COLUMNS = ("schemas", "taken", "valid", "valid, refused", "invalid", "invalid, taken")


class Wrong(Struct, frozen=True):
    """An instance that is let through and invalid, or `valid` and not let through."""

    file: str
    schema: Any
    instance: Any
    valid: bool


class Result(Struct):
    """Of some files of the suite."""

    counts: Counter[str]
    refusals: list[str]
    wrong: list[Wrong]


def fetch(folder: Path) -> None:
    """Unpack the suite's drafts into `folder`, out of jsonschema's source distribution."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([*pip, "--no-binary", ":all:", "-d", name, PACKAGE], check=True)
        (archive,) = Path(name).glob("jsonschema-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(name, filter="data")
        (tests,) = Path(name).glob("jsonschema-*/json/tests")
        for draft in DRAFTS:
            for file in (tests / draft).rglob("*.json"):
                copy = folder / file.relative_to(tests)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())


def made(name: str) -> GrammarEngine:
    """The engine `name`, over single bytes."""
    engine: GrammarEngine = resolve(Plugins.load().entries("grammars")[name].target)(WORDS, threads=1, whitespace=True)
    return engine


def compiled(engine: GrammarEngine, schema: Any) -> CompiledGrammar:
    """What `engine` makes of `schema` as it is meant, with nothing closed. Raises RequestError."""
    return engine.compile(prepared(Grammar("json_schema", json.dumps(schema), strict=False)))


def spellings(value: Any) -> Iterator[str]:
    """Texts in JSON of what is equal to `value`."""
    if isinstance(value, dict):
        for names in itertools.islice(itertools.permutations(value), 120):
            each = [list(itertools.islice(spellings(value[name]), 24)) for name in names]
            for values in itertools.islice(itertools.product(*each), 50):
                pairs = (f"{_text(name)}:{text}" for name, text in zip(names, values, strict=True))
                yield "{" + ",".join(pairs) + "}"
    elif isinstance(value, list):
        for values in itertools.islice(itertools.product(*(list(spellings(each)) for each in value)), 100):
            yield "[" + ",".join(values) + "]"
    else:
        yield _text(value)
        if isinstance(value, float):
            yield str(int(value)) if value.is_integer() else format(Decimal(repr(value)), "f")


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def lets_through(engine: GrammarEngine, grammar: CompiledGrammar, value: Any) -> bool:
    """Whether a reply could be `value`, in one of its spellings."""
    return any(follows(engine, grammar, text) for text in itertools.islice(spellings(value), 200))


def follows(engine: GrammarEngine, grammar: CompiledGrammar, text: str) -> bool:
    """Whether the masks let `text` through, byte by byte, and end it there."""
    matcher, masks = grammar.matcher(), np.zeros((1, -(-len(WORDS.tokens) // 32)), np.int32)
    for token in (*text.encode("utf-8", "surrogatepass"), END):
        engine.fill([matcher], masks, [0])
        if not int(masks[0, token // 32]) >> (token % 32) & 1:
            return False
        assert engine.accept([matcher], [token]) == [True]
    return True


def run(engine: GrammarEngine, file: Path, draft: str) -> Result:
    """One file of the suite."""
    result = Result(Counter(), [], [])
    for group in json.loads(file.read_text()):
        schema = group["schema"]
        if isinstance(schema, dict):
            schema = {"$schema": draft} | schema
        result.counts["schemas"] += 1
        try:
            grammar = compiled(engine, schema)
        except RequestError as error:
            result.refusals.append(error.message)
            continue
        result.counts["taken"] += 1
        for test in group["tests"]:
            valid, got = test["valid"], lets_through(engine, grammar, test["data"])
            kind = "valid" if valid else "invalid"
            result.counts[kind] += 1
            if got != valid:
                result.counts[f"{kind}, {'taken' if got else 'refused'}"] += 1
                result.wrong.append(Wrong(file.stem, schema, test["data"], valid))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path)
    parser.add_argument("--fetch", type=Path, help="only unpack the suite into this folder")
    parser.add_argument("--engine", default="llguidance")
    parser.add_argument("--show", action="store_true", help="every refusal, every instance that is wrong")
    given = parser.parse_args()
    if given.fetch:
        fetch(given.fetch)
        return
    engine, refusals = made(given.engine), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = given.suite or Path(name)
        if not given.suite:
            fetch(folder)
        for (draft, uri), part in itertools.product(DRAFTS.items(), PARTS):
            total: Counter[str] = Counter()
            print(f"\n| {given.engine}, {draft} {part} | {' | '.join(COLUMNS)} |\n|---{'|---' * len(COLUMNS)}|")
            for file in sorted((folder / draft / part).glob("*.json")):
                result = run(engine, file, uri)
                total += result.counts
                refusals.update(result.refusals)
                print(f"| {file.stem} | {' | '.join(str(result.counts[column]) for column in COLUMNS)} |")
                for wrong in result.wrong if given.show else ():
                    print(f"  {_text(wrong.schema)[:200]}: {json.dumps(wrong.instance)[:80]}, valid: {wrong.valid}")
            print(f"| all | {' | '.join(str(total[column]) for column in COLUMNS)} |")
    if given.show:
        print("\nrefused:", *(f"{count:>4}  {said[:160]}" for said, count in refusals.most_common()), sep="\n")


if __name__ == "__main__":
    main()
