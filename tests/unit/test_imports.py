"""Imports point one way: the rules of the house, held against the syntax tree of every file."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path.relative_to(ROOT).as_posix() for top in ("engine", "plugins") for path in (ROOT / top).rglob("*.py")
)

PLUGIN_FACE = {"engine.plugin", *(f"engine.plugin.{name}" for name in ("layers", "kernels", "http", "testing"))}
PLUGIN_FACE |= {f"engine.plugin.{name}" for name in ("hookspecs", "specs", "parsing", "routing", "tiers", "media")}
TORCH_ROOMS = ("worker", "layers", "kernels", "parallel", "testing")
TORCH_FOLDERS = (*(f"engine/{room}/" for room in TORCH_ROOMS), "plugins/")
TORCH_FILES = tuple(f"engine/plugin/{name}.py" for name in ("layers", "kernels", "collectives", "testing"))
PURE = ("engine/sched/", "engine/cache/", "engine/parallel/mesh.py")
IMPURE = {"torch", "anyio", "asyncio", "socket", "threading", "time"}


def imports(path: str, source: str) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports at any level, and whether only a type checker sees it."""
    package = path.removesuffix(".py").removesuffix("/__init__").replace("plugins", "engine_plugins", 1).split("/")
    package = package if path.endswith("__init__.py") else package[:-1]

    def walk(node: ast.AST, typing: bool) -> Iterator[tuple[str, bool]]:
        match node:
            case ast.Import(names=names):
                yield from ((alias.name, typing) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = package[: len(package) - level + 1] if level else []
                origin = ".".join([*base, *([module] if module else [])])
                yield from ((f"{origin}.{alias.name}", typing) for alias in names)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                for child in node.body:
                    yield from walk(child, True)
                for child in node.orelse:
                    yield from walk(child, typing)
            case _:
                for child in ast.iter_child_nodes(node):
                    yield from walk(child, typing)

    yield from walk(ast.parse(source), False)


def violations(path: str, source: str) -> list[str]:
    """The rules of docs/architecture.md that a file breaks, one line each."""
    found = []
    for module, typing in imports(path, source):
        top = module.split(".")[0]
        if path.startswith("engine/") and top in ("engine_plugins", "plugins"):
            found.append(f"{path} imports {module}: the engine never imports a plugin")
        if path.startswith("plugins/") and top == "engine" and not _is_face(module):
            found.append(f"{path} imports {module}: a plugin imports only engine.plugin")
        if path.startswith("plugins/") and top == "plugins":
            found.append(f"{path} imports {module}: the package is engine_plugins")
        if path.startswith("plugins/") and top == "engine_plugins" and module.split(".")[1:2] != path.split("/")[1:2]:
            found.append(f"{path} imports {module}: a plugin imports no other kind of plugin")
        if top == "torch" and not typing and not path.startswith(TORCH_FOLDERS + TORCH_FILES):
            found.append(f"{path} imports torch: only workers, layers, kernels and parallel do")
        if path.startswith(PURE) and top in IMPURE:
            found.append(f"{path} imports {module}: scheduling, cache and the mesh are pure")
    return found


def _is_face(module: str) -> bool:
    """`module` is "package.name": either the package or all of it may be the module meant."""
    return module in PLUGIN_FACE or module.rpartition(".")[0] in PLUGIN_FACE


@pytest.mark.parametrize("path", FILES)
def test_imports_point_one_way(path: str) -> None:
    assert violations(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("engine/runtime/front.py", "import engine_plugins.models.llama"),
        ("engine/runtime/front.py", "def late():\n    from engine_plugins.models import llama"),
        ("engine/runtime/front.py", "from plugins import models"),
        ("engine/runtime/front.py", "import torch"),
        ("engine/runtime/front.py", "def late():\n    import torch.nn"),
        ("engine/runtime/front.py", "if True:\n    from torch import nn"),
        ("engine/plugin/registry.py", "import torch"),
        ("engine/sched/batcher.py", "import anyio"),
        ("engine/cache/pool.py", "from time import monotonic"),
        ("engine/cache/pool.py", "import torch"),
        ("engine/parallel/mesh.py", "import torch"),
        ("plugins/models/llama.py", "from engine.layers import Linear"),
        ("plugins/models/llama.py", "from engine import Engine"),
        ("plugins/models/llama.py", "import engine.worker"),
        ("plugins/models/llama.py", "from engine.plugin.registry import Plugins"),
        (
            "plugins/models/llama.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from engine.sched import X",
        ),
        ("plugins/models/llama.py", "from engine_plugins.attention.torch.mha import TorchAttention"),
        ("plugins/models/llama.py", "from ..attention import torch"),
    ],
)
def test_the_rules_catch(path: str, source: str) -> None:
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("engine/worker/runner.py", "import torch"),
        ("engine/plugin/layers.py", "import torch"),
        ("engine/parallel/groups.py", "def join():\n    import torch.distributed"),
        ("engine/plugin/specs.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("engine/runtime/front.py", "import torchless_thing"),
        (
            "plugins/models/llama.py",
            "import torch\nfrom engine.plugin.layers import Linear\nfrom engine.plugin import hookimpl",
        ),
        ("plugins/models/mistral.py", "from engine_plugins.models.llama import Llama\nfrom .llama import Llama"),
        ("engine/sched/batcher.py", "from engine.cache.radix import Radix\nimport heapq"),
    ],
)
def test_the_rules_allow(path: str, source: str) -> None:
    assert violations(path, source) == []


