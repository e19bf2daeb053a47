"""`python -m engine.kernels` compiles the CPU kernels, so that the first start need not."""

import logging

from engine.kernels.cpu import kernels

logging.basicConfig(level=logging.INFO)
kernels()
