"""Asking an engine whose workers are being started again."""

import anyio

from engine import AsyncEngine, Reply, RequestError, SamplingParams, WorkerError


async def restarted(engine: AsyncEngine, prompt: list[int], params: SamplingParams) -> Reply:
    """The reply to `prompt` once the workers have been started again."""
    while True:
        try:
            return await engine.generate(prompt, params)
        except (WorkerError, RequestError):
            await anyio.sleep(0.05)
