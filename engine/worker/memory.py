"""How many KV pages the device's memory holds, and the tensors that pages and states live in.

One tensor a KV group, [pages, layers, *page shape]: a page is one piece of memory over all layers, so that it moves in
one copy. Which page holds what is the scheduler's business. States of recurrent layers have a line for each slot; their
memory is taken before pages are counted. A copy of a slot's states, for a cached prefix, is bytes in as many pages.
Left out: tiers below the device's memory.
"""

from collections.abc import Mapping
from math import prod

import numpy as np
import torch
from torch import Tensor

from engine.config import CacheOptions
from engine.errors import ConfigError, counted
from engine.layers.batch import upload
from engine.messages.step import StepPlan
from engine.options.sizes import show_size
from engine.plugin.specs import KVGroup, KVSpec, StateGroup
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
    slots: int = 0,
) -> int:
    """Pages to allocate, once the weights are in place; none for a model that keeps nothing.

    `most_tokens` is what running requests can use at most; on a CPU no more is taken unasked. `activation_bytes` are
    left for the largest step, and room for the states of `slots` requests. A CPU's memory is that of all `ranks`, each
    of which has its part. Raises ConfigError where states or one page do not fit, or `kv_tokens` asks for more than
    there is.
    """
    if not (spec.groups or spec.states):
        return 0
    free = max(available_memory(device) - activation_bytes, 0)
    if device.type == "cpu":
        free //= ranks
    states = state_bytes(spec, slots)
    if options.kv_tokens is not None:
        check_states(spec, slots, free, f"{device} has")
        return _pages_for(options.kv_tokens, spec, free - states, device)
    if device.type == "cuda":
        fraction = options.memory_fraction or GPU_FRACTION
        total = torch.cuda.get_device_properties(device).total_memory
        budget = int(total * fraction) - (total - free)
    else:
        fraction = options.memory_fraction or CPU_FRACTION
        total = free + weight_bytes
        budget = int(total * fraction) - weight_bytes
    check_states(spec, slots, budget, f"--memory-fraction {fraction} of {show_size(total)} on {device} leaves")
    budget -= states
    most_pages = -(-most_tokens // spec.page_size)
    if not spec.groups:
        return most_pages  # they are numbers alone
    if device.type == "cpu" and options.memory_fraction is None:
        budget = min(budget, CPU_CEILING, most_pages * spec.page_bytes)
    if budget < spec.page_bytes:
        beside = f"{show_size(weight_bytes)} of weights" + (f" and {show_size(states)} of states" if states else "")
        raise ConfigError(
            f"no memory for the KV cache: --memory-fraction {fraction} of {show_size(total)} on {device} leaves "
            f"{show_size(max(budget, 0))} beside {beside}, and one page of {counted(spec.page_size, 'token')} "
            f"takes {show_size(spec.page_bytes)}; raise --memory-fraction, or say --kv-tokens"
        )
    return budget // spec.page_bytes


def _pages_for(kv_tokens: int, spec: KVSpec, free: int, device: torch.device) -> int:
    """Pages of as many tokens as are asked for."""
    pages = kv_tokens // spec.page_size
    if pages == 0:
        raise ConfigError(f"--kv-tokens {kv_tokens} is less than one page of {spec.page_size} tokens; raise it")
    if pages * spec.page_bytes > free:
        raise ConfigError(
            f"--kv-tokens {kv_tokens} needs {show_size(pages * spec.page_bytes)}, and {device} has "
            f"{show_size(free)} free; at most {free // spec.page_bytes * spec.page_size} fit"
        )
    return pages


def state_bytes(spec: KVSpec, slots: int) -> int:
    """Bytes of the states of `slots` requests, and of the scratch slot's."""
    return (slots + 1) * spec.slot_bytes


def check_states(spec: KVSpec, slots: int, room: int, who: str) -> None:
    """Raises ConfigError where the states of `slots` requests take more than the `room` bytes that `who` has."""
    room = max(room, 0)
    if (needed := state_bytes(spec, slots)) > room:
        fit = room // spec.slot_bytes - 1
        remedy = f"say --max-running {fit} or less" if fit > 0 else "take a device with more memory"
        raise ConfigError(
            f"the states of {slots} requests take {show_size(needed)}, and {who} {show_size(room)} for them; {remedy}"
        )


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
    return tuple(_allocate(pages, group, device).unbind(1) for group in spec.groups)


class States:
    """The states of recurrent layers, a line for each slot: `layers` has them by the group's name, per layer
    [slots + 1, *shape]. The last line is the scratch slot's, for the padding of CUDA graphs. Copies of a slot's states
    lie in pages of `caches`, of all KV groups of a page in turn."""

    def __init__(self, spec: KVSpec, slots: int, device: torch.device, caches: Caches = ()) -> None:
        """Raises ConfigError where `device` has too little memory for them."""
        if spec.states:
            check_states(spec, slots, available_memory(device), f"{device} has")
        whole = {group.name: _allocate(slots + 1, group, device) for group in spec.states}
        self.layers: Mapping[str, tuple[Tensor, ...]] = {name: tensor.unbind(1) for name, tensor in whole.items()}
        # A slot is one piece of memory over all layers of a group. Floats of one byte can be filled as integers alone.
        self._lines = [each.view(torch.uint8) if each.itemsize == 1 else each for each in whole.values()]
        self._each = spec.state_pages
        lines = [bytes_of(each) for each in whole.values()]  # of each group: [slots + 1, bytes]
        pages = [bytes_of(layers[0]) for layers in caches] if lines else []
        unused = self._each * spec.page_bytes - spec.slot_bytes if pages else 0
        rest = torch.zeros(unused, dtype=torch.uint8, device=device)  # what fills the last page
        # Eight bytes at a time: one by one, a copy takes six times as long on a CPU.
        word = torch.uint8 if any(each.shape[-1] % 8 for each in (*lines, *pages, rest)) else torch.int64
        self._words, self._pages = [each.view(word) for each in lines], [each.view(word) for each in pages]
        self._rest = rest.view(word)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._lines)

    def keep(self, slot: int, pages: np.ndarray) -> None:
        """Copies the states of `slot` to as many of `pages` as they need. Does not wait for the device."""
        if not self:  # another stage of a pipeline has them
            return
        places = upload(pages[: self._each].astype(np.int64), self._rest.device)
        whole = torch.cat([*(lines[slot] for lines in self._words), self._rest]).view(len(places), -1)
        for page, part in zip(self._pages, whole.split([page.shape[1] for page in self._pages], 1), strict=True):
            page[places] = part

    def restore(self, slot: int, pages: np.ndarray) -> None:
        """Copies back what `keep` has copied to `pages`. Does not wait for the device."""
        if not self:
            return
        places = upload(pages[: self._each].astype(np.int64), self._rest.device)
        whole = torch.cat([page[places] for page in self._pages], 1).flatten()
        parts = whole.split([*(lines.shape[1] for lines in self._words), len(self._rest)])
        for lines, part in zip(self._words, parts, strict=False):
            lines[slot] = part

    def apply(self, plan: StepPlan, admitted: Tensor | None) -> None:
        """Before the step of `plan`: what it keeps, and where the requests begin that it has `admitted` to slots, int64
        on the device. Does not wait for the device."""
        for kept in plan.keeps:
            self.keep(kept.slot, np.frombuffer(kept.pages, "<i4"))
        if admitted is not None:
            self.clear(admitted)
        for admit in plan.admits:
            if admit.state:
                self.restore(admit.slot, np.frombuffer(admit.state, "<i4"))

    def clear(self, slots: Tensor) -> None:
        """Makes the states of `slots`, int64 on the device, zeros. Does not wait for the device."""
        for lines in self._lines:
            lines.index_fill_(0, slots, 0)


def bytes_of(first: Tensor) -> Tensor:
    """The memory that `first` is the beginning of, a cache's first layer or all states of a group, as bytes [pages or
    slots, bytes of each in all layers]."""
    assert first.storage_offset() == 0, "that is not the first layer"
    stride = first.stride(0) * first.element_size()
    flat = torch.empty(0, dtype=torch.uint8, device=first.device)
    return flat.set_(first.untyped_storage(), 0, (len(first), stride), (stride, 1))


def _allocate(count: int, group: KVGroup | StateGroup, device: torch.device) -> Tensor:
    """Zeros [count, layers, *shape]: a page, or a slot, is one piece of memory over all layers."""
    shape = (count, group.layers, *group.shape)
    dtype = getattr(torch, group.dtype)
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros come from calloc: memory that the system commits when it is first written.
    return torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return free_memory()
