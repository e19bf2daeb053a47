"""Fixtures shared by all tests."""

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a loaded machine is slow, and nothing is wrong
settings.load_profile("untimed")
os.environ.setdefault("ENGINE_SPARE_WORKER", "false")  # a second of a core for each server; tests of spares ask for one
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow a small machine badly


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def uncollected(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a GPU no garbage is collected within a test: a graph that is freed while another one is captured ends that."""
    on_gpu = request.path.parent.name == "gpu"
    if on_gpu:
        gc.disable()
    yield
    if on_gpu:
        gc.enable()
