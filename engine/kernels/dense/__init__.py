"""What stands between a model's matrices and its attention: reference.py in torch, the others in Triton."""
