"""A page of metrics as Prometheus asks for it, and figures that are read at that moment. Of an engine and a router."""

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector


class Figures(Collector):
    """Figures that `collect` reads when Prometheus asks."""

    def describe(self) -> list[Metric]:
        """Nothing: the registry then does not scrape at start to learn the names."""
        return []


def page(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """All metrics of `registry` in the format that an Accept header asks for, and its content type."""
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is no version
        encode, content_type = choose_encoder("")
    return encode(registry), content_type
