"""Kernels, for plugins: what engine.kernels offers to attention backends and quantization schemes."""

from engine.kernels.cpu import Kernels, attention_tasks, kernels, kernels_for

__all__ = ["Kernels", "attention_tasks", "kernels", "kernels_for"]
