"""The public face: exactly these names, found without importing what they do not need."""

import subprocess
import sys

import pytest

import engine
import engine.lang

PUBLIC = {
    "AsyncEngine",
    "Chunk",
    "Config",
    "ConfigError",
    "Engine",
    "EngineError",
    "PluginError",
    "Reply",
    "RequestError",
    "SamplingParams",
    "WorkerError",
}


def test_the_exported_names_are_exactly_these() -> None:
    assert set(engine.__all__) == PUBLIC
    assert set(dir(engine)) == PUBLIC | {"__version__"}
    for name in PUBLIC:
        assert getattr(engine, name).__name__ == name


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, engine.lang; print({'torch', 'anyio', 'aiohttp', 'msgspec'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_names_of_the_language_are_found() -> None:
    assert dir(engine.lang) == sorted(engine.lang.__all__)
    for name in engine.lang.__all__:
        assert getattr(engine.lang, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'frame'"):
        engine.lang.frame  # noqa: B018


def test_the_version_is_the_distributions() -> None:
    from importlib.metadata import version

    assert engine.__version__ == version("actorserve")
