"""Our quantizations keep their contract, and the check finds those that do not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from engine.plugin import ConfigError
from engine.plugin.kernels import quantize_blocks, quantize_rows
from engine.plugin.layers import QuantizedLinear, Scheme
from engine.plugin.testing import check_scheme
from engine_plugins.quantization import fp8
from engine_plugins.quantization.fp8 import Fp8

BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
ROWS = {"quant_method": "fp8"}


def of_blocks(weight: Tensor) -> dict[str, Tensor]:
    numbers, scale = quantize_blocks(weight)
    return {"weight": numbers, "weight_scale_inv": scale}


def of_rows(weight: Tensor) -> dict[str, Tensor]:
    numbers, scale = quantize_rows(weight)
    return {"weight": numbers, "weight_scale": scale}


def of_tensors(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax() / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale, "input_scale": scale}


@pytest.mark.parametrize("pays", [False, True], ids=["kept dense", "kept FP8"])
@pytest.mark.parametrize(
    ("terms", "form"),
    [
        (None, {"unit": 64}),
        (None, {"unit": 40}),
        (BLOCKS, {"stored": of_blocks, "unit": 64}),
        (ROWS, {"stored": of_rows, "unit": 40}),
        (ROWS, {"stored": of_tensors, "unit": 40}),
    ],
    ids=["made", "made of odd sizes", "blocks", "rows", "tensors"],
)
def test_fp8(monkeypatch: pytest.MonkeyPatch, pays: bool, terms: Any, form: dict[str, Any]) -> None:
    monkeypatch.setattr(fp8, "dense_instead", lambda build: not pays)
    check_scheme(Fp8(terms), error=0.04, **form)


# ── others ───────────────────────────────────────────────────────────────────────────────────


class Right(Scheme):
    """Eight bits and a scale of each row, made as weights are loaded."""

    def __init__(self, terms: Any = None) -> None:
        pass

    def takes(self, path: str) -> bool:
        return path.endswith("_proj")

    def linear(self, build: Any, parts: Any, inputs: int, shard: Any) -> QuantizedLinear:
        return self.rows(build, shard)

    def experts(self, build: Any, count: int, size: int, inner: int, share: slice) -> Any:
        raise ConfigError("it stores no experts")

    def rows(self, build: Any, shard: Any) -> "Rows":
        return Rows(build, shard)


class Rows(QuantizedLinear):
    def __init__(self, build: Any, shard: Any) -> None:
        self.shard, self.first, rows = shard, {}, 0
        for part in shard.rows:
            self.first[part], rows = rows, rows + shard.rows_of(part)
        numbers, scales = torch.empty(rows, shard.inputs, dtype=torch.int8), torch.empty(rows)
        named = {"weight": numbers, "weight_scale": scales}
        self.tensors = {name: torch.nn.Parameter(each, requires_grad=False) for name, each in named.items()}

    def load(self, name: str, parameter: str, part: str, tensor: Any) -> None:
        given = tensor[self.rows_of(part), self.shard.columns].float()
        scale = self.scale(given)
        here = slice(self.first[part], self.first[part] + len(given))
        self.tensors["weight"][here] = (given / scale[:, None]).round().to(torch.int8)
        self.tensors["weight_scale"][here] = scale

    def rows_of(self, part: str) -> slice:
        rows: slice = self.shard.rows[part]
        return rows

    def scale(self, given: Tensor) -> Tensor:
        return given.abs().amax(1) / 127

    def loaded(self, path: str) -> bool:
        return False

    def fill_at_random(self, generator: torch.Generator) -> None:
        self.tensors["weight"].random_(-127, 128, generator=generator)
        self.tensors["weight_scale"].fill_(0.02 / 73)

    def linear(self, inputs: Tensor, bias: Tensor | None, gated: bool = False) -> Tensor:
        if gated:
            gate, up = inputs.chunk(2, dim=1)
            inputs = silu(gate) * up
        return linear(inputs, self.dense(inputs.dtype), bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return (self.tensors["weight"] * self.tensors["weight_scale"][:, None]).to(dtype)


class FirstRank(Rows):
    """Every rank holds the first rows."""

    def rows_of(self, part: str) -> slice:
        return slice(0, self.shard.rows_of(part))


class OneScale(Rows):
    """The first scale of a part takes the place of those of the parts before it."""

    def load(self, name: str, parameter: str, part: str, tensor: Any) -> None:
        super().load(name, parameter, part, tensor)
        self.tensors["weight_scale"][: self.first[part]] = self.tensors["weight_scale"][self.first[part]]


class Ungated(Rows):
    def linear(self, inputs: Tensor, bias: Tensor | None, gated: bool = False) -> Tensor:
        return super().linear(inputs.chunk(2, dim=1)[0] if gated else inputs, bias)


class Swapped(Rows):
    """Up before gate."""

    def linear(self, inputs: Tensor, bias: Tensor | None, gated: bool = False) -> Tensor:
        return super().linear(inputs.roll(inputs.shape[1] // 2, 1) if gated else inputs, bias, gated)


class Unbiased(Rows):
    def linear(self, inputs: Tensor, bias: Tensor | None, gated: bool = False) -> Tensor:
        return super().linear(inputs, None, gated)


class Greedy(Rows):
    """Reads the whole of a tensor that it needs a part of."""

    def load(self, name: str, parameter: str, part: str, tensor: Any) -> None:
        super().load(name, parameter, part, tensor.float())


class Single(Rows):
    def dense(self, dtype: torch.dtype) -> Tensor:
        return super().dense(torch.float32)


class Loud(Rows):
    def fill_at_random(self, generator: torch.Generator) -> None:
        super().fill_at_random(generator)
        self.tensors["weight_scale"].fill_(1.0)


class Unseeded(Rows):
    def fill_at_random(self, generator: torch.Generator) -> None:
        super().fill_at_random(torch.Generator().manual_seed(7))


def scheme_of(rows: Callable[..., Rows]) -> Scheme:
    scheme = Right()
    scheme.rows = rows  # type: ignore[method-assign]
    return scheme


def test_a_right_one_passes() -> None:
    check_scheme(Right(), experts=False, error=0.02, unit=8)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            FirstRank,
            r"down_proj, place 1 of two ranks that divide rows: dense of its part.* off by 1\.\d* of the norm",
        ),
        (OneScale, r"mlp.gate_proj, .*mlp.up_proj, place 0 of one rank: dense of gate_proj, .*: off by 2\."),
        (Ungated, "linear of gated inputs of 1 tokens without a bias, against the product of dense: off by"),
        (Swapped, "linear of gated inputs of 1 tokens without a bias, against the product of dense: off by"),
        (Unbiased, "linear of 1 tokens with a bias, against the product of dense: off by"),
        (Single, "dense is torch.float32, and torch.bfloat16 was asked for"),
        (Loud, "fill_at_random has the deviation 7.*, and not 0.02"),
        (Unseeded, "fill_at_random does not ask its generator"),
    ],
)
def test_a_wrong_one_is_found(wrong: Callable[..., Rows], said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_scheme(scheme_of(wrong), experts=False, error=0.02, unit=8)


def test_what_a_checkpoint_gives_is_read_by_slices() -> None:
    with pytest.raises(AttributeError, match="float"):
        check_scheme(scheme_of(Greedy), experts=False, unit=8)


def test_one_that_takes_nothing_or_refuses_experts_is_told() -> None:
    with pytest.raises(AssertionError, match=r"takes.. is False for model.layers.0.mlp.down_proj"):
        check_scheme(Fp8(BLOCKS | {"modules_to_not_convert": ["down_proj"]}))
    with pytest.raises(AssertionError, match=r"experts.. stores what it was said not to store"):
        check_scheme(Fp8(None), experts=False, unit=8)


@pytest.mark.parametrize("fault", ["halves", "share"])
def test_experts_in_the_wrong_place_are_found(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    make, load = Fp8.experts, fp8.Fp8Experts.load
    if fault == "halves":
        monkeypatch.setattr(fp8.Fp8Experts, "load", lambda self, *to: load(self, *to[:3], 0, to[4]))
    else:
        monkeypatch.setattr(Fp8, "experts", lambda self, *to: make(self, *to[:4], slice(0, to[4].stop - to[4].start)))
    with pytest.raises(AssertionError, match=r"experts, place . of .: weights of expert 0, against .* gate_up: off by"):
        check_scheme(Fp8(None), unit=8)
