"""Rotary position embedding (RoFormer, arXiv:2104.09864) and the scalings that stretch it.

Angles are computed once a step, in float32, from positions: no table, so no length limit.

Tokens of a picture have three positions, in time, height and width (M-RoPE, arXiv:2409.12191), and each frequency turns
by one of them: `mrope_section` [16, 24, 24] gives the first 16 to time, or, `mrope_interleaved`, every third of the
first ones to height and to width. Where all three are the same, as those of text are, it is the usual rotation.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.layers.build import Build
from engine.plugin.terms import LONGEST, Terms

# of config.json itself, where its rope options do not say otherwise
THETA = 10000.0
TRAINED = "original_max_position_embeddings"
TERMS = ("rope_theta", "partial_rotary_factor", "max_position_embeddings", TRAINED)


class Rotary(nn.Module):
    """Turns positions into the cosines and sines that rotate queries and keys (`Ops.rotate_heads`).

    Reads `rope_theta`, `partial_rotary_factor` and `rope_scaling` of config.json, or `rope_parameters` which holds
    all (the form of transformers 5). Raises ConfigError for a rope type it does not know.
    """

    def __init__(self, build: Build, config: Mapping[str, Any], head_dim: int) -> None:
        super().__init__()
        self.kernels = build.kernels
        scaling = rope_terms(config)
        kind = rope_type(scaling)
        known = {"default": _default, "linear": _linear, "llama3": _llama3, "longrope": _longrope, "su": _longrope}
        known |= {"yarn": _yarn, "mrope": _default}
        if kind not in known:
            raise ConfigError(f"rope type {kind!r} is not supported; this model class knows {', '.join(known)}")
        size = int(head_dim * scaling.number("partial_rotary_factor", 1.0, high=1.0))
        if not 0 < size + size % 2 <= head_dim:
            raise ConfigError(
                f"{size} dimensions of a head of {head_dim} cannot be rotated in pairs; head_dim, and "
                f"partial_rotary_factor if there is one, are wrong in {scaling.source}"
            )
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        frequencies = 1.0 / scaling.number("rope_theta", THETA) ** exponents
        frequencies, self.magnitude = known[kind](frequencies, scaling, build.max_model_len)
        self.frequencies = frequencies.to(build.device)  # [size / 2]
        axes = _axes(scaling, len(frequencies))
        self.axes = None if axes is None else torch.tensor(axes, device=build.device)  # [size / 2]: 0, 1 or 2
        self.dtype = build.dtype

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`positions` [T], or [3, T], to (cosines, sines), each [T, 1, size / 2]: `size` of head_dim dimensions
        rotate."""
        if positions.dim() == 2:
            assert self.axes is not None, "a model without mrope_section has one position a token"
            angles = positions[self.axes].T[:, None].to(torch.float32).contiguous() * self.frequencies
            return (angles.cos() * self.magnitude).to(self.dtype), (angles.sin() * self.magnitude).to(self.dtype)
        cosines, sines = self.kernels.dense.rotation(positions, self.frequencies, self.magnitude)
        return cosines.to(self.dtype), sines.to(self.dtype)


def rope_terms(config: Mapping[str, Any]) -> Terms:
    """What a configuration says of rotation: in an object of its own, and beside it."""
    terms = Terms.of(config)
    own = terms.section("rope_scaling") or terms.section("rope_parameters")
    said = {key: value for key, value in own.items() if value is not None}
    beside = {key: terms[key] for key in TERMS if terms.get(key) is not None}
    first = {TRAINED: beside[TRAINED]} if TRAINED in beside else {}  # which is believed more, as in transformers
    return Terms(beside | said | first, terms.source, own.within if said else terms.within)


def rope_type(scaling: Terms) -> str:
    """The name of the scaling, which older configurations call `type`."""
    return scaling.word("rope_type", None) or scaling.word("type", "default")


