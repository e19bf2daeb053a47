"""How many KV pages the device's memory holds, and the tensors they live in.

One tensor a KV group, [pages, layers, *page shape]: a page is one piece of memory over all layers, so that it moves in
one copy. Which page holds what is the scheduler's business.
Left out: tiers below the device's memory.
"""

import numpy as np
import torch
from torch import Tensor

from engine.config import CacheOptions
from engine.errors import ConfigError, counted
from engine.plugin.specs import KVGroup, KVSpec
from engine.runtime.memory import free_memory

GPU_FRACTION = 0.9
CPU_FRACTION = 0.3
CPU_CEILING = 4 << 30  # bytes that a CPU's cache takes unasked: the machine is not ours alone

Caches = tuple[tuple[Tensor, ...], ...]  # per KV group, per layer: [pages, *page shape], pages a stride apart


def count_pages(
    spec: KVSpec,
    options: CacheOptions,
    device: torch.device,
    weight_bytes: int,
    most_tokens: int,
    activation_bytes: int = 0,
    *,
    ranks: int = 1,
) -> int:
    """Pages to allocate, once the weights are in place; none for a model that keeps nothing.

    `most_tokens` is what running requests can use at most; on a CPU no more is taken unasked. `activation_bytes` are
    left for the largest step. A CPU's memory is that of all `ranks`, each of which has its part. Raises ConfigError
    where not one page fits, or `kv_tokens` asks for more than there is.
    """
    if not spec.groups:
        return 0
    free = max(available_memory(device) - activation_bytes, 0)
    if device.type == "cpu":
        free //= ranks
    if options.kv_tokens is not None:
        pages = options.kv_tokens // spec.page_size
        if pages == 0:
            raise ConfigError(
                f"--kv-tokens {options.kv_tokens} is less than one page of {counted(spec.page_size, 'token')}; raise it"
            )
        if pages * spec.page_bytes > free:
            raise ConfigError(
                f"--kv-tokens {options.kv_tokens} needs {_size(pages * spec.page_bytes)}, and {device} has "
                f"{_size(free)} free; at most {free // spec.page_bytes * spec.page_size} fit"
            )
        return pages
    if device.type == "cuda":
        fraction = options.memory_fraction or GPU_FRACTION
        total = torch.cuda.get_device_properties(device).total_memory
        budget = int(total * fraction) - (total - free)
    else:
        fraction = options.memory_fraction or CPU_FRACTION
        total = free + weight_bytes
        budget = int(total * fraction) - weight_bytes
        if options.memory_fraction is None:
            most_pages = -(-most_tokens // spec.page_size)
            budget = min(budget, CPU_CEILING, most_pages * spec.page_bytes)
    if budget < spec.page_bytes:
        raise ConfigError(
            f"no memory for the KV cache: --memory-fraction {fraction} of {_size(total)} on {device} leaves "
            f"{_size(max(budget, 0))} beside {_size(weight_bytes)} of weights, and one page of "
            f"{counted(spec.page_size, 'token')} takes {_size(spec.page_bytes)}; raise --memory-fraction, or say "
            "--kv-tokens"
        )
    return budget // spec.page_bytes


def choose_max_model_len(option: int | None, model_limit: int, cache_tokens: int | None) -> int:
    """The longest sequence: `option`, else what model and cache allow; None is a model that needs no cache.

    Raises ConfigError when `option` is over either."""
    if option is not None and option > model_limit:
        raise ConfigError(f"--max-model-len {option} is over the model's own limit of {counted(model_limit, 'token')}")
    if cache_tokens is None:
        return option or model_limit
    if option is not None and option > cache_tokens:
        raise ConfigError(
            f"--max-model-len {option} is over the {counted(cache_tokens, 'token')} that the KV cache holds; "
            "lower it, or raise --memory-fraction or --kv-tokens"
        )
    return min(option or model_limit, cache_tokens)


def allocate(spec: KVSpec, pages: int, device: torch.device) -> Caches:
    """Zeroed caches. Never read before written by a correct backend, but a masked-out NaN is still a NaN."""
    return tuple(_allocate_group(group, pages, device).unbind(1) for group in spec.groups)


def _allocate_group(group: KVGroup, pages: int, device: torch.device) -> Tensor:
    shape = (pages, group.layers, *group.shape)
    dtype = getattr(torch, group.dtype)
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros come from calloc: memory that the system commits when a page is first written.
    return torch.from_numpy(np.zeros(pages * group.page_bytes, np.uint8)).view(dtype).view(shape)


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return free_memory()


def _size(count: int) -> str:
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 28 else f"{count / (1 << 20):.2f} MiB"
