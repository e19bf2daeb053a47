"""Fixtures shared by all tests."""

import gc
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from engine.testing.ranks import Ranks

settings.register_profile("untimed", deadline=None)  # a loaded machine is slow, and nothing is wrong
settings.load_profile("untimed")
os.environ.setdefault("ENGINE_SPARE_WORKER", "false")  # a second of a core for each server; tests of spares ask for one
os.environ.setdefault("ENGINE_CHECK_INTEGRITY", "true")  # also of many pages: a leak ends a server
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


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command that a test runs in this process sets up logging, to a stream that closes with the test."""
    logger = logging.getLogger("engine")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Ranks"]:
    """Two ranks with half of the experts each: to start them takes some seconds, and several modules use them."""
    from engine.testing.ranks import open_ranks

    with open_ranks(tmp_path_factory.mktemp("two"), tp=2, ep=2) as opened:
        yield opened
