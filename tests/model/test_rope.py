"""Rotary frequencies and windows as transformers makes them of a config.json in which fields are missing, null, or in
the place where older versions had them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.errors import ConfigError
from engine.kernels import KernelSet
from engine.layers import DecoderShape, Rotary
from engine.plugin import Terms
from engine_plugins.models.gemma import Gemma3
from engine_plugins.models.llama import Llama
from engine_plugins.models.mixtral import Mixtral
from engine_plugins.models.phi import Phi3
from engine_plugins.models.qwen import Qwen
from engine_plugins.models.qwen3_moe import Qwen3Moe

LONGEST = 64
BUILD = SimpleNamespace(max_model_len=LONGEST, device=torch.device("cpu"), dtype=torch.float32, kernels=KernelSet())
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4, "vocab_size": 9}
SIZES |= {"intermediate_size": 8, "rms_norm_eps": 1e-6, "max_position_embeddings": LONGEST, "head_dim": 16}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
FAMILIES = {"llama": Llama, "mistral": Llama, "mixtral": Mixtral, "qwen2": Qwen, "qwen3": Qwen, "phi3": Phi3}
FAMILIES |= {"qwen3_moe": Qwen3Moe}


def shape(config: dict[str, Any]) -> DecoderShape:
    return FAMILIES[config["model_type"]].shape_of(Terms(config))


def frequencies(config: dict[str, Any]) -> tuple[torch.Tensor, float]:
    rotary = Rotary(BUILD, shape(config).kinds[0].rope, 16)
    return rotary.frequencies, rotary.magnitude


def expected(config: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Raises for what transformers cannot compute."""
    peer = transformers.AutoConfig.for_model(**config)
    kind = peer.rope_parameters["rope_type"]
    if kind == "default":
        rope = peer.rope_parameters
        size = int(16 * rope.get("partial_rotary_factor", 1.0))
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2).float() / size), 1.0
    return ROPE_INIT_FUNCTIONS[kind](peer, torch.device("cpu"), seq_len=LONGEST)


KINDS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"type": "linear", "factor": 4.0},
    {"rope_type": "linear", "type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": None, "beta_fast": 20.0, "mscale": 0.7, "mscale_all_dim": 0.9},
    {"rope_type": "yarn", "factor": 4.0, "truncate": False, "attention_factor": 1.5},
    {"rope_type": "longrope", "long_factor": [1.0 + i for i in range(8)], "short_factor": [1.0] * 8},
    {"rope_type": "longrope", "long_factor": [2.0] * 8, "short_factor": [1.0] * 8, "factor": 3.0},
]


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, deadline=None)
@given(
    model_type=st.sampled_from(sorted(FAMILIES)),
    rope=st.none() | st.just({}) | st.sampled_from(KINDS),
    place=st.sampled_from(["rope_parameters", "rope_scaling"]),
    theta=st.sampled_from(["absent", "beside", "within"]),
    within=st.fixed_dictionaries({}, optional={"original_max_position_embeddings": st.sampled_from([8, 16])}),
    trained=st.sampled_from([None, 16, 32]),
)
def test_frequencies_are_those_of_transformers(model_type, rope, place, theta, within, trained) -> None:
    config = {"model_type": model_type, **SIZES, **MOE, place: rope}
    if rope:
        config[place] = {**rope, **(within if rope.get("rope_type") in ("yarn", "llama3", "longrope") else {})}
    if theta == "beside":
        config["rope_theta"] = 500.0
    if theta == "within" and rope:
        config[place] |= {"rope_theta": 700.0}
    if trained is not None:
        config["original_max_position_embeddings"] = trained
    try:
        wanted, magnitude = expected(json_copy(config))
    except Exception:  # transformers refuses it, in as many ways as it has families
        reject()
    got, ours = frequencies(config)
    torch.testing.assert_close(got, wanted.float())
    assert ours == pytest.approx(magnitude)


def json_copy(config: dict[str, Any]) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_field_without_a_default_is_refused_by_name(kind: dict[str, Any]) -> None:
    for gone in set(kind) & {"low_freq_factor", "high_freq_factor", "short_factor"}:
        for value in ({}, {gone: None}):
            config = {
                "model_type": "llama",
                **SIZES,
                "rope_scaling": {key: kind[key] for key in {*kind} - {gone}} | value,
            }
            with pytest.raises(ConfigError, match=f"has no rope_scaling.{gone}"):
                frequencies(config)
    if kind.get("type") == "linear":
        config = {"model_type": "llama", **SIZES, "rope_scaling": kind | {"factor": None}}
        with pytest.raises(ConfigError, match=r"has no rope_scaling\.factor"):
            frequencies(config)


# ── windows ──────────────────────────────────────────────────────────────────────────────────


def windows(model: DecoderShape) -> list[int | None]:
    return [model.kinds[kind].window for kind in model.layers]


USED = {"use_sliding_window": True}


@pytest.mark.parametrize("said", [{}, {"sliding_window": None}, {"sliding_window": 7}])
@pytest.mark.parametrize(
    "more", [{}, {"use_sliding_window": True}, {"use_sliding_window": True, "max_window_layers": 2}]
)
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_windows_are_those_of_transformers(model_type: str, said: dict[str, Any], more: dict[str, Any]) -> None:
    config = {"model_type": model_type, **SIZES, **MOE, **said, **more}
    peer = transformers.AutoConfig.for_model(**config)
    window = None if model_type == "llama" else peer.sliding_window
    types = getattr(peer, "layer_types", None) or ["sliding_attention"] * 4
    assert windows(shape(config)) == [window if kind == "sliding_attention" else None for kind in types]


@pytest.mark.parametrize("said", [{}, {"sliding_window": 7}, {"sliding_window": 7, "sliding_window_pattern": 2}])
def test_gemmas_windows_are_those_of_transformers(said: dict[str, Any]) -> None:
    config = {"model_type": "gemma3_text", **SIZES, **said}
    peer = transformers.AutoConfig.for_model(**config)
    expected = [peer.sliding_window if kind == "sliding_attention" else None for kind in peer.layer_types]
    assert windows(Gemma3.shape_of(Terms(config))) == expected
