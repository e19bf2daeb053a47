"""`python -m engine.kernels` compiles what is in C (kernels, the router's table), so that the first start need not."""

import logging

from engine.kernels.cpu.calls import kernels
from engine.router.compiled_table import compiled

logging.basicConfig(level=logging.INFO)
kernels()
compiled()
