"""Llama and the models that share its shape: SmolLM2, Mistral.

    ids ─ embed ─┬─ norm ─ q,k,v ─ rotate ─ attention ─ o ─(+)─┬─ norm ─ gate,up ─ silu·mul ─ down ─(+)─ … ─ norm ─ head
                 └──────────────────────────────────────────┘  └─────────────────────────────────────┘

Left out: sliding windows (a Mistral that needs one is refused), mixtures of experts.
"""

from typing import Any

from torch import Tensor, nn

from engine.plugin import ConfigError
from engine.plugin.layers import (
    Attention,
    AttentionBackend,
    Batch,
    Build,
    ColumnLinear,
    Embedding,
    LMHead,
    Model,
    QKVLinear,
    RMSNorm,
    Rotary,
    RowLinear,
    rotate,
    silu_and_mul,
)

Rotation = tuple[Tensor, Tensor]


class Llama(Model):
    """`LlamaForCausalLM` and `MistralForCausalLM` of Hugging Face; the paths below are its weights' names."""

    def __init__(self, config: dict[str, Any], build: Build) -> None:
        super().__init__(config, build)
        _check(config, build)
        self.vocab_size = config["vocab_size"]
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads") or heads
        backend = build.attention(config["num_hidden_layers"], heads, kv_heads, head_dim)
        self.backends = (backend,)
        self.rotary = Rotary(build, config, head_dim)
        self.model = Decoder(config, build, backend)
        tied = self.model.embed_tokens if config.get("tie_word_embeddings") else None
        self.lm_head = LMHead(build, config["hidden_size"], self.vocab_size, tied)

    def forward(self, batch: Batch) -> Tensor:
        return self.model(batch, self.rotary(batch.positions))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


class Decoder(nn.Module):
    def __init__(self, config: dict[str, Any], build: Build, backend: AttentionBackend) -> None:
        super().__init__()
        self.embed_tokens = Embedding(build, config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Block(config, build, backend, i) for i in range(config["num_hidden_layers"]))
        self.norm = RMSNorm(build, config["hidden_size"], config["rms_norm_eps"])

    def forward(self, batch: Batch, rotation: Rotation) -> Tensor:
        hidden = self.embed_tokens(batch.ids)
        for layer in self.layers:
            hidden = layer(hidden, batch, rotation)
        return self.norm(hidden)


class Block(nn.Module):
    def __init__(self, config: dict[str, Any], build: Build, backend: AttentionBackend, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(build, config["hidden_size"], config["rms_norm_eps"])
        self.self_attn = SelfAttention(config, build, backend, layer)
        self.post_attention_layernorm = RMSNorm(build, config["hidden_size"], config["rms_norm_eps"])
        self.mlp = MLP(config, build)

    def forward(self, hidden: Tensor, batch: Batch, rotation: Rotation) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), batch, rotation)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class SelfAttention(nn.Module):
    def __init__(self, config: dict[str, Any], build: Build, backend: AttentionBackend, layer: int) -> None:
        super().__init__()
        size, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or size // heads
        bias = bool(config.get("attention_bias"))
        self.qkv_proj = QKVLinear(build, size, heads, kv_heads, head_dim, bias)
        self.o_proj = RowLinear(build, heads * head_dim, size, bias)
        self.attention = Attention(backend, layer)

    def forward(self, hidden: Tensor, batch: Batch, rotation: Rotation) -> Tensor:
        query, key, value = self.qkv_proj(hidden)
        return self.o_proj(self.attention(rotate(query, rotation), rotate(key, rotation), value, batch))


class MLP(nn.Module):
    def __init__(self, config: dict[str, Any], build: Build) -> None:
        super().__init__()
        size, inner = config["hidden_size"], config["intermediate_size"]
        bias = bool(config.get("mlp_bias"))
        self.gate_up_proj = ColumnLinear(build, size, {"gate_proj": inner, "up_proj": inner}, bias)
        self.down_proj = RowLinear(build, inner, size, bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(silu_and_mul(self.gate_up_proj(hidden)))


def _check(config: dict[str, Any], build: Build) -> None:
    """Refuses what would run and be wrong."""
    window = config.get("sliding_window")
    if window and window < build.max_model_len:
        raise ConfigError(
            f"the model attends through a sliding window of {window} tokens, which is not supported beyond that "
            f"length, and max_model_len is {build.max_model_len}: pass --max-model-len {window} or less"
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {activation!r} is not supported by the llama model; it knows silu")
