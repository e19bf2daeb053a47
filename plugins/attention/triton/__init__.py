"""Attention in Triton: heads (mha.py) and latents (mla.py)."""