def _axes(scaling: Terms, pairs: int) -> list[int] | None:
    """By which of its three positions each pair of a head's dimensions turns; None where a token has one position."""
    sections = scaling.integers("mrope_section", 3)
    if not sections:
        return None
    if sum(sections) != pairs:
        raise scaling.wrong("mrope_section", f"three integers whose sum is {pairs}, half of what is rotated of a head")
    if not scaling.flag("mrope_interleaved"):
        return [axis for axis, count in enumerate(sections) for _ in range(count)]
    ends = (0, 3 * sections[1], 3 * sections[2])
    return [pair % 3 if pair < ends[pair % 3] else 0 for pair in range(pairs)]


# ── rope types: frequencies, options and the longest sequence to frequencies and the size of the rotated ─────────────


def _default(frequencies: Tensor, scaling: Terms, longest: int) -> tuple[Tensor, float]:
    return frequencies, 1.0


def _linear(frequencies: Tensor, scaling: Terms, longest: int) -> tuple[Tensor, float]:
    """Position interpolation (arXiv:2306.15595)."""
    return frequencies / scaling.number("factor"), 1.0


def _llama3(frequencies: Tensor, scaling: Terms, longest: int) -> tuple[Tensor, float]:
    """Llama 3.1's: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor, low = scaling.number("factor"), scaling.number("low_freq_factor")
    high = scaling.number("high_freq_factor")
    if high <= low:
        raise scaling.wrong("high_freq_factor", f"more than low_freq_factor, which is {low}")
    turns = _trained(scaling) * frequencies / (2 * math.pi)  # over the trained length
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / factor, 1.0


def _longrope(frequencies: Tensor, scaling: Terms, longest: int) -> tuple[Tensor, float]:
    """LongRoPE (arXiv:2402.13753): a divisor of its own for each frequency.

    There are two sets of them, for sequences within the trained length and beyond. What is cached for one is of no
    use to the other, so `longest` chooses for all sequences; Hugging Face chooses anew for each batch.
    """
    trained = _trained(scaling)
    divisors = scaling.numbers("long_factor" if longest > trained else "short_factor", len(frequencies))
    magnitude = scaling.number("attention_factor", None)
    if magnitude is None:
        stretch = _stretch(scaling)
        magnitude = math.sqrt(1 + math.log(stretch) / math.log(trained)) if stretch > 1 else 1.0
    return frequencies / torch.tensor(divisors), float(magnitude)


def _yarn(frequencies: Tensor, scaling: Terms, longest: int) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071): what turns less than `beta_slow` times within the trained length is stretched by
    `factor`, what turns more than `beta_fast` times kept, what is between blended by its place in the order."""
    factor, trained = _stretch(scaling), _trained(scaling)
    count, base = len(frequencies), scaling.number("rope_theta", THETA, above=1.0)

    def place(turns: float) -> float:
        return count * math.log(trained / (turns * 2 * math.pi)) / math.log(base)

    low, high = place(scaling.number("beta_fast", 32.0)), place(scaling.number("beta_slow", 1.0))
    if scaling.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * count - 1)
    stretched = ((torch.arange(count) - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    magnitude = scaling.number("attention_factor", None)
    if magnitude is None:
        weights = [scaling.number(name, 0.0, above=-1.0) for name in ("mscale", "mscale_all_dim")]
        one, all_dims = weights if all(weights) else (1.0, 0.0)
        magnitude = yarn_scale(factor, one) / yarn_scale(factor, all_dims)
    return stretched * frequencies / factor + (1 - stretched) * frequencies, float(magnitude)


def _trained(scaling: Terms) -> int:
    """Positions that the model was trained on, by default all; more than one, as logarithms of it are divided by."""
    name = TRAINED if scaling.get(TRAINED) is not None else "max_position_embeddings"
    return scaling.integer(name, low=2, high=LONGEST)


def _stretch(scaling: Terms) -> float:
    """By how much positions are stretched; by default from what the model was trained on to all."""
    factor = scaling.number("factor", None)
    return factor or scaling.integer("max_position_embeddings", high=LONGEST) / _trained(scaling)


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """By how much YaRN enlarges the rotated where it stretches by `factor`: the entropy of attention stays the same."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
