"""Mixtures of experts: reference.py in torch, the others in Triton."""
