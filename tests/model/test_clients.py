"""The programs of bench/clients for the clients that the tests have anyway, against the real model."""

import os
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from engine.config import resolve
from engine.http.app import serve
from engine.launch import open_front

pytestmark = pytest.mark.anyio
PROGRAMS = Path(__file__).parents[2] / "bench/clients"


async def test_the_official_clients() -> None:
    async with open_front(resolve({"model": "smollm2-135m", "max_model_len": 1024})) as front:
        await front.ready()
        url: list[str] = []
        listening = anyio.Event()

        def started(at: str) -> None:
            url.append(at)
            listening.set()

        async def run() -> None:
            await serve(front, front.config.server, started=started)

        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await listening.wait()
            environment: Any = {**os.environ, "ENGINE_URL": url[0], "ENGINE_MODEL": front.model_name}
            for name in ("openai", "anthropic"):
                command = [sys.executable, "-P", str(PROGRAMS / f"{name}.py")]
                done = await anyio.run_process(command, env=environment, check=False, stderr=-2)
                assert done.returncode == 0, f"{name}: {done.stdout.decode()}"
            group.cancel_scope.cancel()
