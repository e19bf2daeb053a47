"""Attention in plain PyTorch: heads (mha.py) and latents (mla.py)."""
