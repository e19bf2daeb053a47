"""How much of media a model may see at a time, and the memory that takes: for the plan of a device's memory.

A step encodes before its forward pass. Their peaks are not at one time, but what one left in the allocator's blocks may
not fit the other, so both are taken into the plan. The embeddings that a step's rows show are gathered for its forward
pass, and are there beside the peak of that. Captured steps have lines of their own for them, which stay. Left out: what
CUDA graphs take besides, which is measured once they are captured (start.py).
"""

import logging
from dataclasses import dataclass

import torch

from engine.config import Config
from engine.errors import ConfigError, counted
from engine.layers.model import Model
from engine.options.sizes import spell_size

log = logging.getLogger("engine.worker")

MIB = 1 << 20
GPU_TOKENS, CPU_TOKENS = 16384, 4096
GPU_CACHE, CPU_CACHE = 1 << 30, 256 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Sight:
    """Embeddings of media: `step_tokens` are made in a step at most, and `held` at a time, of `token_bytes` each.
    Captured steps have `lines` for those that they show."""

    step_tokens: int = 0
    held: int = 0
    token_bytes: int = 0
    lines: int = 0


def sight_of(model: Model, config: Config, device: torch.device, lines: int = 0) -> Sight:
    """As options say, or as usual on `device`; captured steps have `lines`. Raises ConfigError where a step makes more
    than are held."""
    if not model.sees:
        return Sight()
    gpu = device.type == "cuda"
    tokens = config.schedule.encoder_tokens or (GPU_TOKENS if gpu else CPU_TOKENS)
    cache = config.cache.encoder_cache or (GPU_CACHE if gpu else CPU_CACHE)
    token_bytes = (1 + model.levels) * model.width * model.dtype.itemsize
    held = cache // token_bytes
    if held < tokens and config.schedule.encoder_tokens is None:
        tokens = held
    if held < tokens or not tokens:
        raise ConfigError(
            f"--encoder-cache {spell_size(cache)} holds {held} tokens of {token_bytes} bytes, and a step encodes "
            f"up to {tokens} (--encoder-tokens); raise the former or lower the latter"
        )
    return Sight(tokens, held, token_bytes, lines)


@torch.inference_mode()
def encoder_bytes(model: Model, device: torch.device, sight: Sight, step_tokens: int) -> int:
    """Bytes that media take on a GPU beside the weights and the largest step of `step_tokens`: the peak of the largest
    encoding, which is run here, what one step shows, the lines of captured steps, and what is held."""
    if not sight.step_tokens or 0 not in model.held:
        return 0
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    model.encode([model.largest_medium(sight.step_tokens)])
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    shown, lines, held = (count * sight.token_bytes for count in (step_tokens, sight.lines, sight.held))
    log.info(
        "encoding %s of media takes %d MiB, a step that shows them %d MiB, its graphs %d MiB, and what is held %d MiB",
        counted(sight.step_tokens, "token"),
        peak // MIB,
        shown // MIB,
        lines // MIB,
        held // MIB,
    )
    return peak + shown + lines + held
