"""FP8: matrices in E4M3 with float32 scales of blocks of 128 x 128, of rows or of whole tensors.

It reads what DeepSeek, Qwen and others publish (`weight_scale_inv` of blocks) and what llm-compressor and vLLM write
(`weight_scale` of rows or tensors); on a checkpoint that is not quantized, it makes blocks of every matrix as it is
loaded, but for those of towers that encode media. Embeddings, the head, routers and norms stay as they are.
Activations become FP8 on the way, where a step has many tokens, each by its own largest; scales for them in a
checkpoint are passed over.

A device without FP8 products gets the weights that these stand for, in the type of activations. A cut between ranks may
fall within a checkpoint's block only if a rank's part lies in that one block: it then has the block's scale. Others are
refused, as the scales of a part begin where it does. Left out: blocks of other sizes, E5M2, scales of the KV cache.
"""

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from engine.plugin import ConfigError, LazyTensor, Terms
from engine.plugin.kernels import (
    BLOCK,
    E4M3,
    Fp8Weight,
    dequantize,
    quantize_blocks,
    quantize_rows,
)
from engine.plugin.layers import (
    Build,
    ExpertWeights,
    QuantizedExperts,
    QuantizedLinear,
    Ranges,
    Rows,
    Scheme,
    Shard,
    beside,
    check_shape,
    divided,
    empty_weight,
    put,
    rows_of,
)

log = logging.getLogger("engine.quantization")

SCALES = ("weight_scale_inv", "weight_scale")  # both multiply
ACTIVATION_SCALES = ("input_scale", "activation_scale")
ALL = re.compile("")
CLASSES = ("Linear",)
LEFT = r"(?:{0})(?:(?<=\.)|(?=\.|\Z))|.*{1}\Z"  # as transformers has it: up to a dot, or the end of a name
EXPERT = re.compile(r"\.experts\.\d+\..*\Z")
# Of few rows, and what they gate lives on in a state or weighs all that an expert says: checkpoints leave them as well.
GATES = re.compile(r".*\.(?:in_proj_(?:a|b|ba)|shared_expert_gate)\Z")
# What encodes pictures, and what brings that to the decoder's width: a small part of the weights and of the work, and
# all that the decoder knows of a picture. Published checkpoints leave them, too.
TOWERS = re.compile(r"(?:model\.)?(?:visual|vision_\w+|multi_modal_\w+)\.")
SPREAD = 64.0  # of the numbers of dummy weights, which end at 448

Granularity = Literal["blocks", "rows"]  # a tensor's one scale is kept as that of each row


@dataclass(frozen=True)
class Stored:
    """How matrices are stored, and what begins the names of modules that are, but for those that are `left`."""

    granularity: Granularity
    taken: tuple[re.Pattern[str], ...] = (ALL,)
    left: tuple[re.Pattern[str], ...] = ()
    made: bool = False  # as the checkpoint is loaded, which is not quantized

    @classmethod
    def read(cls, config: Terms) -> "Stored":
        """What a quantization_config says. Raises ConfigError for what is not FP8 as above."""
        if config.get("quant_method") == "compressed-tensors":
            return cls._of_groups(config)
        if (kind := config.word("fmt", "e4m3")) != "e4m3":
            raise ConfigError(f"the checkpoint's FP8 numbers are {kind!r}; the fp8 quantization knows e4m3")
        ignored = (*config.words("modules_to_not_convert"), *config.words("ignored_layers"))
        left = tuple(_pattern(config, name, LEFT if name[:3] != "re:" else "{}") for name in ignored)
        return cls(_granularity(config.integers("weight_block_size")), left=left)

    @classmethod
    def _of_groups(cls, config: Terms) -> "Stored":
        """compressed-tensors': groups of modules, each with its targets and its kind of weights."""
        found: set[Granularity] = set()
        taken: list[str] = []
        groups = config.section("config_groups")
        for name in groups:
            group = groups.section(name)
            weights = group.section("weights")
            taken += group.words("targets")
            said = (weights.get("num_bits"), weights.get("type"))
            if said != (8, "float") or weights.get("strategy") not in ("tensor", "channel", "block"):
                raise ConfigError(
                    f"{name} of the checkpoint's quantization_config has weights of {said[0]} bits, type {said[1]!r}, "
                    f"strategy {weights.get('strategy')!r}; the fp8 quantization knows 8 bits, type 'float', strategy "
                    "'tensor', 'channel' or 'block'"
                )
            found.add(_granularity(weights.integers("block_structure")) if weights["strategy"] == "block" else "rows")
        if len(found) != 1:
            raise ConfigError(
                f"the checkpoint's quantization_config has groups of {' and '.join(sorted(found)) or 'nothing'}; the "
                "fp8 quantization takes one kind of scales for the whole model"
            )
        named = [tuple(_target(config, name) for name in names) for names in (taken, config.words("ignore"))]
        return cls(found.pop(), named[0] or (ALL,), named[1])


