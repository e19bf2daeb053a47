"""Metrics under the names of other servers: the same figures, in a format that Prometheus reads."""

import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from http_front import FakeFront, serving
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from engine.config import resolve
from engine.errors import ConfigError, RequestError
from engine.http.metric_aliases import ALIASES, WithAliases, renamed
from engine.http.metrics import Metrics
from engine.messages.control import Stats

pytestmark = pytest.mark.anyio
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.3"


async def scraped(session: aiohttp.ClientSession, accept: str = OPENMETRICS) -> dict[str, list[tuple[Any, float]]]:
    """The labels and values of each sample on the page, by name."""
    async with session.get("/metrics", headers={"Accept": accept}) as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        found: dict[str, list[tuple[Any, float]]] = {}
        for family in text_string_to_metric_families(await response.text()):
            for sample in family.samples:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


async def test_figures_are_the_same_under_every_name() -> None:
    front = FakeFront()
    front.stats = Stats(
        "ready", running=3, waiting=2, pages=100, pages_free=50, pages_cached=30, prompt_tokens_total=40,
        cached_tokens_total=10, generated_tokens_total=7, retractions_total=1,
    )  # fmt: skip
    async with serving(front, metrics_aliases=("vllm", "sglang")) as url, aiohttp.ClientSession(url) as session:
        for path, body in (("/v1/completions", {"prompt": "x"}), ("/generate", {"text": "x"})):
            async with session.post(path, json=body) as response:
                assert response.status == 200
        front.script = [RequestError("no")]
        async with session.post("/generate", json={"text": "x"}) as response:
            assert response.status == 400
        found = await scraped(session)
    vllm, sglang = {"model_name": "fake", "engine": "0"}, {"model_name": "fake"}
    for name, value in (
        ("num_requests_running", 3), ("num_requests_waiting", 2), ("kv_cache_usage_perc", 0.2),
        ("prompt_tokens_total", 40), ("prefix_cache_hits_total", 10),
        ("generation_tokens_total", 7), ("num_preemptions_total", 1),
        ("time_to_first_token_seconds_count", 2), ("e2e_request_latency_seconds_count", 2),
    ):  # fmt: skip
        assert found[f"vllm:{name}"] == [(vllm, value)]
    for name, value in (
        ("num_running_reqs", 3), ("num_queue_reqs", 2), ("token_usage", 0.2), ("cache_hit_rate", 0.25),
        ("num_requests_total", 2), ("num_used_tokens", 320), ("max_total_num_tokens", 1600), ("gen_throughput", 0),
    ):  # fmt: skip
        assert found[f"sglang:{name}"] == [(sglang, value)]
    assert found["vllm:request_success_total"] == [({**vllm, "finished_reason": "stop"}, 2)]
    buckets = [value for _, value in found["engine_time_to_first_token_seconds_bucket"]]
    assert [value for _, value in found["vllm:time_to_first_token_seconds_bucket"]] == buckets
    assert {labels["le"] for labels, _ in found["sglang:e2e_request_latency_seconds_bucket"]} >= {"0.05", "+Inf"}


async def test_each_family_is_asked_for_by_name() -> None:
    for families in ((), ("vllm",), ("sglang",)):
        async with serving(FakeFront(), metrics_aliases=families) as url, aiohttp.ClientSession(url) as session:
            found = await scraped(session, "")
        assert {name.partition(":")[0] for name in found if ":" in name} == set(families)
    with pytest.raises(
        ConfigError, match="--metrics-aliases is 'vllm,tgi', but takes a comma-separated list of vllm or sglang"
    ):
        resolve({"metrics_aliases": "vllm,tgi"})


def test_every_alias_has_its_metric() -> None:
    metrics = Metrics(FakeFront(), "fake")  # type: ignore[arg-type]
    ours = {metric.name for metric in metrics.registry.collect()}
    assert {name for names in ALIASES.values() for name in names.values()} <= ours
    page = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    assert [name for names in ALIASES.values() for name in names if not re.search(rf"`{name}\w*`", page)] == []


def test_ends_are_in_the_other_servers_words() -> None:
    ended = Metric("engine_requests", "Ended", "counter")
    for endpoint, reason in (("chat", "stop"), ("generate", "stop"), ("chat", "disconnect"), ("chat", "refused")):
        ended.add_sample("engine_requests_total", {"endpoint": endpoint, "reason": reason}, 1.0)
    ended.add_sample("engine_requests_created", {"endpoint": "chat", "reason": "stop"}, 1e9)
    told = {
        tuple(sample.labels.values()): sample.value for sample in renamed(ended, "vllm:request_success", {}).samples
    }
    assert told == {("stop",): 2.0, ("abort",): 1.0}
    (sample,) = renamed(ended, "sglang:num_requests", {}).samples
    assert (sample.name, sample.value) == ("sglang:num_requests_total", 3.0)


def test_the_rate_is_taken_over_a_second_or_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("engine.http.metric_aliases.time.monotonic", lambda: now)
    aliases = WithAliases(Metrics(FakeFront(), "fake").registry, FakeFront(), ("sglang",), "fake")  # type: ignore[arg-type]
    rates = []
    for now, total in ((100.5, 50), (102.0, 80), (102.5, 90), (104.0, 80), (106.0, 180)):  # noqa: B007
        aliases.on_stats(Stats("ready", generated_tokens_total=total))
        rates.append(next(metric for metric in aliases._gauges()).samples[0].value)
    assert rates == [0, 40, 40, 0, 50]
