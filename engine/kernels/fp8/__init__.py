"""E4M3 numbers and products: reference.py in torch, triton.py in Triton."""
