"""Kernels of our own, each with its torch reference beside it."""
