"""DeepSeek-V3 on 8 to 96 GPUs, computed: which way tokens had better take to their experts, and what balance is worth.

    python -m bench.engine.experts [--rows check,ways,prefill,balance] [--context 2048]

Attention runs in as many copies as there are GPUs, and experts are divided over all of them. Nothing is measured here.
A step is a sum over layers of what was measured on one or two H200s, at the sizes that it has:

    weights, latents      bytes over 4.3 TB/s, at the shares of it that steps and kernels reach (bench/RESULTS.md)
    products of experts   FP8 operations at the rate that our kernels reach with many tokens
    between GPUs          NCCL's times between two GPUs of a host, by bytes that travel, and 2 us more for each doubling
                          of their number; over the network 50 GB/s a GPU, which is assumed

`check` sets the same sums beside steps of V2-Lite that were measured on one GPU and on two: their shares are the slice
of V3's.
`ways` compares three: all tokens gathered and results scattered, in bfloat16; and all-to-all, hidden states as FP8, the
shared expert whole on each GPU, to fixed places or with counts. A captured decode step cannot go by counts, so speeds
are by the others. `prefill` does so for prompts, which may. `balance` draws loads of experts from a
log-normal distribution, arranges them with the engine's balancer, and tells the busiest GPU's load before and after,
and the step that follows. Left out: what overlaps (products with messages, two halves of a batch), the head, hosts that
wait for each other, and that a token's experts lie on few hosts where routing is limited to groups.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from bench.engine.gpu import Shape
from bench.lib.floors import BANDWIDTH, RATE, RATE_FP8
from engine.parallel.balance import balanced
from engine.parallel.placement import first_placement, imbalance, rank_loads

CONFIGS = Path(__file__).parents[1] / "configs"
GPUS, ROWS = (8, 16, 32, 64, 96), (8, 32, 64, 128, 256)
HOST = 8  # GPUs
NETWORK = 50e9  # bytes a second of each GPU to other hosts: 400 Gb/s, assumed
DOUBLING = 2e-6  # seconds that a message takes longer where twice as many GPUs take part, assumed
REDUNDANT = 32  # copies of experts

Times = Sequence[tuple[float, float]]

# Measured (bench/RESULTS.md): the share of its floor that a decode step of the slice of V3 reaches, by rows; that of
# the FP8 operations that a layer of V2-Lite's experts reaches at 4,096 tokens; that of the bandwidth that latent
# attention reaches with 128 heads and 128 rows x 1,024. What V2-Lite's decode steps take, by rows, in ms.
STEP_SHARES: Times = ((8, 0.62), (32, 0.87), (64, 0.92), (128, 0.97), (256, 0.86))
FP8_RATE = RATE_FP8 * 269 / 765
PROMPT_RATE = RATE / 2  # of attention's products in prompts: half of what a large product reaches, assumed
LATENT_SHARE = 35.1 / 77.1
LITE_MS: Times = ((8, 5.84), (32, 8.82), (64, 9.18), (128, 10.1), (256, 10.8))
LITE_CONTEXT = 192  # tokens of a row, in the mean
PAIR_ROWS, PAIR_CONTEXT, PAIR_MS = 256, 240, 8.4  # the same on each of two GPUs, attention in copies, experts divided
PAIR_SENT_MS = 0.85  # of that between the two

# Measured between two H200s of one host, in CUDA graphs: us of NCCL by KB that travel each way.
GATHER: Times = ((8, 8.7), (64, 9.6), (256, 11.4), (512, 13.8), (1024, 19.7), (2048, 28.4), (8192, 57), (65536, 292))
SCATTER: Times = ((32, 9.2), (128, 10.1), (256, 11.0), (512, 13.1), (1024, 18.0), (4096, 35), (32768, 167))
EXCHANGE: Times = ((32, 11.0), (128, 11.5), (256, 12.7), (512, 15.8), (1024, 18.1), (4096, 34), (32768, 140))


def between(points: Times, at: float) -> float:
    """On the line between two points; before the first as there, after the last in proportion."""
    xs, ys = zip(*points, strict=True)
    return ys[-1] * at / xs[-1] if at > xs[-1] else float(np.interp(at, xs, ys))


class Model:
    """DeepSeek-V3: sizes of one layer, in FP8."""

    def __init__(self, context: int) -> None:
        config = json.loads((CONFIGS / "dsv3-slice" / "config.json").read_text())
        config |= {"num_hidden_layers": 61, "first_k_dense_replace": 3}
        self.shape = msgspec.convert(config, Shape)
        self.context = context
        self.layers, self.dense = 61, 3
        self.mixtures = self.layers - self.dense
        self.experts, self.top_k, self.size = 256, 8, self.shape.hidden_size
        self.expert = 3 * self.size * self.shape.moe_intermediate_size  # bytes, and products of a token
        self.attention = self.shape.attention_weights
        self.wide = 3 * self.size * self.shape.intermediate_size  # of a dense layer
        self.latent = 2 * (self.shape.kv_lora_rank + self.shape.qk_rope_head_dim)  # bytes of a token

    # ── between GPUs ─────────────────────────────────────────────────────────────────────────

    def message(self, times: Times, inside: float, outside: float, gpus: int) -> float:
        """Seconds of a collective that moves so many bytes to each GPU within its host, and over its network port."""
        near = between(times, inside / 1024) / 1e6 + DOUBLING * np.log2(gpus / 2)
        return float(max(near, outside / NETWORK))

    def gathered(self, tokens: int, gpus: int) -> float:
        """All tokens to all GPUs and the sums back, each through the port of one GPU of a host."""
        one = 2 * tokens * self.size
        inside, outside = (gpus - 1) * one, max(0, gpus - HOST) * one / min(HOST, gpus)
        return sum(self.message(times, inside, outside, gpus) for times in (GATHER, SCATTER))

    def placed(self, tokens: int, gpus: int) -> float:
        """A place for each token on each GPU, and back."""
        return self._exchanged(tokens * (gpus - 1), gpus)

    def counted(self, tokens: int, gpus: int) -> float:
        """Each token once to each GPU that has some of its experts, and back."""
        others = (gpus - 1) * (1 - (1 - 1 / gpus) ** self.top_k)  # of the GPUs that a token goes to
        return self.message(EXCHANGE, 8 * gpus, 0, gpus) + self._exchanged(tokens * others, gpus)

    def _exchanged(self, lines: float, gpus: int) -> float:
        """So many lines from each GPU to others, and their results back."""
        far = max(0, gpus - HOST) / max(gpus - 1, 1)
        sent = self.size + 4 * self.size / 128 + 8 * self.top_k, 2 * self.size
        return sum(self.message(EXCHANGE, lines * size, lines * size * far, gpus) for size in sent)

    def cheaper(self, tokens: int, gpus: int, *, captured: bool) -> tuple[float, str]:
        """Seconds between GPUs for a layer, and by which way."""
        ways = [(self.gathered(tokens, gpus), "gather"), (self.placed(tokens, gpus), "places")]
        return min(ways if captured else [*ways, (self.counted(tokens, gpus), "counts")])

    # ── steps ────────────────────────────────────────────────────────────────────────────────

    def products(self, tokens: int, gpus: int, load: float) -> float:
        """Seconds of a layer's experts on the GPU that has `load` times the mean."""
        chosen = 1 - (1 - self.top_k / self.experts) ** (tokens * gpus)
        read = self.expert * self.experts / gpus * chosen / BANDWIDTH / share(tokens)
        return max(read, 2 * self.expert * self.top_k * tokens * load / FP8_RATE)

    def step(self, rows: int, gpus: int, load: float = 1.0) -> float:
        """Seconds of a decode step with so many rows a GPU."""
        sent, way = self.cheaper(rows, gpus, captured=True)
        shared = self.expert / gpus if way == "gather" else self.expert
        weights = self.layers * self.attention + self.mixtures * shared + self.dense * self.wide / gpus
        latents = self.layers * rows * self.context * self.latent
        seconds = weights / BANDWIDTH / share(rows) + latents / BANDWIDTH / LATENT_SHARE
        return seconds + self.mixtures * (self.products(rows, gpus, load) + sent)

    def prompt(self, tokens: int, gpus: int, load: float = 1.0) -> float:
        """Seconds of a step with so many tokens of prompts a GPU, each of which sees half of the context before it."""
        heads = self.shape.num_attention_heads * (self.shape.qk_nope_head_dim + self.shape.qk_rope_head_dim + 128)
        pairs = 2 * tokens * self.context / 2 * heads / PROMPT_RATE
        weights = self.layers * self.attention + self.mixtures * self.expert + self.dense * self.wide
        seconds = 2 * tokens * weights / FP8_RATE + self.layers * pairs
        return seconds + self.mixtures * (
            self.products(tokens, gpus, load) + self.cheaper(tokens, gpus, captured=False)[0]
        )


