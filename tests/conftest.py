"""Fixtures shared by all tests."""

import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow a small machine badly


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
