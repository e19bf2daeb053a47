"""The differences between GGUF architectures, as data: names, numbers, and llama.cpp's changes to weights.

The names are those of `gguf.MODEL_ARCH`. Reading undoes the changes that llama.cpp's converter makes to weights.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec import Struct

from engine.plugin import LONGEST, MANY, MOST, ConfigError, Terms

Config = dict[str, Any]  # in config.json's terms

FRACTIONS = frozenset({"rms_norm_eps", "rope_theta", "rope_local_base_freq", "final_logit_softcapping"})
HAVE_DEFAULTS = frozenset({"num_key_value_heads", "head_dim", "rope_theta"})
BOUNDS = {"num_hidden_layers": MANY, "max_position_embeddings": LONGEST, "original_max_position_embeddings": LONGEST}


class Family(Struct, frozen=True, kw_only=True):
    """How one `general.architecture` translates.

    `constants` are config.json's terms that are the same for all its models. `numbers` maps more of them to metadata
    keys under the architecture's prefix, `optional` those that a file may lack, and `derive` makes what follows from
    these. `tensors` maps names, where `blk.N.` stands before those of `layer`; `permuted` names the layer tensors
    whose rows llama.cpp reorders, with the term of their head count. `norm_offset` is what it adds to the weights of
    norms. `ends` are control tokens that end a reply beside those that the file names.
    """

    constants: Config
    numbers: dict[str, str]
    tensors: dict[str, str]
    layer: dict[str, str]
    optional: dict[str, str] = {}
    derive: Callable[[Config], Config] = dict
    permuted: dict[str, str] = {}
    norm_offset: float = 0.0
    ends: tuple[str, ...] = ()

    def read(self, fields: Terms, prefix: str) -> Config:
        """The numbers of the metadata `fields` under config.json's names. Absent ones are left out, and so are optional
        ones that are 0. Raises ConfigError for a number of another kind or out of its range."""
        found: Config = {}
        for ours, theirs in (self.numbers | self.optional).items():
            key, optional = f"{prefix}.{theirs}", ours in self.optional
            if fields.get(key) is None and (optional or ours in HAVE_DEFAULTS):
                continue
            if ours in FRACTIONS:
                found[ours] = fields.number(key, above=-1e-9 if optional else 0.0)
            else:
                found[ours] = fields.integer(key, low=0 if optional else 1, high=BOUNDS.get(ours, MOST))
            if optional and not found[ours]:
                del found[ours]
        heads, size = found["num_attention_heads"], found["hidden_size"]
        found = {"num_key_value_heads": heads, "head_dim": size // heads, "rope_theta": 10000.0} | found
        if not found["head_dim"] or heads % found["num_key_value_heads"]:
            raise fields.wrong(
                f"{prefix}.attention.head_count",
                f"at most embedding_length, {size}, and a multiple of head_count_kv, {found['num_key_value_heads']}",
            )
        return found

    def translate(self, name: str, path: Path) -> str:
        """The Hugging Face name of the GGUF tensor `name`. Raises ConfigError if the family has no such tensor."""
        if name in self.tensors:
            return self.tensors[name]
        block, _, rest = name.partition(".")
        number, _, suffix = rest.partition(".")
        if block == "blk" and number.isdecimal() and suffix in self.layer:
            return f"model.layers.{number}.{self.layer[suffix]}"
        architecture = self.constants["architectures"][0]
        raise ConfigError(f"{path} has a tensor {name} that {architecture} does not know; use the model's safetensors")


NUMBERS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
}
TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ATTENTION = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
}
BLOCK = {
    **ATTENTION,
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
BIASES = {f"attn_{head}.bias": f"self_attn.{head}_proj.bias" for head in "qkv"}
HEAD_NORMS = {f"attn_{head}_norm.weight": f"self_attn.{head}_norm.weight" for head in "qk"}

LLAMA = Family(
    constants={"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"},
    numbers=NUMBERS,
    tensors=TENSORS,
    layer=BLOCK,
    permuted={"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"},
)
QWEN2 = Family(
    constants={"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"},
    numbers=NUMBERS,
    tensors=TENSORS,
    layer=BLOCK | BIASES,
    ends=("<|endoftext|>",),
)
QWEN3 = Family(
    constants={"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu"},
    numbers=NUMBERS,
    tensors=TENSORS,
    layer=BLOCK | HEAD_NORMS,
    ends=("<|endoftext|>",),
)


def gemma_terms(config: Config) -> Config:
    """No file has the scale of attention scores: the largest model scales by the size of its hidden states, all others
    by their head size. A file without a window has no windowed layers."""
    largest = config["num_hidden_layers"] == 62
    scalar = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    period = config["sliding_window_pattern"] if config.get("sliding_window") else 1
    return config | {"query_pre_attn_scalar": scalar, "sliding_window_pattern": period}


GEMMA3 = Family(
    constants={
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window_pattern": 6,
        "rope_local_base_freq": 10000.0,
    },
    numbers=NUMBERS,
    optional={
        "sliding_window": "attention.sliding_window",
        "sliding_window_pattern": "attention.sliding_window_pattern",
        "rope_local_base_freq": "rope.freq_base_swa",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    derive=gemma_terms,
    tensors=TENSORS,
    layer={
        **BLOCK,
        **HEAD_NORMS,
        "post_attention_norm.weight": "post_attention_layernorm.weight",
        "ffn_norm.weight": "pre_feedforward_layernorm.weight",
        "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    },
    norm_offset=1.0,
)
PHI3 = Family(
    constants={"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_act": "silu"},
    numbers=NUMBERS,
    optional={
        "sliding_window": "attention.sliding_window",
        "original_max_position_embeddings": "rope.scaling.original_context_length",
    },
    tensors=TENSORS,
    layer={
        **ATTENTION,
        "attn_qkv.weight": "self_attn.qkv_proj.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "ffn_up.weight": "mlp.gate_up_proj.weight",
        "ffn_down.weight": "mlp.down_proj.weight",
    },
)
FAMILIES = {"gemma3": GEMMA3, "llama": LLAMA, "phi3": PHI3, "qwen2": QWEN2, "qwen3": QWEN3}
