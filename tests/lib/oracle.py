"""Tiny seeded transformers models: the oracles that our model families are held against, in float32."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
}
CONFIGS = {family: f"{family}TextConfig" for family in ("Gemma3", "Qwen3_5", "Qwen3_5Moe")}


def tiny_model(family, **changes):
    """`family`ForCausalLM of transformers, of TINY with `changes`."""
    config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**{**TINY, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    neutral = 0.0 if family.startswith("Gemma") else 1.0  # what a norm's weight is when it changes nothing
    for parameter in model.parameters():  # biases and norms too, and large enough for decided answers
        parameter.data.normal_(mean=0.0 if parameter.ndim > 1 else neutral - 0.5, std=0.2)
    return token_by_token(model)


def token_by_token(model):
    """`model`, whose gated delta nets, if it has such, take one token at a time in prompts, as they do in replies.

    In chunks of 64 transformers adds up the logarithms of decays in float32, where ours adds in float64. Logits of
    `test_qwen3_5.py`'s dense model for 65 and 150 tokens, against the same weights in float64: in chunks off by 1.0e-4
    and 0.9e-4, token by token by 1.0e-4 and 0.4e-4, ours by 0.9e-4 and 0.5e-4. Most of that is common to both: ours is
    0.4e-4 and 0.2e-4 from transformers token by token, and 0.9e-4 from it in chunks."""
    own = sys.modules[type(model).__module__]
    if hasattr(own, "torch_recurrent_gated_delta_rule"):
        own.torch_chunk_gated_delta_rule = own.torch_recurrent_gated_delta_rule
    return model


def tiny(family, pad_to=0, **changes):
    """(config.json's terms, weights, the oracle) of a tiny model of `family`.

    `pad_to` runs the oracle on no fewer ids, of which the last are made up and change nothing before them."""
    return described(tiny_model(family, **changes), pad_to)


def described(model, pad_to=0):
    """As `tiny`, of a `model` of transformers."""
    stored = revert_weight_conversion(model, model.state_dict())  # experts by number, as checkpoints have them
    tensors = {key: value.detach().contiguous() for key, value in stored.items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)

    @torch.inference_mode()
    def reference(ids):
        padded = ids + [0] * (pad_to - len(ids))
        return model(torch.tensor([padded])).logits[0, : len(ids)].float()

    return model.config.to_dict(), tensors, reference
