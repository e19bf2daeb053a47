"""What the grammar engines make of the official JSON-Schema-Test-Suite: the table of docs/grammars.md.

    python bench/schema_suite.py [--suite FOLDER] [--engine llguidance|xgrammar] [--show]

FOLDER holds the suite's JSON files of draft 2020-12; without one, the copy in jsonschema's source distribution is
fetched with pip. A schema is taken, or refused by name. Of one that is taken, a valid instance must be let through
token by token in one of its spellings (the order of an object's properties, 1.0 or 1), and an invalid one in none.
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
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import RequestError
from engine.messages import Grammar
from engine.plugin.manager import Plugins, resolve
from engine.plugin.specs import CompiledGrammar, GrammarEngine, Vocabulary

DRAFT = "json/tests/draft2020-12"
END = 256
WORDS = Vocabulary([*(bytes([byte]) for byte in range(256)), b"<end>"], frozenset({END}), (END,))
COLUMNS = ("schemas", "taken", "valid", "valid, refused", "invalid", "invalid, taken")


def fetched(folder: Path) -> Path:
    """The suite, out of jsonschema's source distribution."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
    subprocess.run([*pip, "jsonschema"], check=True)
    (archive,) = folder.glob("jsonschema-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(folder.glob(f"jsonschema-*/{DRAFT}"))


def spellings(value: Any) -> Iterator[Any]:
    """Values that are equal to `value` and written otherwise."""
    if isinstance(value, dict):
        for names in itertools.islice(itertools.permutations(value), 120):
            each = [list(itertools.islice(spellings(value[name]), 24)) for name in names]
            for values in itertools.islice(itertools.product(*each), 50):
                yield dict(zip(names, values, strict=True))
    elif isinstance(value, list):
        yield from map(list, itertools.islice(itertools.product(*(list(spellings(each)) for each in value)), 100))
    else:
        yield value
        if isinstance(value, float) and value.is_integer():
            yield int(value)


def lets_through(engine: GrammarEngine, compiled: CompiledGrammar, value: Any) -> bool:
    """Whether a reply could be `value`, in one of its spellings."""
    return any(
        follows(engine, compiled, json.dumps(each, ensure_ascii=False, separators=(",", ":")))
        for each in itertools.islice(spellings(value), 200)
    )


def follows(engine: GrammarEngine, compiled: CompiledGrammar, text: str) -> bool:
    """Whether the masks let `text` through, byte by byte, and end it there."""
    matcher, masks = compiled.matcher(), np.zeros((1, -(-len(WORDS.tokens) // 32)), np.int32)
    for token in (*text.encode("utf-8", "surrogatepass"), END):
        engine.fill([matcher], masks, [0])
        if not int(masks[0, token // 32]) >> (token % 32) & 1:
            return False
        assert engine.accept([matcher], [token]) == [True]
    return True


def run(engine: GrammarEngine, file: Path, refusals: Counter[str], show: bool) -> Counter[str]:
    """The counts of one file."""
    counts: Counter[str] = Counter()
    for group in json.loads(file.read_text()):
        counts["schemas"] += 1
        try:
            compiled = engine.compile(Grammar("json_schema", json.dumps(group["schema"])))
        except RequestError as error:
            refusals[error.message.replace("llguidance does not take the json_schema: ", "")[:70]] += 1
            if show:
                print(f"{file.stem}: {group['description']}: {error}")
            continue
        counts["taken"] += 1
        for test in group["tests"]:
            kind, got = "valid" if test["valid"] else "invalid", lets_through(engine, compiled, test["data"])
            counts[kind] += 1
            if got != test["valid"]:
                counts[f"{kind}, {'taken' if got else 'refused'}"] += 1
                if show:
                    print(f"{file.stem}: {json.dumps(group['schema'])[:200]}: {json.dumps(test['data'])[:80]} {kind}")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path)
    parser.add_argument("--engine", default="llguidance")
    parser.add_argument(
        "--show", action="store_true", help="every schema that is refused, every instance that is wrong"
    )
    given = parser.parse_args()
    entry = Plugins.load().grammars[given.engine]
    engine: GrammarEngine = resolve(entry.target)(WORDS, threads=1, whitespace=True)
    with tempfile.TemporaryDirectory() as name:
        files = sorted((given.suite or fetched(Path(name))).glob("*.json"))
        total: Counter[str] = Counter()
        refusals: Counter[str] = Counter()
        print(f"| {given.engine} | {' | '.join(COLUMNS)} |\n|---{'|---' * len(COLUMNS)}|")
        for file in files:
            counts = run(engine, file, refusals, given.show)
            total += counts
            print(f"| {file.stem} | {' | '.join(str(counts[column]) for column in COLUMNS)} |")
        print(f"| all | {' | '.join(str(total[column]) for column in COLUMNS)} |")
    print("\nrefused:", *(f"{count:>4}  {said}" for said, count in refusals.most_common()), sep="\n")


if __name__ == "__main__":
    main()
