"""The contract of quantizations, for authors by way of engine.plugin.testing. Imports torch.

def test_my_scheme():
    check_scheme(MyScheme(None))

Left out: speed; checkpoints that lack something, and those that stack what a model has apart (`Scheme.divided`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from engine.errors import ConfigError
from engine.kernels.experts.reference import ExpertWeights
from engine.layers.build import Build, Scheme
from engine.layers.quantization import Quantized, QuantizedExperts, QuantizedLinear, Shard
from engine.parallel.mesh import Mesh

Made = TypeVar("Made", QuantizedLinear, QuantizedExperts)
Stored = Callable[[Tensor], Mapping[str, Tensor]]
LAYER = "model.layers.0"
# The parts of layers by their names in checkpoints, and their rows in units; columns are two units.
LAYERS: tuple[tuple[str, dict[str, int]], ...] = (
    (f"{LAYER}.mlp.down_proj", {"": 2}),
    (f"{LAYER}.mlp", {"gate_proj": 2, "up_proj": 2}),
    (f"{LAYER}.self_attn", {"q_proj": 4, "k_proj": 2, "v_proj": 2}),
)
TOKENS = (1, 3, 70)  # of a step
EXPERTS = 3
RANDOM = (0.017, 0.023)  # deviations that are about 0.02


class Lazy:
    """A tensor of a checkpoint as a scheme gets it: it has a shape, and is read by slices."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.shape = tuple(tensor.shape)

    def __getitem__(self, index: Any) -> Tensor:
        return self._tensor[index]


