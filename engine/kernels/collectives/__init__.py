"""Sums over the ranks of one host with what follows them, in one kernel: exchange.py (Triton), reference.py."""
