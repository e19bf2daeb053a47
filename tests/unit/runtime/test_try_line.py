"""What a server says once it is ready: a command that its model can answer."""

import json
import shlex
from types import SimpleNamespace
from typing import Any

import pytest

from engine.config import Config
from engine.messages.control import WorkerReady
from engine.runtime.serve import Service

READY = WorkerReady(64, 16, 8, 64, 1024, 257, 4, "none", "none", {})


@pytest.mark.parametrize(
    ("template", "vector", "path", "field"),
    [
        (True, 0, "/v1/chat/completions", "messages"),
        (False, 0, "/v1/completions", "prompt"),
        (False, 384, "/v1/embeddings", "input"),
    ],
)
def test_the_line_to_try_asks_what_the_model_can_answer(
    template: bool, vector: int, path: str, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    front: Any = SimpleNamespace(chats=template, model_name="tiny")
    nothing: Any = None
    service = Service(front, Config(), nothing, began=0.0, keyed=True)
    service.started("http://127.0.0.1:8000")
    ready: Any = {name: getattr(READY, name) for name in READY.__struct_fields__} | {"embedding_size": vector}
    service._say_ready(WorkerReady(**ready))
    command = shlex.split(capsys.readouterr().out.split("Try:\n", 1)[1])
    assert command[:3] == ["curl", "-N", f"http://127.0.0.1:8000{path}"]
    assert "Authorization: Bearer YOUR_KEY" in command
    body = json.loads(command[-1])
    assert body["model"] == "tiny" and field in body
