"""Whether the options of attention in copies go together: said before a process is started."""

from engine.config import Config
from engine.errors import ConfigError


def check_copies(config: Config) -> None:
    """Raises ConfigError where they do not."""
    copies, schedule = config.parallel.dp_attention, config.schedule
    for name, what, number in (
        ("--max-running", "requests", schedule.max_running),
        ("--max-step-tokens", "tokens", schedule.max_step_tokens),
    ):
        if number is not None and number < copies:
            raise ConfigError(
                f"{name} {number} leaves no {what} for some of the {copies} copies of attention (--dp-attention); say "
                f"{copies} or more"
            )
