"""What pyproject.toml says, held against the tree: packages, dependencies, entry points, version, licence."""

import importlib
import tomllib
from collections import Counter
from importlib.metadata import entry_points
from pathlib import Path

import pytest
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
