"""DeepSeek whose tokens choose a quarter of its experts, which lie on the first rank: a plugin for benchmarks.

Dummy weights route evenly, so nothing would be gained by moving experts. Here a router's rows of the second quarter of
experts are `STRENGTH` times as large as the others. So are the scores of these experts, and a token chooses those of
them that score above zero: about half, which are others for another token. At first they lie on the first of two ranks,
and have no copies, which the first experts have. Left out: loads as a trained model has them.
"""

import torch

from engine.layers.moe import Router
from engine.plugin import hookimpl
from engine.plugin.hookspecs import Register
from engine_plugins.models.deepseek import Deepseek

ARCHITECTURE = "SkewedDeepseekForCausalLM"
STRENGTH = 8.0


class SkewedRouter(Router):
    def fill_at_random(self, generator: torch.Generator) -> None:
        super().fill_at_random(generator)
        quarter = self.routing.experts // 4
        self.weight[quarter : 2 * quarter].mul_(STRENGTH)


class SkewedDeepseek(Deepseek):
    def __init__(self, config, build) -> None:  # type: ignore[no-untyped-def]
        super().__init__(config, build)
        for layer in self.modules():
            if isinstance(layer, Router):
                layer.__class__ = SkewedRouter


@hookimpl
def register_models(register: Register) -> None:
    target = f"{__name__}:SkewedDeepseek"
    register("skewed", target, architectures=(ARCHITECTURE,), description="for benchmarks")
