"""The plugins of docs/plugins.md, as they stand there: each hook has an example that is loaded and used."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import numpy as np
import pytest
import torch
from house import open_house

from engine.cache.keys import media_keys
from engine.cli import main
from engine.config import ServerOptions
from engine.http.app import ROUTES, serve
from engine.http.plugins import with_plugins
from engine.media.frames import Frames
from engine.messages.media import unpacked
from engine.plugin import Terms, Waiting, kernels
from engine.plugin.checkpoints import open_checkpoint
from engine.plugin.hookspecs import KINDS
from engine.plugin.registry import Plugins, resolve
from engine.plugin.testing import (
    ATTENTION_CASES,
    GRAMMAR_CASES,
    LATENT_CASES,
    MODEL_SCENARIOS,
    check_attention,
    check_grammar,
    check_latent_attention,
    check_model,
    check_processor,
    check_scheme,
    check_store,
    check_tool_parser,
)

GUIDE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()
SIZE, HEADS, VOCABULARY = 8, 2, 16
CONFIG = {"hidden_size": SIZE, "num_attention_heads": HEADS, "vocab_size": VOCABULARY}


def test_the_kernels_of_the_guide_are_there() -> None:
    pytest.importorskip("triton")
    (table,) = re.findall(r"\| names \| compute \|\n(.*?)\n\n", GUIDE, re.DOTALL)
    names = [name for row in table.splitlines()[1:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert len(names) > 15 and not [name for name in names if not hasattr(kernels, name)]


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tall = dict.fromkeys(("embed_tokens", "lm_head"), (VOCABULARY, SIZE))
    square = {f"{name}_proj": (SIZE, SIZE) for name in "qkvo"}
    return {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in (tall | square).items()}


def one_layer() -> Any:
    """The model of the guide."""
    (source,) = re.findall(r"```python\n(from engine\.plugin\.layers import .*?)```", GUIDE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(source, names)
    return names["OneLayer"]


def reference_of(tensors: dict[str, torch.Tensor]) -> Callable[[list[int]], torch.Tensor]:
    """What that model computes with these weights."""

    def reference(ids: list[int]) -> torch.Tensor:
        weight = {name.removesuffix(".weight"): tensor.double() for name, tensor in tensors.items()}
        hidden = weight["embed_tokens"][ids]
        parts = (hidden @ weight[f"{name}_proj"].T for name in "qkv")
        query, key, value = (part.view(len(ids), HEADS, -1).transpose(0, 1) for part in parts)
        scores = (query @ key.transpose(1, 2) / (SIZE // HEADS) ** 0.5).masked_fill(
            torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1), -torch.inf
        )
        attended = (scores.softmax(-1) @ value).transpose(0, 1).reshape(len(ids), SIZE)
        return ((hidden + attended @ weight["o_proj"].T) @ weight["lm_head"].T).float()

    return reference


@pytest.mark.parametrize("scenario", MODEL_SCENARIOS)
def test_the_model_of_the_guide(scenario: str) -> None:
    check_model(one_layer(), CONFIG, weights(), reference_of(weights()), scenario)


# ── the examples of hooks ────────────────────────────────────────────────────────────────────

BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
# Files are those that a first line names, and two whose manifests stand apart from them.
FILES = {match[1]: block for block in BLOCKS if (match := re.match(r"# (\S+\.py)\n", block))} | {
    name: next(block for block in BLOCKS if f"class {kind}(" in block)
    for name, kind in (("my_package/one_layer.py", "OneLayer"), ("angles.py", "Angles"))
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of all the guide's files, from which they can be imported."""
    for name, source in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in FILES}
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for module in modules:
        sys.modules.pop(module, None)


def plugins_with(folder: Path, kind: str) -> Plugins:
    """Those there are once the example of `kind` is named."""
    (name,) = (name for name, source in FILES.items() if f"def register_{kind}(" in source)
    if name.endswith("/__init__.py"):  # a package, which has an entry point
        info = folder / "guide-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: guide\nVersion: 1\n")
        (toml,) = re.findall(r'\[project.entry-points."engine.plugins"\]\n(.*?)```', GUIDE, re.DOTALL)
        (info / "entry_points.txt").write_text("[engine.plugins]\n" + toml.replace('"', ""))
        return Plugins.load([toml.split(" = ")[0]])
    return Plugins.load([str(folder / name)])


def target_of(folder: Path, kind: str) -> Any:
    """What the example of `kind` registers, imported."""
    plugins = plugins_with(folder, kind)
    (entry,) = (entry for entry in plugins.entries(kind).values() if (kind, entry.name) in plugins.named)
    return resolve(entry.target)