def _target(config: Terms, name: str) -> re.Pattern[str]:
    """What compressed-tensors names: a class of layers, a module, or after "re:" a regular expression."""
    if name in CLASSES:
        return ALL
    return _pattern(config, name, "{}") if name.startswith("re:") else re.compile(rf"{re.escape(name)}\Z")


def _pattern(config: Terms, name: str, form: str) -> re.Pattern[str]:
    """`name`, a regular expression, in `form`. Raises ConfigError when it is none."""
    said = name.removeprefix("re:")
    try:
        return re.compile(form.format(said, re.escape(said)))
    except re.error as error:
        raise ConfigError(
            f"{name!r}, which names modules in {config.within.rstrip('.')} of {config.source}, is no regular "
            f"expression: {error}"
        ) from error


def _granularity(block: tuple[int, ...]) -> Granularity:
    """Of blocks of that size, or of rows where there are none."""
    if block not in ((), (BLOCK, BLOCK)):
        raise ConfigError(
            f"the checkpoint's FP8 blocks are {list(block)}; the fp8 quantization knows [{BLOCK}, {BLOCK}]"
        )
    return "blocks" if block else "rows"


class Fp8(Scheme):
    def __init__(self, terms: Mapping[str, Any] | None) -> None:
        self.stored = (
            Stored("blocks", left=(GATES, TOWERS), made=True) if terms is None else Stored.read(Terms.of(terms))
        )

    def takes(self, path: str) -> bool:
        stored = self.stored
        names = (path, EXPERT.sub(".experts", path))  # experts are one module in transformers
        if any(pattern.match(name) for pattern in stored.left for name in names):
            return False
        return any(pattern.match(name) for pattern in stored.taken for name in names)

    def linear(self, build: Build, parts: Mapping[str, int], inputs: int, shard: Shard) -> QuantizedLinear:
        for part, rows in parts.items():
            self._check_cut(rows, shard.rows[part])
        self._check_cut(inputs, shard.columns)
        return Fp8Linear(build, parts, inputs, shard, self.stored.granularity)

    def experts(self, build: Build, count: int, size: int, inner: int, share: slice) -> QuantizedExperts:
        self._check_cut(inner, share)
        return Fp8Experts(build, count, size, inner, share, self.stored.granularity)

    def divided(self, name: str, tensor: LazyTensor, parts: Mapping[str, Ranges]) -> Iterator[tuple[str, LazyTensor]]:
        if math.prod(tensor.shape) == 1:  # the scale of the whole, or of its only block
            yield from ((beside(name, part), tensor) for part in parts)
        elif self.stored.granularity == "rows":
            yield from divided(name, tensor, parts)
        else:
            check_shape(name, tensor, (blocks(rows_of(parts)), *tensor.shape[1:]))
            for part, ranges in parts.items():
                yield beside(name, part), Rows(tensor, _blocks_within(name, part, ranges))

    def _check_cut(self, size: int, share: slice) -> None:
        """Raises ConfigError where a rank's part of `size` numbers would share a block's scale in more than one block
        of its own. All ranks find the same."""
        width = share.stop - share.start
        divided = width < size and self.stored.granularity == "blocks" and not self.stored.made
        if divided and size > BLOCK and width % BLOCK and BLOCK % width:
            raise ConfigError(
                f"an FP8 matrix of {size} rows or columns divides into parts of {width}, which cut blocks of {BLOCK} "
                f"numbers with one scale each; choose a tp for which parts are multiples of {BLOCK}"
            )


