"""Hugging Face directories as checkpoints."""
