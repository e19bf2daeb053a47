"""The figures of tiers below the device, where there are any, from the scheduler's latest Stats."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from engine.messages.control import Stats, WorkerReady


def tiers_of(stats: Stats, info: WorkerReady | None) -> Iterator[Metric]:
    """One family for each figure."""
    tiers = stats.tiers
    if tiers is None or info is None:
        return
    page = info.page_size * info.kv_bytes_per_token
    size = GaugeMetricFamily("engine_tier_bytes", "Bytes of KV pages that a tier holds", labels=["tier"])
    size.add_metric(["host"], tiers.host_used * page)
    size.add_metric(["store"], tiers.store_bytes)
    yield size
    yield GaugeMetricFamily(
        "engine_tier_host_limit_bytes", "Bytes that the host tier has room for", tiers.host_pages * page
    )
    hits = CounterMetricFamily("engine_tier_hit_tokens", "Prompt tokens that a tier held", labels=["tier"])
    found = {"device": tiers.from_device, "host": tiers.from_host, "store": tiers.from_store}
    for tier, pages in found.items():
        hits.add_metric([tier], pages * info.page_size)
    yield hits
    moved = CounterMetricFamily("engine_tier_moved_bytes", "Bytes of KV pages that moved between tiers", labels=["way"])
    ways = {"down": tiers.down, "up": tiers.from_host + tiers.from_store, "keep": tiers.kept, "fetch": tiers.fetched}
    for way, pages in ways.items():
        moved.add_metric([way], pages * page)
    yield moved
    text = "Pages that found no room in the host tier"
    yield CounterMetricFamily("engine_tier_pages_refused", text, tiers.refused)
    text = "Pages that a tier could not take or give, and that were computed again where they were needed"
    yield CounterMetricFamily("engine_tier_pages_failed", text, tiers.failed)
    text = "Pages that a store had, and that were computed because that was sooner"
    yield CounterMetricFamily("engine_tier_pages_computed", text, tiers.computed)
    text = "Pages of the host tier that a store is still to be given"
    yield GaugeMetricFamily("engine_tier_pages_to_keep", text, tiers.to_keep)
    stores = CounterMetricFamily("engine_tier_store", "What the store of KV pages counts itself", labels=["what"])
    for name, count in tiers.stores.items():
        stores.add_metric([name], count)
    yield stores
    text = "Whether a store has not forgotten yet what a flush was to clear, and gives nothing until then"
    yield GaugeMetricFamily("engine_tier_uncleared", text, float(tiers.uncleared))
    text = "Seconds of computing that pages from the host and the store have saved, by the speed of prompts"
    yield CounterMetricFamily("engine_tier_saved_seconds", text, tiers.seconds_saved)
    text = "Share of the pages of all prompts so far that a cache without end would have held"
    yield GaugeMetricFamily("engine_cache_hit_ceiling_ratio", text, tiers.ceiling)
