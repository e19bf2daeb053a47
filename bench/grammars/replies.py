"""Replies of a real model at temperature 1 under the schemas of real functions: does every one that ends validate?

    python -m bench.grammars.replies [--data FILE] [--schemas 50] [--replies 10] [--tokens 256] [--option N=V ...]

The schemas are the parameters of functions of the Berkeley Function Calling Leaderboard: FILE is a BFCL_v4_*.json of
the package bfcl-eval; without one its wheel is fetched with pip. A reply ends unless it reaches `--tokens`. Times to
compile are those of the compiler, from the fork to the answer.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import jsonschema_rs

from engine import AsyncEngine, RequestError, SamplingParams
from engine.messages.control import Stats
from engine.messages.grammars import GRAMMAR

MEMBER = "bfcl_eval/data/BFCL_v4_live_simple.json"
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None}  # as Python has them, and JSON Schema


def fetched(folder: Path) -> Path:
    """The leaderboard's functions, out of its wheel."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*pip, "bfcl-eval"], check=True)
    (wheel,) = folder.glob("bfcl_eval-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def functions(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What to ask, and the schema of the answer; no schema twice."""
    seen: set[str] = set()
    for line in file.read_text().splitlines():
        case = json.loads(line)
        for function in case["function"]:
            schema = as_json_schema(function["parameters"])
            if (text := json.dumps(schema)) not in seen:
                seen.add(text)
                yield case["question"][0][-1]["content"], schema


def as_json_schema(value: Any) -> Any:
    """The leaderboard's own way of writing schemas, in JSON Schema's terms."""
    if isinstance(value, list):
        return [as_json_schema(each) for each in value]
    if not isinstance(value, dict):
        return value
    schema = {name: as_json_schema(each) for name, each in value.items() if name not in ("default", "optional")}
    kind = schema.get("type")
    if isinstance(kind, str) and kind in TYPES:
        schema["type"] = TYPES[kind]
        if TYPES[kind] is None:
            del schema["type"]
    return schema


async def run(given: argparse.Namespace, asked: list[tuple[str, dict[str, Any]]]) -> None:
    options = dict(option.split("=", 1) for option in given.option)
    compiled: list[float] = []

    def on_stats(stats: Stats) -> None:
        compiled.extend(array("f", stats.make_seconds.get(GRAMMAR, b"")))

    async with AsyncEngine(**{"model": "smollm2-135m", "max_model_len": 2048, **options}) as engine:
        engine.front.on_stats.append(on_stats)
        ended = valid = cut = 0
        refused: list[str] = []
        for number, (question, schema) in enumerate(asked):
            params = [
                SamplingParams(temperature=1.0, max_tokens=given.tokens, seed=seed, json_schema=json.dumps(schema))
                for seed in range(given.replies)
            ]
            prompt = [{"role": "user", "content": f"{question}\nAnswer with the arguments of the function, as JSON."}]
            try:
                replies = await engine.generate([prompt] * len(params), params)
            except RequestError as error:
                refused.append(str(error))
                continue
            validator = jsonschema_rs.validator_for(schema, validate_formats=True)
            for reply in replies:
                if reply.finish != "stop":
                    cut += 1
                    continue
                ended += 1
                good = validator.is_valid(json.loads(reply.text))
                valid += good
                if not good:
                    print(f"not valid: {json.dumps(schema)[:300]}\n  {reply.text[:300]}")
            print(f"{number + 1} schemas: {valid} of {ended} replies that ended are valid, {cut} were cut", end="\r")
        await anyio.sleep(1.2)  # the last times are on their way
    print(f"\n{len(asked) - len(refused)} schemas taken, {len(refused)} refused")
    for said in refused:
        print(f"  {said[:200]}")
    ordered = sorted(1e3 * seconds for seconds in compiled)
    print(f"{valid} of {ended} replies that ended are valid; {cut} were cut at {given.tokens} tokens")
    print(f"compiling: p50 {ordered[len(ordered) // 2]:.1f} ms, p99 {ordered[len(ordered) * 99 // 100]:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--schemas", type=int, default=50)
    parser.add_argument("--replies", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the engine")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = list(functions(given.data or fetched(Path(name))))
    step = max(1, len(found) // given.schemas)
    anyio.run(run, given, found[::step][: given.schemas], backend_options={"use_uvloop": True})


if __name__ == "__main__":
    main()
