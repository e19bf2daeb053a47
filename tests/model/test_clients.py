"""The programs of bench/clients for the clients that the tests have anyway, against the real model."""

import os
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from real_server import MODEL, real_server

pytestmark = pytest.mark.anyio
PROGRAMS = Path(__file__).parents[2] / "bench/clients"


async def test_the_official_clients() -> None:
    async with real_server() as url:
        environment: Any = {**os.environ, "ENGINE_URL": url, "ENGINE_MODEL": MODEL}
        for name in ("openai", "anthropic"):
            command = [sys.executable, "-P", str(PROGRAMS / f"{name}.py")]
            done = await anyio.run_process(command, env=environment, check=False, stderr=-2)
            assert done.returncode == 0, f"{name}: {done.stdout.decode()}"
