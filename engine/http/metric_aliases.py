"""The figures of /metrics under the names of vLLM and SGLang, for dashboards and autoscalers that read those.

An alias is a metric of ours under another name, with the label `model_name` and that server's words for how a request
ended. Names for what the engine does not count are left out, and a dashboard's panels for them stay empty.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric

from engine.http.exposition import Figures
from engine.messages.control import Stats

if TYPE_CHECKING:
    from engine.runtime.front import Front

Family = Literal["vllm", "sglang"]
RATE_SECONDS = 1.0  # shortest time that a rate is taken over
# The names of each family, without the suffixes of counters and histograms, and ours.
ALIASES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "vllm": MappingProxyType(
            {
                "vllm:num_requests_running": "engine_requests_running",
                "vllm:num_requests_waiting": "engine_requests_waiting",
                "vllm:kv_cache_usage_perc": "engine_kv_use_ratio",
                "vllm:gpu_cache_usage_perc": "engine_kv_use_ratio",
                "vllm:prefix_cache_queries": "engine_prompt_tokens",
                "vllm:prefix_cache_hits": "engine_cached_tokens",
                "vllm:prompt_tokens": "engine_prompt_tokens",
                "vllm:generation_tokens": "engine_generated_tokens",
                "vllm:num_preemptions": "engine_retractions",
                "vllm:request_success": "engine_requests",
                "vllm:time_to_first_token_seconds": "engine_time_to_first_token_seconds",
                "vllm:inter_token_latency_seconds": "engine_inter_token_seconds",
                "vllm:time_per_output_token_seconds": "engine_inter_token_seconds",
                "vllm:e2e_request_latency_seconds": "engine_request_seconds",
            }
        ),
        "sglang": MappingProxyType(
            {
                "sglang:num_running_reqs": "engine_requests_running",
                "sglang:num_queue_reqs": "engine_requests_waiting",
                "sglang:token_usage": "engine_kv_use_ratio",
                "sglang:cache_hit_rate": "engine_cache_hit_ratio",
                "sglang:prompt_tokens": "engine_prompt_tokens",
                "sglang:cached_tokens": "engine_cached_tokens",
                "sglang:generation_tokens": "engine_generated_tokens",
                "sglang:num_requests": "engine_requests",
                "sglang:num_retracted_requests": "engine_retractions",
                "sglang:time_to_first_token_seconds": "engine_time_to_first_token_seconds",
                "sglang:inter_token_latency_seconds": "engine_inter_token_seconds",
                "sglang:time_per_output_token_seconds": "engine_inter_token_seconds",
                "sglang:e2e_request_latency_seconds": "engine_request_seconds",
            }
        ),
    }
)


class WithAliases(Figures):
    """All that `source` collects, and after it the aliases of `families`."""

    def __init__(self, source: CollectorRegistry, front: "Front", families: Sequence[Family], model: str) -> None:
        self._source = source
        self._front = front
        self._families = families
        self._labels = {"model_name": model}
        self._began, self._total, self._rate = time.monotonic(), 0, 0.0

    def on_stats(self, stats: Stats) -> None:
        """Take the rate of generated tokens, which SGLang shows as a gauge, since it was taken last."""
        now, total = time.monotonic(), stats.generated_tokens_total
        if now - self._began >= RATE_SECONDS:
            self._rate = max(total - self._total, 0) / (now - self._began)
            self._began, self._total = now, total

    def collect(self) -> Iterator[Metric]:
        """One family for each figure and each alias."""
        ours = {metric.name: metric for metric in self._source.collect()}
        yield from ours.values()
        for family in self._families:
            for alias, name in ALIASES[family].items():
                yield renamed(ours[name], alias, self._labels | ({"engine": "0"} if family == "vllm" else {}))
        if "sglang" in self._families:
            yield from self._gauges()

    def _gauges(self) -> Iterator[Metric]:
        stats, info = self._front.stats, self._front.info
        size = 0 if info is None else info.page_size
        for name, text, value in (
            ("sglang:gen_throughput", "Tokens generated a second, lately", self._rate),
            (
                "sglang:num_used_tokens",
                "Tokens in pages that running requests use",
                (stats.pages - stats.pages_free - stats.pages_cached) * size,
            ),
            ("sglang:max_total_num_tokens", "Tokens that the KV cache holds", stats.pages * size),
        ):
            family = GaugeMetricFamily(name, text, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), value)
            yield family


def renamed(metric: Metric, alias: str, labels: dict[str, str]) -> Metric:
    """`metric` as `alias`, with `labels`; of its own it keeps the bounds of buckets and, for vLLM, how requests ended.

    Samples that differ in nothing else are one. A request that was refused does not count: it never ran."""
    summed: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for name, own, value, *_ in metric.samples:
        suffix, kept = name.removeprefix(metric.name), dict(labels)
        if suffix == "_created" or own.get("reason") == "refused":
            continue
        if "le" in own:
            kept["le"] = own["le"]
        if "reason" in own and alias.startswith("vllm:"):
            kept["finished_reason"] = "abort" if own["reason"] == "disconnect" else own["reason"]
        key = suffix, tuple(kept.items())
        summed[key] = summed.get(key, 0.0) + value
    made = Metric(alias, f"{metric.documentation} ({metric.name})", metric.type)
    for (suffix, kept_items), value in summed.items():
        made.add_sample(alias + suffix, dict(kept_items), value)
    return made
