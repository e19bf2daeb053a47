"""The command line: what it derives, what it refuses, and what it leaves unimported."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

import engine
from engine import cli
from engine.client.options import sampling_options
from engine.config import Config, groups
from engine.options.option import options_of
from engine.params.sampling import SamplingParams


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for struct in groups().values():
        for option in options_of(struct):
            monkeypatch.delenv(option.variable, raising=False)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Configs that `engine serve` would have served."""
    configs: list[Config] = []
    monkeypatch.setattr("engine.runtime.serve.serve", lambda config: configs.append(config) or 0)
    return configs


class FakeEngine:
    """Stands in for engine.runtime.offline.AsyncEngine; answers with what it was asked."""

    asked: list[Any] = []  # noqa: RUF012 - reset by the fixture

    def __init__(self, config: Config) -> None:
        self.asked.append(config)

    async def __aenter__(self) -> "FakeEngine":
        return self

    async def __aexit__(self, *_: object) -> None: ...

    has_chat_template = True

    async def stream(self, prompt: Any, params: SamplingParams) -> AsyncIterator[engine.Chunk]:
        self.asked += [prompt, params]
        yield engine.Chunk("r", "hello ", [1])
        yield engine.Chunk("r", "there", [2], finish="stop")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(FakeEngine, "asked", [])
    monkeypatch.setattr("engine.runtime.offline.AsyncEngine", FakeEngine)
    return FakeEngine.asked


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that this command line is refused with."""
    assert cli.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("engine: error: ")
    assert said.count("\n") == 1
    return said


def test_every_option_is_a_flag_of_serve(served: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LWS_WORKER_INDEX": "1", "LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "10.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    other = {"dtype": "float16", "device": "cpu", "placement": "single", "log_level": "debug", "memory_fraction": "0.5"}
    other |= {"load": "dummy", "kv_dtype": "fp8", "sampling_defaults": "openai", "metrics_aliases": "vllm"}
    other |= {"launcher": "lws", "kv_policy": "write-back", "kv_fetch": "always", "ep_exchange": "gather"}
    other |= {"encoder_cache": "7MiB"}
    for struct in groups().values():
        for option in options_of(struct):
            value = other.get(option.name, "7")
            flags = ["--no-prefix-cache"] if option.kind is bool else [option.flag, value]
            assert cli.main(["serve", *flags]) == 0
            assert served.pop() != Config(), option.flag


def test_the_command_line_overrules_the_environment(served: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_MAX_RUNNING", "3")
    monkeypatch.setenv("ENGINE_PLUGINS", "a,b")
    cli.main(["serve", "--max-running=5"])
    assert served[0].schedule.max_running == 5
    assert served[0].model.plugins == ("a", "b")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("serve --max-runing 3", ["--max-runing", "did you mean '--max-running'"]),
        ("serve --max-run 3", ["--max-run"]),  # no abbreviations: a later option would change their meaning
        ("serve stray", ["stray"]),
        ("serve --page-size 300", ["--page-size", "300", "from 1 to 256"]),
        ("serve --device tpu", ["--device", "'tpu'", "auto, cpu or cuda"]),
        ("serve --port", ["--port", "expected one argument"]),
        ("serv", ["serv", "serve", "generate", "plugins"]),
        ("", ["COMMAND"]),
        ("generate", ["PROMPT"]),
        ("generate hi --port 3", ["--port"]),  # the server's options are the server's
        ("generate hi --temperature -1", ["--temperature", "-1", "from 0 to 2"]),
        ("generate hi --seed x", ["--seed", "'x'", "an integer"]),
        ("generate hi --logit-bias 5", ["--logit-bias", "'5'", "a JSON object"]),
        ("plugins --plugins llamma", ["llamma", "did you mean 'llama'"]),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], line: str, said: list[str]) -> None:
    message = fails(capsys, *line.split())
    for words in said:
        assert words in message


def commands() -> list[str]:
    """Every command, of `bench` too."""
    tops = next(action for action in cli._parser()._actions if hasattr(action, "choices") and action.choices)
    found = []
    for name, parser in dict(tops.choices or {}).items():
        inner = [action for action in parser._actions if isinstance(action.choices, dict)]
        found += [f"{name} {measurement}" for measurement in inner[0].choices] if inner else [name]
    return found


def test_the_hint_of_every_command_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"serve", "bench serve", "bench startup"} <= set(commands())
    for command in [*commands(), "bench", ""]:
        hint = fails(capsys, *command.split(), "--port-of-call", "3").split("`")[1]
        assert hint == " ".join(["engine", *command.split(), "--help"])
        with pytest.raises(SystemExit) as end:
            cli.main(hint.split()[1:])
        assert end.value.code == 0 and f"usage: {hint.removesuffix(' --help')}" in capsys.readouterr().out


def test_a_plugin_that_fails_to_import_shows_its_own_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: Config) -> int:
        from engine.plugin.registry import resolve

        return int(resolve("engine.errors:Missing"))

    monkeypatch.setattr("engine.runtime.serve.serve", broken)
    assert cli.main(["serve"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "AttributeError" in said
    assert said.splitlines()[-1].startswith("engine: error: engine.errors:Missing")


def test_generate_streams_a_chat_reply(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--temperature", "0", "--max-tokens", "5", "--stop", "a,b", "--stop", "c", "--stop-token-ids", "-0"]
    assert cli.main(["generate", "hi", *flags, "--ignore-eos", "--max-running", "2"]) == 0
    config, prompt, params = asked
    assert config.schedule.max_running == 2
    assert prompt == [{"role": "user", "content": "hi"}]
    assert params == SamplingParams(
        temperature=0, max_tokens=5, stop=("a,b", "c"), stop_token_ids=(0,), ignore_eos=True
    )
    assert capsys.readouterr().out == "hello there\n"


def test_generate_raw_sends_the_prompt_as_it_is(asked: list[Any]) -> None:
    assert cli.main(["generate", "--raw", "1, 2, 3,"]) == 0
    assert asked[1:] == ["1, 2, 3,", SamplingParams()]


def test_every_sampling_parameter_is_a_flag(asked: list[Any]) -> None:
    for option in sampling_options():
        objects = {"logit_bias": '{"7": -1}', "json_schema": "{}", "structural_tag": "{}"}
        value = objects.get(option.name, {float: "0.5", bool: None}.get(option.kind, "7"))
        switch = option.flag if option.default is not True else option.flag.replace("--", "--no-")
        flags = [switch] if value is None else [option.flag, value]
        beside = {"json_schema": "{}"} if option.name == "strict_schema" else {}
        assert cli.main(["generate", "--raw", "hi", *flags, *(("--json-schema", "{}") if beside else ())]) == 0
        assert asked[-1] != SamplingParams(**beside), option.flag


def test_plugins_as_json_and_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plugins", "--json", "--plugins", "llama"]) == 0
    rows = {(row["kind"], row["name"]): row for row in json.loads(capsys.readouterr().out)}
    assert rows["models", "llama"]["state"] == "named"
    assert rows["attention", "torch"]["state"] == "loaded"
    assert rows["policies", "fcfs"]["hooks"] == ["register_policies"]
    assert rows["checkpoints", "gguf"]["distribution"] == "actorserve"
    assert cli.main(["plugins"]) == 0
    table = capsys.readouterr().out
    for _, name in rows:
        assert name in table


def imported_by(program: str) -> set[str]:
    """Top-level modules that a fresh interpreter has imported after `program`."""
    program += "\nimport sys; print(' '.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return {name.split(".")[0] for name in done.stderr.split()}


def test_help_imports_next_to_nothing() -> None:
    program = """
from engine.cli import main
for argv in (["--help"], ["serve", "--help"], ["generate", "--help"], ["--version"]):
    try:
        main(argv)
    except SystemExit as end:
        assert end.code == 0
"""
    heavy = {"torch", "aiohttp", "anyio", "rich", "tokenizers", "numpy", "gguf", "huggingface_hub", "transformers"}
    assert not imported_by(program) & heavy


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"engine {engine.__version__}\n"