def _blocks_within(name: str, part: str, ranges: Ranges) -> Ranges:
    """Where the scales `name` of a checkpoint's matrix have those of each block of the rows `ranges`, end to end.

    Raises ConfigError where a block of these takes rows of several of the matrix, which have a scale each."""
    lie_in = [row // BLOCK for first, count in ranges for row in range(first, first + count)]
    found = []
    for begin in range(0, len(lie_in), BLOCK):
        block = lie_in[begin : begin + BLOCK]
        if min(block) != max(block):
            raise ConfigError(
                f"{name} has one scale for each {BLOCK} rows, and rows {begin} to {begin + len(block) - 1} of {part}, "
                f"which are stacked there with others, lie in the blocks {min(block)} to {max(block)}; take a "
                "checkpoint with scales of rows, or one that leaves this module as it is"
            )
        found.append((block[0], 1))
    return found


# ── what both kinds of layers do ─────────────────────────────────────────────────────────────


def blocks(size: int) -> int:
    return -(-size // BLOCK)


def read(tensor: LazyTensor) -> Tensor:
    return tensor[tuple(slice(None) for _ in tensor.shape)]


@dataclass(frozen=True, slots=True)
class Part:
    """The part [rows, columns] of a checkpoint's matrix `whole` that a rank stores."""

    whole: tuple[int, int]
    rows: slice
    columns: slice

    def numbers(self, name: str, tensor: LazyTensor) -> Tensor:
        check_shape(name, tensor, self.whole)
        return tensor[self.rows, self.columns]

    def block_scales(self, name: str, tensor: LazyTensor) -> Tensor:
        check_shape(name, tensor, (blocks(self.whole[0]), blocks(self.whole[1])))
        rows, columns = (slice(part.start // BLOCK, blocks(part.stop)) for part in (self.rows, self.columns))
        return tensor[rows, columns]

    def row_scales(self, name: str, tensor: LazyTensor) -> Tensor:
        """[rows], or one number for all."""
        if tuple(tensor.shape) in ((), (1,), (1, 1)):
            return read(tensor).view(1)
        if len(tensor.shape) == 1:
            check_shape(name, tensor, (self.whole[0],))
            return tensor[self.rows]
        check_shape(name, tensor, (self.whole[0], 1))
        return tensor[self.rows, 0:1][:, 0]


class Loaded:
    """Which matrices have come as FP8 numbers, and which have a scale."""

    def __init__(self, granularity: Granularity) -> None:
        self.granularity = granularity
        self._numbers: dict[Any, str] = {}
        self._scaled: set[Any] = set()

    def weight(self, key: Any, name: str, tensor: LazyTensor, part: Part, numbers: Tensor, scale: Tensor) -> None:
        """Fills `numbers` [rows, columns] with that part and, if the tensor is not quantized, `scale`."""
        weight = part.numbers(name, tensor)
        if weight.dtype == E4M3:
            put(weight, numbers)
            self._numbers[key] = name
            return
        if not weight.is_floating_point() or weight.itemsize == 1:
            raise ConfigError(
                f"weight {name} is {weight.dtype}; the fp8 quantization takes float8_e4m3fn, or 16 bits up"
            )
        made: Callable[[Tensor], tuple[Tensor, Tensor]]
        made = quantize_blocks if self.granularity == "blocks" else quantize_rows
        there = torch.empty(weight.shape, dtype=weight.dtype, device=numbers.device)
        put(weight, there)
        quantized, its_scale = made(there)
        numbers.copy_(quantized)
        scale.copy_(its_scale)
        self._scaled.add(key)

    def scale(self, key: Any, name: str, tensor: LazyTensor, part: Part, scale: Tensor) -> None:
        """Fills `scale`, of blocks or of rows; the one of a whole tensor goes to all rows."""
        if self.granularity == "rows":
            scale.copy_(part.row_scales(name, tensor))
        else:
            scale.copy_(part.block_scales(name, tensor))
        self._scaled.add(key)

    def check(self) -> None:
        """Raises ConfigError for numbers that have no scale."""
        for key, name in self._numbers.items():
            if key not in self._scaled:
                ends = " or ".join(SCALES)
                raise ConfigError(f"weight {name} is FP8, but the checkpoint has no {ends} beside it")


def dense_instead(build: Build) -> bool:
    """Whether the build's kernels are no faster by FP8 weights."""
    if build.kernels.fp8.pays:
        return False
    log.debug("no FP8 products on %s: the weights are kept as what they stand for", build.device)
    return True


def fill(numbers: Tensor, scale: Tensor, generator: torch.Generator) -> None:
    for one in numbers if numbers.dim() == 3 else (numbers,):
        values = torch.empty(one.shape, dtype=torch.float32, device=one.device)
        one.copy_(values.normal_(0.0, SPREAD, generator=generator).clamp_(-448, 448))
    scale.fill_(0.02 / SPREAD)


# ── layers ───────────────────────────────────────────────────────────────────────────────────


class Fp8Linear(QuantizedLinear):
    """The matrices of a layer, and how they divide into `spans`, in each of which blocks begin where parts do.

    Where a part ends within a block and another follows, that one begins a span of its own: a block has one scale.
    """

    suffixes = {"weight_scale": SCALES}  # noqa: RUF012
    optional = frozenset({"weight_scale"})
    ignored = ACTIVATION_SCALES

    def __init__(
        self, build: Build, parts: Mapping[str, int], inputs: int, shard: Shard, granularity: Granularity
    ) -> None:
        self._build = build
        self.held = {part: Part((rows, inputs), shard.rows[part], shard.columns) for part, rows in parts.items()}
        self.parts = {part: shard.rows_of(part) for part in parts}
        rows = sum(self.parts.values())
        self.weight = empty_weight(build, rows, shard.inputs, dtype=E4M3)
        shape = (sum(map(blocks, self.parts.values())), blocks(shard.inputs)) if granularity == "blocks" else (rows,)
        self.scale = empty_weight(build, *shape, dtype=torch.float32)
        self.tensors = {"weight": self.weight, "weight_scale": self.scale}
        self._loaded = Loaded(granularity)
        self._spans: list[Fp8Weight] = []

    def _part(self, part: str) -> tuple[Tensor, Tensor]:
        """Its numbers and scales."""
        row, block = 0, 0
        for name, rows in self.parts.items():
            if name == part:
                break
            row, block = row + rows, block + blocks(rows)
        rows = self.parts[part]
        first, count = (row, rows) if self.scale.dim() == 1 else (block, blocks(rows))
        return self.weight[row : row + rows], self.scale[first : first + count]

    def load(self, name: str, parameter: str, part: str, tensor: LazyTensor) -> None:
        numbers, scale = self._part(part)
        if parameter == "weight":
            self._loaded.weight(part, name, tensor, self.held[part], numbers, scale)
        else:
            self._loaded.scale(part, name, tensor, self.held[part], scale)

    def loaded(self, path: str) -> bool:
        self._loaded.check()
        self._divide()
        return dense_instead(self._build)

    def _divide(self) -> None:
        ops = self._build.kernels.fp8
        if self.scale.dim() == 1:
            self._spans = [ops.weight(self.weight, self.scale)]
            return
        self._spans, row, block = [], 0, 0
        first_row, first_block = 0, 0
        sizes = list(self.parts.values())
        for index, rows in enumerate(sizes):
            row, block = row + rows, block + blocks(rows)
            if rows % BLOCK or index == len(sizes) - 1:
                self._spans.append(ops.weight(self.weight[first_row:row], self.scale[first_block:block]))
                first_row, first_block = row, block

    def linear(self, inputs: Tensor, bias: Tensor | None, gated: bool = False) -> Tensor:
        ops = self._build.kernels.fp8
        if len(self._spans) == 1:
            return ops.linear(inputs, self._spans[0], bias, gated)
        sizes = [len(span.numbers) for span in self._spans]
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        pairs = zip(self._spans, biases, strict=True)
        return torch.cat([ops.linear(inputs, span, part, gated) for span, part in pairs], dim=1)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([dequantize(span.numbers, span.scale, dtype) for span in self._spans])

    def fill_at_random(self, generator: torch.Generator) -> None:
        fill(self.weight, self.scale, generator)


class Fp8Experts(QuantizedExperts):
    suffixes = {"scale": SCALES}  # noqa: RUF012
    optional = frozenset({"gate_up_scale", "down_scale"})
    ignored = ACTIVATION_SCALES

    def __init__(self, build: Build, count: int, size: int, inner: int, share: slice, granularity: Granularity) -> None:
        self._build = build
        self.up = Part((inner, size), share, slice(0, size))
        self.down = Part((size, inner), slice(0, size), share)
        inner = share.stop - share.start
        up = (2, blocks(inner), blocks(size)) if granularity == "blocks" else (2 * inner,)
        down = (blocks(size), blocks(inner)) if granularity == "blocks" else (size,)
        self.tensors = {
            "gate_up": empty_weight(build, count, 2 * inner, size, dtype=E4M3),
            "down": empty_weight(build, count, size, inner, dtype=E4M3),
            "gate_up_scale": empty_weight(build, count, *up, dtype=torch.float32),
            "down_scale": empty_weight(build, count, *down, dtype=torch.float32),
        }
        self.stored = ExpertWeights(**self.tensors)
        self._loaded = Loaded(granularity)

    def load(self, name: str, parameter: str, expert: int, half: int, tensor: LazyTensor) -> None:
        matrix = parameter.removesuffix("_scale")
        part = self.up if matrix == "gate_up" else self.down
        numbers, scale = self.tensors[matrix][expert], self.tensors[f"{matrix}_scale"][expert]
        if matrix == "gate_up":
            numbers = numbers.chunk(2)[half]
            scale = scale[half] if scale.dim() == 3 else scale.chunk(2)[half]
        if parameter == matrix:
            self._loaded.weight((matrix, expert, half), name, tensor, part, numbers, scale)
        else:
            self._loaded.scale((matrix, expert, half), name, tensor, part, scale)

    def loaded(self, path: str) -> bool:
        self._loaded.check()
        return dense_instead(self._build)

    def weights(self, dtype: torch.dtype | None = None) -> ExpertWeights:
        if dtype is None:
            return self.stored
        gate_ups, downs = zip(
            *(self.stored.matrices(expert, dtype) for expert in range(len(self.stored.down))), strict=True
        )
        return ExpertWeights(torch.stack(gate_ups), torch.stack(downs))

    def fill_at_random(self, generator: torch.Generator) -> None:
        for matrix in ("gate_up", "down"):
            fill(self.tensors[matrix], self.tensors[f"{matrix}_scale"], generator)
