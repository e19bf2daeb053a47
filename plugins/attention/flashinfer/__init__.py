"""Attention by FlashInfer: heads (mha.py) and latents (mla.py)."""
