"""Where spans are sent, if --otlp-endpoint says so: the one place that imports `otlp`, and with it OpenTelemetry."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from engine.http.tracing import traces_url

if TYPE_CHECKING:
    from engine.http.otlp import Tracing


def tracing_to(endpoint: str | None) -> "Callable[[], Tracing] | None":
    """What opens the tracing to `endpoint`; None without one, and then OpenTelemetry is not imported.

    Raises ConfigError for what is no URL, and where OpenTelemetry is not installed."""
    if endpoint is None:
        return None
    traces_url(endpoint)
    try:
        from engine.http.otlp import Tracing
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise ConfigError(
            f"--otlp-endpoint is {endpoint!r}, and tracing needs packages that are not installed (there is no "
            f"{error.name}): pip install 'actorserve[otel]', or leave the option out"
        ) from None
    return partial(Tracing, endpoint)