def test_every_hook_is_in_the_table_and_has_an_example() -> None:
    assert [kind for kind in KINDS if f"| `register_{kind}` |" not in GUIDE] == []
    assert [kind for kind in KINDS if GUIDE.count(f"def register_{kind}(") != 1] == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_example_of_each_hook_loads(folder: Path, kind: str) -> None:
    assert target_of(folder, kind) is not None


def test_the_page_starts_with_a_plugin_that_runs(folder: Path) -> None:
    assert len(BLOCKS[0].strip().splitlines()) <= 15 and "shortest.py" in BLOCKS[0]
    waiting = [
        Waiting(arrival=index, priority=0, prompt_len=length, length=length, max_new=1)
        for index, length in enumerate((5, 2, 9))
    ]
    assert target_of(folder, "policies")().order(waiting, [0, 0, 0]) == [1, 0, 2]


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_the_attention_backend(folder: Path, case: Any) -> None:
    check_attention(target_of(folder, "attention"), case)


@pytest.mark.parametrize("case", LATENT_CASES, ids=str)
def test_the_latent_attention_backend(folder: Path, case: Any) -> None:
    check_latent_attention(target_of(folder, "latent_attention"), case)


def test_the_quantization(folder: Path) -> None:
    scheme = target_of(folder, "quantization")(None)
    check_scheme(scheme, experts=False, error=0.02)
    stored = weights()
    for name in stored:
        if "_proj" in name:
            scale = stored[name].abs().amax(1, keepdim=True) / 127
            stored[name] = (stored[name] / scale).round() * scale
    check_model(one_layer(), CONFIG, weights(), reference_of(stored), "whole", quantization=scheme)
    with pytest.raises(AssertionError, match="logits"):  # it does quantize
        check_model(one_layer(), CONFIG, weights(), reference_of(weights()), "whole", quantization=scheme)


def test_the_checkpoint_format_opens_its_name(folder: Path) -> None:
    checkpoint = open_checkpoint(plugins_with(folder, "checkpoints"), "letters")
    assert (checkpoint.name(), checkpoint.text().tokenizer.encode("abc").ids) == ("letters", [0, 1, 2])


def test_the_processor_of_media(folder: Path) -> None:
    check_processor(target_of(folder, "media"), {}, {}, image=7)
    processor = target_of(folder, "media")(Terms(), Terms())
    medium = processor.prepare(Frames(np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3), (), b"source"))
    pixels = unpacked(medium.payload)
    assert (pixels.shape, list(pixels.data[:6])) == ((1, 2, 2, 3), [0, 1, 2, 6, 7, 8])
    placed = processor.placed([1, 7, 2], [medium])
    assert (placed.ids, placed.spans) == ([1, 7, 7, 7, 7, 2], (((1, 4),),))
    assert placed.runs == [(1, media_keys(medium.digest, 4))]


def test_the_parser(folder: Path) -> None:
    check_tool_parser(target_of(folder, "parsers"))


def test_the_store(folder: Path) -> None:
    check_store(target_of(folder, "tiers"), "any")


def test_the_grammar_engine(folder: Path) -> None:
    engine = target_of(folder, "grammars")
    cases = [case for case in GRAMMAR_CASES if case.kind == "choice"]
    assert cases and all(check_grammar(engine, case) for case in cases)


@pytest.mark.anyio
async def test_the_route(folder: Path) -> None:
    routes = with_plugins(ROUTES, plugins_with(folder, "routes"))
    listening, urls = anyio.Event(), []

    def started(url: str) -> None:
        urls.append(url)
        listening.set()

    async with open_house() as house, anyio.create_task_group() as group:

        async def run() -> None:
            await serve(house.front, ServerOptions(port=0), routes, started=started)

        group.start_soon(run)
        with anyio.fail_after(60):
            await listening.wait()
        async with aiohttp.ClientSession(urls[0]) as session:
            async with session.post("/shout", json={"text": "a", "max_tokens": 3}) as response:
                assert (response.status, await response.json()) == (200, {"text": "BCD"})
            async with session.post("/shout", json={"text": ""}) as response:
                assert (response.status, (await response.json())["error"]["param"]) == (400, "text")
        group.cancel_scope.cancel()


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(folder / "pages.py")
    assert main(["pages", "--plugins", path, "100"]) == 0
    assert main(["pages", "--plugins", path, "--page-size", "0x"]) == 2
    assert capsys.readouterr().out == "7\n"
