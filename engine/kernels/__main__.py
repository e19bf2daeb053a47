"""`python -m engine.kernels` compiles the CPU kernels, so that the first start need not."""

import logging

from engine.kernels.cpu.calls import kernels

logging.basicConfig(level=logging.INFO)
kernels()
