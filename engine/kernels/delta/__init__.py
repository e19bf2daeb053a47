"""The gated delta rule and its short convolution: reference.py in torch, triton.py in Triton."""
