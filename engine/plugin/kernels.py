"""Kernels, for plugins: what engine.kernels offers to models, attention backends and quantization schemes."""

from engine.kernels import ops_for
from engine.kernels.cpu import Kernels, attention_tasks, kernels
from engine.kernels.ops import HeadNorms, Heads, Ops, Rotation

__all__ = ["HeadNorms", "Heads", "Kernels", "Ops", "Rotation", "attention_tasks", "kernels", "ops_for"]
