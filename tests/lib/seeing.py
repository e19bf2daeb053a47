"""Tiny models of transformers that see, written as checkpoints, and how ours and theirs are asked the same."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hashlib
import itertools
import json
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from msgspec.structs import replace
from oracle import token_by_token
from tiny_checkpoint import save_checkpoint
from transformers.core_model_loading import revert_weight_conversion

from engine import Engine, Reply, SamplingParams
from engine.conversation.media import MediaProcessor, Placed, needs_of
from engine.media.frames import Frames
from engine.messages.assets import Bound, Load, Loaded
from engine.messages.media import MEDIA, Pixels, Prepared, slices_of, unpacked
from engine.messages.media import packed as packed_pixels
from engine.messages.request import Generate
from engine.plugin import Terms
from engine.plugin.testing import ModelHarness
from engine.runtime.offline import packed

IMAGE, VIDEO, START, END = 90, 91, 92, 93  # token ids
TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
TURNING = {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def filled(model: Any, gemma: bool = False) -> Any:
    """`model` with seeded weights that are large enough for decided answers, norms and biases too."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        neutral = 0.0 if gemma and "language_model" in name else 1.0
        mean = neutral if (parameter.ndim == 1 and "norm" in name) or "ln_q" in name else 0.0
        parameter.data.normal_(mean=mean, std=0.25)
    return model.eval()


def qwen2_5_vl(**vision: Any) -> Any:
    """A tower of windows of 4 x 4 patches, the last of whose blocks sees whole pictures; its inner size is padded."""
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 42,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "out_hidden_size": 48,
            "fullatt_block_indexes": [2],
            "tokens_per_second": 2,
            **vision,
        },
        **QWEN_IDS,
    )
    return filled(transformers.Qwen2_5_VLForConditionalGeneration(config))


def qwen3_vl(text: Any = (), **vision: Any) -> Any:
    """Two of whose tower's three blocks speak to the decoder's first layers."""
    config = transformers.Qwen3VLConfig(**qwen3_vl_terms(dict(text), vision))
    return filled(transformers.Qwen3VLForConditionalGeneration(config))


def qwen3_vl_moe(text: Any = (), **vision: Any) -> Any:
    """As `qwen3_vl`, but the second of the decoder's layers is dense and the others are mixtures."""
    mixture = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "mlp_only_layers": [1]}
    config = transformers.Qwen3VLMoeConfig(**qwen3_vl_terms({**mixture, **dict(text)}, vision))
    return filled(transformers.Qwen3VLMoeForConditionalGeneration(config))


def qwen3_vl_terms(text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    usual = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 48,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 2],
    }
    terms = {"text_config": {**TEXT, "head_dim": 8, "rope_parameters": {**TURNING}, **text}, **QWEN_IDS}
    return {**terms, "vision_config": {**usual, **vision}}


def qwen3_5(**text: Any) -> Any:
    """Two gated delta nets to a layer that attends, of a mixture if `text` names experts."""
    kind = "Qwen3_5Moe" if "num_experts" in text else "Qwen3_5"
    delta = {
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 16},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 12, "full_attention_interval": 3},
        "rope_parameters": {**TURNING, "partial_rotary_factor": 0.5},
    }
    terms = qwen3_vl_terms({**delta, **text}, {"depth": 2, "deepstack_visual_indexes": []})
    config = getattr(transformers, f"{kind}Config")(**terms)
    return token_by_token(filled(getattr(transformers, f"{kind}ForConditionalGeneration")(config)))


def gemma3(**vision: Any) -> Any:
    """A tower of 6 x 6 patches that become nine tokens; of four layers of the decoder the last sees everything."""
    text = {**TEXT, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 12, "sliding_window_pattern": 4}
    config = transformers.Gemma3Config(
        text_config={**text, "query_pre_attn_scalar": 8, "rms_norm_eps": 1e-6},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 24,
            "patch_size": 4,
            "vision_use_head": False,
            **vision,
        },
        mm_tokens_per_image=9,
        image_token_id=IMAGE,
        boi_token_id=START,
        eoi_token_id=END,
    )
    return filled(transformers.Gemma3ForConditionalGeneration(config), gemma=True)


def llava_onevision(**changes: Any) -> Any:
    """A tower of 5 x 5 patches; a picture has up to nine tiles, and the patches of up to two."""
    config = transformers.LlavaOnevisionConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 20,
            "patch_size": 4,
            "vision_use_head": False,
        },
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[20 * high, 20 * wide] for high in (1, 2, 3) for wide in (1, 2, 3)],
        **{"vision_aspect_ratio": "anyres_max_2", **changes},
    )
    return filled(transformers.LlavaOnevisionForConditionalGeneration(config))


def saved(model: Any, folder: Path, **processors: Any) -> Path:
    """`model` as a checkpoint with the configurations of its `processors`."""
    save_checkpoint(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [type(model).__name__]}))
    (folder / "processor_config.json").write_text(json.dumps(processors))
    return folder


