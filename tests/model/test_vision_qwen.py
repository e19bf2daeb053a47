"""Qwen2.5-VL and Qwen3-VL against transformers on seeded tiny models, in float32: pixels, places, positions, towers, replies."""