def share(rows: float) -> float:
    """Of the bandwidth, by rows."""
    return between(STEP_SHARES, min(rows, 256))


# ── tables ───────────────────────────────────────────────────────────────────────────────────


def check(_: Model) -> None:
    shape = msgspec.convert(json.loads((CONFIGS / "dsv2-lite" / "config.json").read_text()), Shape)
    print("V2-Lite on one GPU, ms of a decode step: rows, computed, measured")
    for rows, measured in LITE_MS:
        weights = shape.step_seconds(0, int(rows))
        latents = shape.step_seconds(int(rows * LITE_CONTEXT), int(rows)) - weights
        computed = 1e3 * (weights / share(rows) + latents / LATENT_SHARE)
        print(f"  {rows:4.0f}  {computed:6.2f}  {measured:6.2f}  {computed / measured:5.2f}")
    sent, computed = pair(shape)
    print("on two GPUs: rows of each, computed, measured; of that between them")
    print(f"  {PAIR_ROWS:4}  {computed:6.2f}  {PAIR_MS:6.2f}  {computed / PAIR_MS:5.2f}")
    print(f"        {sent:6.2f}  {PAIR_SENT_MS:6.2f}  {sent / PAIR_SENT_MS:5.2f}")


def pair(shape: Shape) -> tuple[float, float]:
    """Of a step of `PAIR_ROWS` rows on each of two GPUs: ms between them, and in all."""
    chosen = shape.n_routed_experts * (1 - (1 - shape.num_experts_per_tok / shape.n_routed_experts) ** (2 * PAIR_ROWS))
    own = shape.num_hidden_layers * shape.attention_weights
    weights = own + (shape.layer_weights(chosen) - own) / 2 + shape.vocab_size * shape.hidden_size
    read = shape.step_seconds(0, PAIR_ROWS)
    latents = (shape.step_seconds(PAIR_ROWS * PAIR_CONTEXT, PAIR_ROWS) - read) / LATENT_SHARE
    traveling = 2 * PAIR_ROWS * shape.hidden_size / 1024
    sent = shape.num_hidden_layers * sum(between(times, traveling) for times in (GATHER, SCATTER)) / 1e6
    return 1e3 * sent, 1e3 * (2 * weights / BANDWIDTH / share(PAIR_ROWS) + latents + sent)


