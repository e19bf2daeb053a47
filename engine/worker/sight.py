"""How much of media a model may see at a time, and the memory that takes: for the plan of a device's memory.

A step encodes before its forward pass. Their peaks are not at one time, but what one left in the allocator's blocks may
not fit the other, so both are taken into the plan.
"""

import logging
from dataclasses import dataclass

import torch

from engine.config import Config
from engine.errors import ConfigError, counted
from engine.layers.model import Model

log = logging.getLogger("engine.worker")

MIB = 1 << 20
GPU_TOKENS, CPU_TOKENS = 16384, 4096
GPU_CACHE, CPU_CACHE = 1024, 256  # MiB


@dataclass(frozen=True, slots=True)
class Sight:
    """Embeddings of media: `step_tokens` are made in a step at most, and `held` at a time, of `token_bytes` each."""

    step_tokens: int = 0
    held: int = 0
    token_bytes: int = 0


def sight_of(model: Model, config: Config, device: torch.device) -> Sight:
    """As options say, or as usual on `device`. Raises ConfigError where a step makes more than are held."""
    if not model.sees:
        return Sight()
    gpu = device.type == "cuda"
    tokens = config.schedule.encoder_tokens or (GPU_TOKENS if gpu else CPU_TOKENS)
    cache = config.cache.encoder_cache or (GPU_CACHE if gpu else CPU_CACHE)
    token_bytes = (1 + model.levels) * model.width * model.dtype.itemsize
    held = cache * MIB // token_bytes
    if held < tokens and config.schedule.encoder_tokens is None:
        tokens = held
    if held < tokens or not tokens:
        raise ConfigError(
            f"--encoder-cache {cache} holds {held} tokens of {token_bytes} bytes, and a step encodes up to {tokens} "
            "(--encoder-tokens); raise the former or lower the latter"
        )
    return Sight(tokens, held, token_bytes)


@torch.inference_mode()
def encoder_bytes(model: Model, sight: Sight) -> int:
    """Bytes that encoding takes on a GPU beside the weights: at the peak of the largest step, which is run here, and
    what is held. 0 on a CPU, where memory is taken when it is written."""
    if not sight.step_tokens or model.device.type != "cuda" or 0 not in model.held:
        return 0
    torch.cuda.synchronize(model.device)
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    model.encode([model.largest_medium(sight.step_tokens)])
    torch.cuda.synchronize(model.device)
    peak = torch.cuda.max_memory_allocated(model.device) - before
    held = sight.held * sight.token_bytes
    made = counted(sight.step_tokens, "token")
    log.info("encoding %s of media takes %d MiB, and what is held %d MiB", made, peak // MIB, held // MIB)
    return peak + held
