"""The log says what requests waited for."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from triton import knobs

from engine.worker.compiles import tell_of_compiles


def test_a_kernel_that_is_compiled_while_requests_wait_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("jit_cache_hook", "jit_post_compile_hook"):
        monkeypatch.setattr(knobs.runtime, name, None)
    tell_of_compiles()
    caplog.set_level(logging.WARNING, "engine.worker")
    told: dict[str, Any] = {"key": "k", "repr": "", "is_manual_warmup": False, "already_compiled": False}
    told |= {"fn": SimpleNamespace(name="draw"), "compile": {"constants": {(3,): 64}}}
    before, after = knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook
    assert before is not None and after is not None
    assert not before(**told), "it would keep Triton from compiling"
    after(**told)
    assert "for a kernel to be compiled: draw, constants [64]" in caplog.text