def check_scheme(
    scheme: Scheme,
    *,
    stored: Stored = lambda weight: {"weight": weight},
    unit: int = 128,
    error: float = 0.1,
    tolerance: float = 1e-4,
    experts: bool = True,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """What it stores stands for the weights that it was given, on one rank or divided over two, and its products are
    those of the matrices that it says it stands for.

    `stored` makes of a matrix what a checkpoint has of it, by the ends of names; by default it is not quantized. Sizes
    are multiples of `unit`. `error` is how far a stored matrix may be from the given one, and `tolerance` how far a
    product may be from that of the stored one, both as a part of the norm. Without `experts` a mixture is refused."""
    generator = torch.Generator().manual_seed(0)
    check = _Check(scheme, stored, error, tolerance, torch.device(device), dtype)
    for path, parts in LAYERS:
        paths = [f"{path}.{part}".rstrip(".") for part in parts]
        left = [each for each in paths if not scheme.takes(each)]
        assert not left, f"takes() is False for {', '.join(left)}"
        sizes, inputs = {part: rows * unit for part, rows in parts.items()}, 2 * unit
        # Parts of unlike size, so that the scale of one is of no use to another.
        weights = {
            part: 4.0**index * torch.randn(rows, inputs, generator=generator)
            for index, (part, rows) in enumerate(sizes.items())
        }
        for ranks, shards in (
            ("one rank", [Shard.whole(sizes, inputs)]),
            ("two ranks that divide rows", [Shard({part: half(sizes[part], rank) for part in sizes}, slice(0, inputs))
                                            for rank in range(2)]),
            ("two ranks that divide columns", [Shard(Shard.whole(sizes, inputs).rows, half(inputs, rank))
                                               for rank in range(2)]),
        ):  # fmt: skip
            for rank, shard in enumerate(shards):
                where = f"{', '.join(paths)}, place {rank} of {ranks}"
                build = check.build(rank, len(shards))
                check.layer(partial(scheme.linear, build, sizes, inputs, shard), path, weights, shard, where)
    if experts:
        check.mixture(2 * unit, 4 * unit, generator)
        return
    try:
        scheme.experts(check.build(0, 1), EXPERTS, 2 * unit, 4 * unit, slice(0, 4 * unit))
    except ConfigError:
        return
    raise AssertionError("experts() stores what it was said not to store; check it with experts=True")


def half(size: int, rank: int) -> slice:
    """The rows or columns of one of two ranks."""
    return slice(rank * size // 2, (rank + 1) * size // 2)


@dataclass(frozen=True)
class _Check:
    scheme: Scheme
    stored: Stored
    error: float
    tolerance: float
    device: torch.device
    dtype: torch.dtype

    def build(self, rank: int, ranks: int) -> Build:
        """What a layer of a model on that rank is built from; without attention."""
        return Build(
            dtype=self.dtype,
            device=self.device,
            page_size=16,
            max_model_len=64,
            attention_backend=_no_attention,
            mesh=Mesh(rank, tp=ranks),
            quantization=self.scheme,
        )

    def layer(
        self, make: Callable[[], QuantizedLinear], path: str, weights: Mapping[str, Tensor], shard: Shard, where: str
    ) -> None:
        """A rank's part of a layer."""
        self.random(make, path, lambda made: made.dense(torch.float32), where)
        rows, columns, made = sum(shard.rows_of(part) for part in weights), shard.inputs, make()
        assert "weight" in made.tensors, f"{where}: tensors has {', '.join(made.tensors)}, and no weight"
        for part, weight in weights.items():
            for end, tensor in self.stored(weight).items():
                if end not in made.ignored:
                    name = ".".join(filter(None, (path, part, end)))
                    made.load(name, parameter_of(made, end), part, Lazy(tensor))
        replaced = made.loaded(path)
        for dtype in (torch.float32, torch.bfloat16):
            dense = made.dense(dtype)
            assert dense.shape == (rows, columns), f"{where}: dense is {tuple(dense.shape)}, not {(rows, columns)}"
            assert dense.dtype == dtype, f"{where}: dense is {dense.dtype}, and {dtype} was asked for"
        dense = made.dense(torch.float32)
        own = dense.split([shard.rows_of(part) for part in weights])
        for (part, weight), stored in zip(weights.items(), own, strict=True):
            wanted = weight[shard.rows[part], shard.columns]
            self.near(stored, wanted, self.error, f"{where}: dense of {part or 'its part'}, against what was loaded")
        if not replaced:
            self.products(made, dense, where)

    def products(self, made: QuantizedLinear, dense: Tensor, where: str) -> None:
        """Of steps of few and many tokens, with and without a bias, and gated."""
        rows, columns = dense.shape
        generator = torch.Generator().manual_seed(1)
        for tokens in TOKENS:
            both = torch.randn(tokens, 2 * columns, generator=generator).to(self.device, self.dtype)
            gate, up = both.float().chunk(2, dim=1)
            bias = torch.randn(rows, generator=generator).to(self.device, self.dtype)
            for what, given, inputs, gated in (
                ("linear", both[:, :columns].contiguous(), gate, False),
                ("linear of gated inputs", both, silu(gate) * up, True),
            ):
                for added in (None, bias):
                    before = given.clone()
                    got = made.linear(given, added, gated)
                    said = f"{where}: {what} of {tokens} tokens {'without' if added is None else 'with'} a bias"
                    assert got.shape == (tokens, rows), f"{said} is {tuple(got.shape)}, not {(tokens, rows)}"
                    assert got.dtype == self.dtype, f"{said} is {got.dtype}, and its inputs are {self.dtype}"
                    assert torch.equal(given, before), f"{said} changes its inputs"
                    wanted = linear(inputs, dense, None if added is None else added.float())
                    self.near(got, wanted, self.tolerance, f"{said}, against the product of dense")

    def mixture(self, size: int, inner: int, generator: torch.Generator) -> None:
        """Experts on one rank, and on two that divide their inner size."""
        gate_up, down = (
            torch.randn(EXPERTS, *shape, generator=generator) for shape in ((2, inner, size), (size, inner))
        )
        scales = 4.0 ** torch.arange(EXPERTS)
        gate_up, down = gate_up * scales[:, None, None, None], down * scales[:, None, None]
        path = f"{LAYER}.mlp.experts"
        for rank, ranks in ((0, 1), (0, 2), (1, 2)):
            where = f"{path}, place {rank} of {ranks}"
            share = half(inner, rank) if ranks == 2 else slice(0, inner)
            make = partial(self.scheme.experts, self.build(rank, ranks), EXPERTS, size, inner, share)
            self.random(make, path, lambda made: made.weights(torch.float32).gate_up, f"{where}, gate_up")
            self.random(make, path, lambda made: made.weights(torch.float32).down, f"{where}, down")
            made = make()
            for expert in range(EXPERTS):
                for module, matrix, number, weight in (
                    ("gate_proj", "gate_up", 0, gate_up[expert, 0]),
                    ("up_proj", "gate_up", 1, gate_up[expert, 1]),
                    ("down_proj", "down", 0, down[expert]),
                ):
                    for end, tensor in self.stored(weight).items():
                        parameter = matrix if end == "weight" else f"{matrix}_{parameter_of(made, end)}"
                        if end not in made.ignored:
                            made.load(f"{path}.{expert}.{module}.{end}", parameter, expert, number, Lazy(tensor))
            replaced = made.loaded(path)
            found = [("weights", made.weights(torch.float32))]
            if not replaced:
                pairs = [made.weights().matrices(expert, torch.float32) for expert in range(EXPERTS)]
                found.append(("what kernels take", ExpertWeights(*map(torch.stack, zip(*pairs, strict=True)))))
            for name, weights in found:
                for expert in range(EXPERTS):
                    said = f"{where}: {name} of expert {expert}, against what was loaded:"
                    wanted = gate_up[expert, :, share].flatten(0, 1)
                    self.near(weights.gate_up[expert], wanted, self.error, f"{said} gate_up")
                    self.near(weights.down[expert], down[expert][:, share], self.error, f"{said} down")

    def random(self, make: Callable[[], Made], path: str, read: Callable[[Made], Tensor], where: str) -> None:
        """Weights that nobody gave it, the same for the same generator."""
        filled = []
        for seed in (0, 0, 1):
            made = make()
            made.fill_at_random(torch.Generator(self.device).manual_seed(seed))
            made.loaded(path)
            filled.append(read(made))
        low, high = RANDOM
        deviation = float(filled[0].std())
        assert low <= deviation <= high, f"{where}: fill_at_random has the deviation {deviation:.3g}, and not 0.02"
        assert torch.equal(filled[0], filled[1]), f"{where}: fill_at_random differs from one time to the next"
        assert not torch.equal(filled[0], filled[2]), f"{where}: fill_at_random does not ask its generator"

    def near(self, got: Tensor, wanted: Tensor, bound: float, where: str) -> None:
        got, wanted = got.double().cpu(), wanted.double().cpu()
        assert got.shape == wanted.shape, f"{where}: it is {tuple(got.shape)}, not {tuple(wanted.shape)}"
        off = float((got - wanted).norm() / wanted.norm())
        assert off <= bound, f"{where}: off by {off:.3g} of the norm, more than {bound:.3g}"


def parameter_of(made: Quantized, end: str) -> str:
    """The one of its tensors that a checkpoint's names with that end belong to."""
    return next((name for name, ends in made.suffixes.items() if end in ends), end)


def _no_attention(*_: object) -> Any:
    raise AssertionError("a quantization asks for no attention")