def picture(seed: int, height: int, width: int, frames: int = 1, fps: float = 0.0) -> Frames:
    """A made-up picture, or with `fps` a clip."""
    rng = np.random.default_rng(seed)
    rough = rng.integers(0, 256, (frames, 5, 7, 3), np.uint8)
    rows, columns = np.arange(height) * 5 // height, np.arange(width) * 7 // width
    pixels = rough[:, rows][:, :, columns] // 2 + rng.integers(0, 128, (frames, height, width, 3), np.uint8)
    digest = hashlib.sha256(pixels.tobytes() + repr((frames, fps, height)).encode()).digest()
    times = tuple(index / fps for index in range(frames)) if fps else ()
    return Frames(pixels, times, digest, frames / fps if fps else 0.0)


def broken(medium: Prepared) -> Prepared:
    """Pixels of 40 x 40 that do not lie as their grid says."""
    pixels = replace(unpacked(medium.payload), shape=(1, 20, 80, 3))
    return replace(medium, payload=packed_pixels(pixels))


def pixels_of(medium: Prepared) -> list[Pixels]:
    """Of each slice."""
    return [unpacked(each.payload) for each in slices_of(medium)]


def processor_of(engine: Engine) -> MediaProcessor:
    text = engine.inner.front.text
    assert text is not None and text.media is not None
    return text.media


def prepared(engine: Engine, media: Sequence[Frames]) -> tuple[Prepared, ...]:
    return tuple(processor_of(engine).prepare(each) for each in media)


def ask(engine: Engine, ids: Sequence[int], media: Sequence[Frames], **params: Any) -> Reply:
    return ask_all(engine, [(ids, media)], **params)[0]


def ask_all(engine: Engine, prompts: Sequence[tuple[Sequence[int], Sequence[Frames]]], **params: Any) -> list[Reply]:
    """The replies to prompts of ids, a placeholder for each medium among them, asked all at once."""
    futures = [begin(engine, ids, prepared(engine, media), **params) for ids, media in prompts]
    return [future.result() for future in futures]


def begin(engine: Engine, ids: Sequence[int], media: Sequence[Prepared], **params: Any) -> "Future[Reply]":
    sampling = SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **params})
    request = Generate(uuid.uuid4().hex, sampling, ids=packed(list(ids)), media=tuple(media))
    return engine.portal.start_task_soon(partial(engine.inner._whole, request))


# ── one model of ours, in this process ───────────────────────────────────────────────────────


class Seen:
    """A model of ours with the weights of `theirs`, driven as a worker drives it: prompts of ids and media, cut."""

    def __init__(
        self,
        theirs: Any,
        ours: type[Any],
        processor: type[Any],
        attention: Any = None,
        device: str = "cpu",
        stored: Callable[[dict[str, Any]], tuple[dict[str, Any], Any]] = lambda tensors: (tensors, None),
        **described: Any,
    ) -> None:
        """`stored` makes of the weights what the checkpoint has, and the quantization that reads it."""
        reverted = revert_weight_conversion(theirs, theirs.state_dict())
        tensors, scheme = stored({key: value.detach().contiguous() for key, value in reverted.items()})
        config, built = theirs.config.to_dict(), {"attention": attention, "device": device, "quantization": scheme}
        self.harness = ModelHarness(ours, config, tensors, max_model_len=256, **built)
        self.model = self.harness.runner.model
        encode = lambda text: [ord(letter) % 80 for letter in text]  # noqa: E731
        self.processor = processor(Terms(config), Terms(described), encode)
        self.numbers = itertools.count(1)

    @torch.inference_mode()
    def embeddings(self, media: Sequence[Prepared]) -> list[torch.Tensor]:
        """Those of each medium, all slices encoded together."""
        made = iter(self.model.encode([each for medium in media for each in pixels_of(medium)]))
        return [torch.cat([next(made) for _ in slices_of(medium)]) for medium in media]

    @torch.inference_mode()
    def admit(self, prompts: Sequence[tuple[Sequence[int], Sequence[Prepared]]], cached: Any = None) -> list[Placed]:
        """Gives `prompts` the first slots, their media encoded."""
        placed = [self.processor.placed(list(ids), media) for ids, media in prompts]
        plan = self.harness.admit([list(each.ids) for each in placed], cached)
        admits, numbers = [], []
        for admit, each, (_, media) in zip(plan.admits, placed, prompts, strict=True):
            bound = []
            for need in needs_of(media, each):
                numbers.append(next(self.numbers))
                self.harness.runner.loaders[MEDIA].load(Load(MEDIA, numbers[-1], need.payload), self.loaded)
                bound.append(Bound(MEDIA, numbers[-1], need.use))
            known = {"prompt_len": len(each.ids), "positions": each.positions, "bound": tuple(bound)}
            admits.append(replace(admit, **known))
        encodes = np.array([(0, number) for number in numbers], "<i4").tobytes()  # one copy of attention has all slots
        self.harness.runner.apply(replace(plan, admits=tuple(admits), encodes=encodes))
        return placed

    def loaded(self, message: Loaded) -> None:
        assert not message.cause

    def logits(self, prompt: tuple[Sequence[int], Sequence[Prepared]]) -> torch.Tensor:
        """At all positions of one prompt."""
        (placed,) = self.admit([prompt])
        return self.cut(placed)

    def cut(self, placed: Placed, cuts: Sequence[int] = ()) -> torch.Tensor:
        """As `logits`, of what has the first slot, computed in chunks that end at `cuts`."""
        bounds = [0, *cuts, len(placed.ids)]
        return torch.cat([self.harness.logits([(0, first, last - first)])[0] for first, last in pairwise(bounds)])
