"""No garbage is collected within a test: a graph that is freed while another one is captured ends the capture."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def uncollected() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()
