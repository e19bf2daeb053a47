"""The plugins' door to kernels: classes and functions, of which those in Triton come at their first use."""

import inspect
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.plugin import kernels


@pytest.mark.parametrize("name", kernels.__all__)
def test_each_name_is_there_and_is_no_module(name: str) -> None:
    pytest.importorskip("triton")
    found: Any = getattr(kernels, name)
    assert not isinstance(found, ModuleType)
    if inspect.isclass(found) or inspect.isfunction(found):
        assert found.__module__.startswith("engine.kernels") and found.__doc__, f"{name} says nothing of itself"


def test_all_that_is_in_triton_is_named() -> None:
    late = {name for names in kernels._IN_TRITON.values() for name in names}
    assert late <= set(kernels.__all__)


def test_triton_is_imported_at_first_use_and_missed_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys; from engine.plugin import kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    monkeypatch.delitem(vars(kernels), "attend_decode", raising=False)
    with pytest.raises(ConfigError, match="attend_decode needs the package triton: pip install triton"):
        kernels.attend_decode  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'triton_decode'"):
        kernels.triton_decode  # noqa: B018
