"""Attention over paged caches, in Triton."""
