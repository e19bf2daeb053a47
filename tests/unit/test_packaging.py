"""What pyproject.toml says, held against the tree and against the wheel that it makes."""

import importlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator
from configparser import RawConfigParser
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement

import engine

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def test_every_package_is_listed() -> None:
    found = set()
    for folder, package in (("engine", "engine"), ("plugins", "engine_plugins")):
        for path in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *path.parent.relative_to(ROOT / folder).parts]))
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(found)


def test_every_folder_of_code_is_a_package() -> None:
    for folder in ("engine", "plugins"):
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_every_test_file_has_a_name_of_its_own() -> None:
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py"))
    assert [name for name, count in names.items() if count > 1] == []  # pytest would collect none of them


def test_the_base_install_is_light() -> None:
    assert len(PROJECT["dependencies"]) < 20
    names = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert not names & {"transformers", "openai", "hypothesis", "triton", "xgrammar", "vllm", "sglang"}
    extras = PROJECT["optional-dependencies"]
    assert not names & {Requirement(line).name for line in extras["otel"]}
    assert set(extras["otel"]) <= set(extras["test"])  # tests run against what users get


def test_constraints_fit_the_dependencies() -> None:
    ranges = {Requirement(line).name: Requirement(line).specifier for line in PROJECT["dependencies"]}
    pinned = {pin.name: str(pin.specifier).removeprefix("==") for pin in CONSTRAINTS}
    assert "torch" in pinned
    for name, version in pinned.items():
        assert name not in ranges or version in ranges[name], f"{name} {version} is outside {ranges[name]}"


def test_the_command_and_the_manifests_import() -> None:
    for target in PROJECT["scripts"].values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
    for module in PROJECT["entry-points"]["engine.plugins"].values():
        importlib.import_module(module)


def test_every_manifest_is_an_entry_point_and_is_installed() -> None:
    manifests = {f"engine_plugins.{path.parent.name}" for path in (ROOT / "plugins").glob("*/__init__.py")}
    assert set(PROJECT["entry-points"]["engine.plugins"].values()) == manifests
    installed = {
        point.value for point in entry_points(group="engine.plugins") if point.dist and point.dist.name == "actorserve"
    }
    assert installed == manifests, "the installed metadata is stale; run `make install`"


def test_one_version() -> None:
    assert PROJECT["version"] == engine.__version__
    assert f"## {engine.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("words", ["Apache License", "Version 2.0, January 2004", "END OF TERMS AND CONDITIONS"])
def test_the_licence_is_whole(words: str) -> None:
    assert words in (ROOT / "LICENSE").read_text()


# ── the wheel and the source distribution ────────────────────────────────────────────────────

INFO = f"actorserve-{PROJECT['version']}.dist-info"


def make(kind: str, folder: Path, out: Path) -> Path:
    """The `wheel` or `sdist` of the tree in `folder`, by the backend of pyproject.toml and without a network."""
    program = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    out.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.iterdir()
    return made


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree without what git ignores, so that nothing of an earlier build is taken for a part of it."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    copy = tmp_path_factory.mktemp("tree") / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", *ignored))
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(make("sdist", tree, folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"actorserve-{PROJECT['version']}"


def code(tree: Path) -> Iterator[tuple[str, bytes]]:
    for folder, package in (("engine", "engine"), ("plugins", "engine_plugins")):
        for path in (tree / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{package}/{path.relative_to(tree / folder)}", path.read_bytes()


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(tree: Path, wheel: Path) -> None:
    assert wheel.name == f"actorserve-{PROJECT['version']}-py3-none-any.whl"
    expected = dict(code(tree))
    assert {Path(name).suffix for name in expected} == {".py", ".c", ".h", ".html", ".typed"}
    found = {name: data for name, data in contents(wheel).items() if not name.startswith(f"{INFO}/")}
    assert found.keys() == expected.keys(), "name files that are not Python in [tool.setuptools.package-data]"
    assert found == expected


def test_the_wheel_says_what_the_project_says(wheel: Path) -> None:
    inside = contents(wheel)
    assert inside[f"{INFO}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    points = RawConfigParser(delimiters="=")
    points.optionxform = str  # type: ignore[assignment, method-assign]
    points.read_string(inside[f"{INFO}/entry_points.txt"].decode())
    groups = {"console_scripts": PROJECT["scripts"]} | PROJECT["entry-points"]
    assert {name: dict(points[name]) for name in points.sections()} == groups
    metadata = Metadata.from_email(inside[f"{INFO}/METADATA"], validate=True)
    assert (metadata.name, str(metadata.version)) == (PROJECT["name"], PROJECT["version"])
    assert (metadata.license_expression, metadata.license_files) == ("Apache-2.0", ["LICENSE"])
    assert metadata.description == (ROOT / "README.md").read_text()
    assert metadata.description_content_type == "text/markdown"


def test_the_source_distribution_makes_the_same_wheel(wheel: Path, unpacked: Path, tmp_path: Path) -> None:
    assert contents(make("wheel", unpacked, tmp_path)) == contents(wheel)


def test_what_the_images_copy_makes_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    copied = [
        {
            source
            for line in re.findall(r"^COPY (?!--)(.+)", path.read_text(), re.MULTILINE)
            for source in line.split()[:-1]
        }
        for path in (ROOT / "examples/deploy").glob("Dockerfile*")
    ]
    assert len(copied) == 2 and copied[0] == copied[1]
    (tmp_path / "src").mkdir()
    for name in copied[0]:
        copy = shutil.copytree if (tree / name).is_dir() else shutil.copy
        copy(tree / name, tmp_path / "src" / name)
    assert contents(make("wheel", tmp_path / "src", tmp_path / "out")) == contents(wheel)


def test_the_source_distribution_holds_what_the_readme_leads_to(unpacked: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text())
    assert len(links) > 20
    for name in [*links, "Makefile", "constraints.txt", "CHANGELOG.md", "tests/unit/test_packaging.py", ".ci/run"]:
        assert (unpacked / name).exists(), f"{name}: name it in MANIFEST.in"


def test_the_wheel_runs_where_there_is_no_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")

    def said(*words: str) -> str:
        program = [sys.executable, *words]
        environment = {"PYTHONPATH": str(tmp_path / "site"), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=True
        ).stdout

    assert said("-c", "import engine; print(engine.__file__)").strip() == str(tmp_path / "site/engine/__init__.py")
    assert said("-m", "engine", "--version").split()[-1] == PROJECT["version"]
    kinds = {row["kind"] for row in json.loads(said("-m", "engine", "plugins", "--json"))}
    assert {
        "models",
        "attention",
        "checkpoints",
        "grammars",
        "media",
        "parsers",
        "policies",
        "quantization",
        "routing",
        "tiers",
    } <= kinds
    assert "complete" in said("-m", "engine", "completion", "bash")