def ways(model: Model) -> None:
    print(f"decode at {model.context:,} tokens of context, even loads: ms between GPUs by gathering / to fixed")
    print("places / with counts, and tok/s a GPU by the cheaper of the first two")
    by_size(model, ROWS, "rows", model.step, digits=1)


def prefill(model: Model) -> None:
    print(f"prompts of {model.context:,} tokens, even loads: the same ms, and tok/s a GPU by the cheapest")
    by_size(model, (512, 2048, 8192), "tokens", model.prompt, digits=0)


def by_size(
    model: Model, sizes: Sequence[int], what: str, seconds: Callable[[int, int], float], *, digits: int
) -> None:
    """A line for each number of GPUs: what lies between them, and what a step of each size a GPU comes to."""
    line(["GPUs", *(f"{size:,} {what}" for size in sizes)])
    for gpus in GPUS:
        cells = []
        for size in sizes:
            ways = (1e3 * model.mixtures * way(size, gpus) for way in (model.gathered, model.placed, model.counted))
            cells.append(f"{' / '.join(f'{way:.{digits}f}' for way in ways)}: {size / seconds(size, gpus):,.0f}")
        line([str(gpus), *cells])


def balance(model: Model, spread: float = 0.8, trials: int = 8) -> None:
    print(f"loads log-normal, sigma {spread}: the busiest GPU over the mean, as experts lie at first / with")
    print(f"{REDUNDANT} copies arranged (64 on 64 GPUs); gain in decode at 128 rows, in prompts of 8,192 tokens a GPU")
    generator = np.random.default_rng(0)
    for gpus in GPUS:
        slots = -(-(model.experts + REDUNDANT) // gpus)
        first = first_placement(model.experts, gpus, slots * gpus - model.experts)
        found = []
        for _ in range(trials):
            counts = (generator.lognormal(0, spread, model.experts) * 1000).astype(np.int64)
            after = balanced(counts, *first.shape)
            found.append([imbalance(rank_loads(counts, each)) for each in (first, after)])
        before, then = np.mean(found, axis=0)
        gains = [gain(step, size, gpus, before, then) for step, size in ((model.step, 128), (model.prompt, 8192))]
        line([str(gpus), f"{before:.2f} / {then:.2f}", *(f"{each:.2f}x" for each in gains)])


def gain(step: Callable[..., float], size: int, gpus: int, before: float, then: float) -> float:
    return step(size, gpus, before) / step(size, gpus, then)


def line(cells: Sequence[str]) -> None:
    print("  ".join(f"{cell:>22}" if index else f"{cell:>5}" for index, cell in enumerate(cells)))


TABLES = {"check": check, "ways": ways, "prefill": prefill, "balance": balance}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(TABLES))
    parser.add_argument("--context", type=int, default=2048)
    given = parser.parse_args()
    for name in given.rows.split(","):
        TABLES[name](Model(given.context))
        print()


if __name__ == "__main__":
    main()
