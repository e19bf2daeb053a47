"""Manifest of the built-in processors of media. Each follows that of transformers."""

from engine.plugin import hookimpl
from engine.plugin.hookspecs import Register

API = 1

# name, target, architectures, description
PROCESSORS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    (
        "qwen2_5_vl",
        "qwen2_5_vl:Qwen25VL",
        ("Qwen2_5_VLForConditionalGeneration",),
        "images and video of Qwen2.5-VL, of any resolution",
    ),
    (
        "qwen3_vl",
        "qwen3_vl:Qwen3VL",
        (
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLMoeForConditionalGeneration",
            "Qwen3_5ForConditionalGeneration",
            "Qwen3_5MoeForConditionalGeneration",
        ),
        "images and video of Qwen3-VL and Qwen3.5, with timestamps",
    ),
    (
        "llava_onevision",
        "llava_onevision:LlavaOnevision",
        ("LlavaOnevisionForConditionalGeneration",),
        "images in tiles, and video, of LLaVA-OneVision",
    ),
    ("gemma3", "gemma3:Gemma3", ("Gemma3ForConditionalGeneration",), "images of Gemma 3"),
)


@hookimpl
def register_media(register: Register) -> None:
    for name, target, architectures, description in PROCESSORS:
        register(name, f"engine_plugins.media.{target}", architectures=architectures, description=description)
