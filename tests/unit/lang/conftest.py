"""An engine of the echo model, for all tests of programs."""

from collections.abc import Iterator

import pytest

from engine import Engine


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    with Engine(model="echo", log_level="error") as engine:
        yield engine