def circles(sources: dict[str, str]) -> dict[str, set[str]]:
    """The files that import each other in circles, or lie between two circles, each with what it imports of them.
    `sources` are the files' texts by their paths.

    An import that only a type checker sees counts as any other, but for those of engine/__init__.py: it names what it
    fronts, and imports that at first use."""
    names: dict[str, str] = {}
    for path in sources:
        dotted = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        names[re.sub(r"^plugins\b", "engine_plugins", dotted)] = path
    graph: dict[str, set[str]] = {}
    for path, source in sources.items():
        seen = [module for module, typing in imports(path, source) if not (typing and path == "engine/__init__.py")]
        found = {names.get(module) or names.get(module.rpartition(".")[0]) for module in seen}
        graph[path] = {each for each in found if each is not None and each != path}
    left = graph
    while True:  # what imports nothing that is left, or is imported by nothing, is in no circle
        imported = set().union(*left.values()) if left else set()
        kept = {path: targets & left.keys() for path, targets in left.items() if path in imported}
        kept = {path: targets & kept.keys() for path, targets in kept.items() if targets & kept.keys()}
        if kept == left:
            break
        left = kept
    return left


def test_no_two_files_import_each_other_in_a_circle() -> None:
    assert circles({path: (ROOT / path).read_text() for path in FILES}) == {}


@pytest.mark.parametrize(
    "sources",
    [
        {"engine/a.py": "import engine.b", "engine/b.py": "from engine import a"},
        {"engine/a.py": "from engine.b.c import X", "engine/b/c.py": "def late():\n    from engine.a import Y"},
        {"engine/a.py": "import engine.b", "engine/b.py": "import engine.c", "engine/c.py": "import engine.a"},
        {"engine/a.py": "if TYPE_CHECKING:\n    from engine.b import X", "engine/b.py": "import engine.a"},
        {"plugins/a/x.py": "from engine_plugins.a.y import X", "plugins/a/y.py": "from .x import Y"},
    ],
)
def test_circles_are_found(sources: dict[str, str]) -> None:
    assert circles(sources | {"engine/z.py": "import engine.a", "engine/y.py": ""})


def test_one_place_asks_whether_triton_is_installed() -> None:
    asking = [path for path in FILES if 'find_spec("triton")' in (ROOT / path).read_text()]
    assert asking == ["engine/kernels/__init__.py"]


MANIFESTS = sorted(f"engine_plugins.{path.parent.name}" for path in (ROOT / "plugins").glob("*/__init__.py"))


@pytest.mark.parametrize(
    "module",
    [
        "engine",
        "engine.cli",
        "engine.http.app",
        "engine.router.serve",
        "engine.runtime.launch",
        "engine.parallel.mesh",
        *MANIFESTS,
    ],
)
def test_importing_leaves_torch_out(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr or f"importing {module} imports torch"


@pytest.mark.parametrize("module", ["engine.runtime.front_process", "engine.runtime.offline", "engine.router.serve"])
def test_what_starts_with_a_front_leaves_numpy_out(module: str) -> None:
    """Nothing there computes with it, and each front would import it."""
    program = f"import sys, {module}; sys.exit('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr or f"importing {module} imports numpy"
