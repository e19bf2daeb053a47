"""What a start imports, and in which order: the device process first, and in each process only what it needs."""

import json
import subprocess
import sys
from typing import Any

import pytest

from engine.config import Config, resolve
from engine.plugin.registry import Plugins
from engine.runtime import launch
from engine.runtime.core import core_actors

# Packages that the front needs and starting the device process does not.
LATER = (
    "aiohttp",
    "engine.runtime.front",
    "engine.http.app",
    "engine.runtime.launch",
    "jinja2",
    "numpy",
    "regex",
    "tokenizers",
    "torch",
)
# What only the front is for.
NOT_OF_THE_WORKER = (
    "aiohttp",
    "engine.runtime.front",
    "engine.conversation.template",
    "engine.text.tokenizer",
    "jinja2",
    "prometheus_client",
    "rich",
)

BEFORE_THE_WORKER = f"""
import json, sys
import engine.cli, engine.runtime.serve

def spawn(module):
    print(json.dumps([module, [name for name in {LATER} if name in sys.modules]]))
    raise KeyboardInterrupt

engine.runtime.serve.spawn = spawn
sys.exit(engine.cli.main(["serve", "--model", "echo", "--placement", "single"]))
"""

A_WORKER = f"""
import json, sys
from engine.config import resolve
from engine.messages import Boot
from engine.worker.spare import import_worker

import_worker()
from engine.worker.start import start

runner, ready = start(Boot(resolve({{"model": sys.argv[1], "kv_tokens": 512, "device": "cpu"}})), 0.0)
print(json.dumps([runner.grammars is not None, [name for name in {NOT_OF_THE_WORKER} if name in sys.modules]]))
"""


def output(program: str, *arguments: str, code: int = 0) -> Any:
    """What `program` prints last, in a process of its own."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_worker_is_started_before_the_front_is_imported() -> None:
    assert output(BEFORE_THE_WORKER, code=130) == ["engine.worker", []]


def test_a_worker_imports_nothing_that_only_the_front_needs() -> None:
    assert output(A_WORKER, "echo") == [True, []]


@pytest.mark.anyio
async def test_plugins_are_loaded_once_where_front_and_core_share_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    class Made(Exception):
        """The actors of the core are made; nothing is started."""

    loaded: list[Any] = []
    load = Plugins.load

    def counting(named: Any = ()) -> Plugins:
        loaded.append(named)
        return load(named)

    def core(config: Config, front: Any, **others: Any) -> Any:
        actors, _ = core_actors(config, front, **others)
        raise Made([actor.name for actor in actors])

    monkeypatch.setattr(Plugins, "load", counting)
    monkeypatch.setattr(launch, "core_actors", core)
    with pytest.raises(Made, match="scheduler"):
        async with launch.open_front(resolve({"model": "echo", "placement": "single", "plugins": ("lpm",)})):
            pass
    assert loaded == [("lpm",)]
